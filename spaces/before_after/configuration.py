"""What the owner of the Space sets: its models and what the page starts with. README.md lists the variables."""

import os
from pathlib import Path

from decoding import Settings, settings_of
from huggingface_hub import metadata_load


USUAL_LENGTH = 128  # tokens; the page starts with it unless MAX_NEW_TOKENS is smaller


def configured_models() -> tuple[str, dict[str, str]]:
    """The base model, and the adapters by the names that visitors see.

    Raises:
        ValueError: if neither the variables nor the front matter name them, or two adapters have the same name.
    """
    models = (metadata_load(Path(__file__).with_name("README.md")) or {}).get("models") or [""]
    base = os.environ.get("BASE_MODEL", "").strip() or models[0]
    listed = os.environ.get("ADAPTERS", "").split(",")
    entries = [entry.strip() for entry in listed if entry.strip()] or models[1:]
    if not base or not entries:
        raise ValueError("Set BASE_MODEL to the base model and ADAPTERS to its adapters, separated by commas.")
    adapters = {}
    for entry in entries:
        name, equals, source = entry.partition("=")
        name, source = (name.strip(), source.strip()) if equals else (Path(entry).name, entry)
        if not name or not source:
            raise ValueError(f"ADAPTERS has the entry {entry!r}. Write name=id, or the id alone.")
        if name in adapters:
            raise ValueError(f"Two adapters are called {name}. Name them: ADAPTERS=first=org/a,second=org/b.")
        adapters[name] = source
    return base, adapters


def configured_settings() -> Settings:
    """What the page's fields and the API start with, with the longest answer that visitors may ask for.

    Raises:
        ValueError: if a variable is no number, or out of range.
    """
    defaults = {"max_new_tokens": 1024, "temperature": 0, "top_p": 1, "seed": 0}
    return settings_of(**{name: os.environ.get(name.upper()) or value for name, value in defaults.items()})
