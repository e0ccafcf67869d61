"""The files that belong to an adapter, by name: what is published, and what goes along when an adapter is exported.

Names, not kinds of files: a trainer's folder also has scripts' results, logs and notes, which nobody meant to publish.
"""

import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError


TEMPLATES = "additional_chat_templates"
# What tokenizers and processors save, and the code of those that have their own.
TOKENIZER = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *("chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "tokenizer.model.v*", "*.tiktoken"),
    *("*.spm", "tekken.json", "tokenization_*.py", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "processing_*.py", "image_processing_*.py", "generation_config.json"),
)
# Licenses, to which `license_link` of a card points.
LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
DESCRIPTION = ("README.md", "run_record.json", "training.png")
LINKED = re.compile(r"""[("']((?!https?:|/)[\w./-]+\.(?:png|svg|jpg|jpeg|gif|webp))[)"' ]""")


def is_companion(name: str) -> bool:
    """Whether a file of this name goes along with an adapter wherever it goes: of the tokenizer, or a license."""
    return _matches(name, (*TOKENIZER, *LICENSE_FILES))


def published_names(folder: Path) -> list[str]:
    """The files in an adapter's folder that are published, relative to it and sorted.

    Those are the adapter's own, its description, its companions, and the pictures in the folder that the card shows;
    the same for further adapters, which PEFT saves in folders inside.
    """
    inner = [path.parent for path in sorted(folder.glob("*/adapter_config.json"))]
    inner = [path for path in inner if not path.name.startswith((".", "_", "checkpoint-"))]
    card = folder / "README.md"
    pictures = set(LINKED.findall(card.read_text(encoding="utf-8", errors="replace"))) if card.is_file() else set()
    paths = [folder / name for name in pictures]
    for place in (folder, *inner):
        files = [path for path in place.iterdir() if _matches(path.name, (*ADAPTER, *DESCRIPTION))]
        paths += [*files, *companions(place)]
    inside = [path for path in paths if path.is_file() and ".." not in path.relative_to(folder).parts]
    return sorted({path.relative_to(folder).as_posix() for path in inside})


def download(repo_id: str) -> Path:
    """The folder with an adapter on the Hub and its companions, in the Hub's cache.

    Raises:
        ValueError: `repo_id` cannot be an id on the Hub.
    """
    patterns = [*ADAPTER, *TOKENIZER, *LICENSE_FILES, f"{TEMPLATES}/*"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(
            f"adapter_config.json was looked for in {repo_id}, which is neither a folder nor an id on the Hub."
        ) from error


def companions(folder: Path) -> list[Path]:
    """The companions of an adapter in its folder, see `is_companion`."""
    found = [path for path in folder.iterdir() if path.is_file() and is_companion(path.name)]
    return sorted([*found, *(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())])


def copy_companions(folder: Path, target: Path) -> None:
    """Copies the companions in `folder` to `target`."""
    for path in companions(folder):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.startswith((".", "_")) and any(fnmatchcase(name, pattern) for pattern in patterns)
