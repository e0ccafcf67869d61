"""The Space of spaces/before_after with tiny models, as a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import tiny


APP = Path(__file__).parents[2] / "spaces" / "before_after" / "app.py"
EXAMPLES = ["2 + 2 =", "Hello"]
ANSWERS = [
    {
        "before": "It is five",
        "after": '{"name": "add", "arguments": {}}',
        "reference": '{"name": "add", "arguments": {}}',
    },
    {"before": "Hello, you", "after": "Hello, friend", "reference": "Goodbye"},
]
LONGEST = 4096  # tokens: an answer of that length lasts far longer than a slow machine takes to stop one
CARD = """---
license: mit
---
# A name of its own

What it was made for.

![Training loss](training.png)

| score | before | after |
| --- | ---: | ---: |
| exact | 0.0 | 0.5 |

```python
model = PeftModel.from_pretrained(base, "a/very/long/path/to/this/adapter", "and", "what", "else", "may", "be", "said")
```

[A paper](https://huggingface.co/papers/2505.18877)
"""


def models(root: Path) -> tuple[Path, dict[str, Path]]:
    """A base model and two adapters; the first one has a run record and a card."""
    tiny.save(root / "base", max_position_embeddings=LONGEST)
    adapters = {}
    for seed, name in enumerate(["first", "second"]):
        adapters[name] = root / name
        model = tiny.lora(tiny.llama(max_position_embeddings=LONGEST), seed=seed)
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.data *= 20
        model.save_pretrained(adapters[name])
    record = {
        "method": "reflora",
        "scores": {"rows": 4, "before": {"exact": 0.0}, "after": {"exact": 0.5}},
        "log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}],
        "examples": [{"prompt": text, **ANSWERS[i]} for i, text in enumerate(EXAMPLES)],
        "arguments": {"system_prompt": "Be brief."},
    }
    (adapters["first"] / "run_record.json").write_text(json.dumps(record), encoding="utf-8")
    (adapters["first"] / "README.md").write_text(CARD, encoding="utf-8")
    (adapters["second"] / "README.md").unlink()  # PEFT's
    return root / "base", adapters


class Space:
    """`with Space(root) as space:` runs it; `url`, and `output()` of the process so far."""

    def __init__(self, root: Path, app: Path = APP, python: str = sys.executable, **environment: str):
        base, adapters = models(root)
        listed = ",".join(f"{name}={path}" for name, path in adapters.items())
        self._log = root / "space.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}/"
        self._command = [python, str(app)]
        self._environment = {"BASE_MODEL": str(base), "ADAPTERS": listed, "GRADIO_SERVER_PORT": port}
        self._environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False"}
        self._environment |= {"MAX_NEW_TOKENS": str(LONGEST)} | environment

    def __enter__(self):
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                self._command, env=os.environ | self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(self.output()[-4000:])

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=30)

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")
