"""What is loaded when the Space starts: the models, and what is known of the adapters' training.

It is loaded when this is imported, before the page is launched: ZeroGPU moves to its GPUs what is loaded by then, and
elsewhere the Space's own "building" screen is shown meanwhile.
"""

import os

from configuration import USUAL_LENGTH, configured_models, configured_settings
from engine import Engine
from results import Results


BASE, ADAPTERS = configured_models()
FIRST = next(iter(ADAPTERS))
DEFAULTS, SYSTEM_PROMPT = configured_settings(), os.environ.get("SYSTEM_PROMPT", "")
START_LENGTH = min(USUAL_LENGTH, DEFAULTS.max_new_tokens)
ENGINE = Engine(BASE, ADAPTERS, dtype=os.environ.get("DTYPE") or None)
if not os.environ.get("SPACES_ZERO_GPU"):  # there is no GPU at the start there, and the first question measures
    ENGINE.measure()
RESULTS = {name: Results(source) for name, source in ADAPTERS.items()}
SYSTEM_PROMPTS = {name: SYSTEM_PROMPT or results.system_prompt for name, results in RESULTS.items()}
