"""Makes and pushes the Space that shows an adapter beside its base model."""

import os
import runpy
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, constants, get_token, hf_hub_download
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..report.ids import is_hub_id
from ..report.licenses import check_license
from .reading import is_public
from .repository import check_space, make_space
from .retry import FAILURES, PushError, call_hub
from .scan import check_files
from .upload import check_card, upload


# Where the Space's files are: pyproject.toml puts them into an installed package; a clone has them in spaces/.
INSTALLED = Path(__file__).parents[1] / "before_after"
SOURCE = Path(__file__).parents[2] / "spaces" / "before_after"
FILES = (
    *("README.md", "requirements.txt", "app.py", "events.py", "layout.py", "comparison.py", "differences.py"),
    *("startup.py", "configuration.py", "results.py", "engine.py", "decoding.py", "shared_model.py", "chat.py"),
    *("loading.py", "adapter_check.py", "zero_gpu.py"),
)
ZERO_GPU_TORCH = "torch>=2.8,<2.12"  # the versions that ZeroGPU has


# The memory for the model of the Hub's hardware, in GB, by its documentation: of the GPU where there is one.
MEMORY_GB = {
    **{"cpu-basic": 16, "cpu-upgrade": 32, "t4-small": 16, "t4-medium": 16, "l4x1": 24, "l40sx1": 48},
    **{"a10g-small": 24, "a10g-large": 24, "a100-large": 80, "zero-a10g": 48},
}


@dataclass(frozen=True)
class Deployed:
    """Where the Space is, and what a person should know."""

    url: str
    repo_id: str
    warnings: list[str]


def deploy_space(
    repo_id: str,
    *,
    base: str,
    adapters: list[str],
    token: str | None = None,
    private: bool | None = None,
    hardware: str | None = None,
    license: str = "apache-2.0",
    secrets: dict[str, str] | None = None,
) -> Deployed:
    """Creates or updates the Space that compares `base` with `adapters`, in one commit.

    Args:
        repo_id: Name of the Space, "name" or "owner/name".
        base: Id of the base model on the Hub.
        adapters: Ids of ordinary LoRA adapters of it on the Hub; the first one is chosen at the start.
        token, private, hardware, secrets: See `hf_reflora.hub.repository`. If the base or an adapter is
            private or gated, the Space gets the token as its secret HF_TOKEN, unless `secrets` has one.
        license: Of the Space's own code and card.

    Raises:
        PushError: with the reason, if it could not be pushed, a model is not on the Hub, or the Hub refuses the card,
            as it does for an unknown license.
        ValueError: a name that is no id on the Hub, or an adapter that the page cannot show.

    Nothing is made if the models, the card or, for a new Space, the hardware are refused.
    """
    for what, name in [("base", base), *(("adapter", adapter) for adapter in adapters)]:
        if not is_hub_id(name):
            raise ValueError(f"{what} must be an id on the Hub such as org/model, got {name!r}. Push it there first.")
    if not adapters:
        raise ValueError("Give at least one adapter.")
    check_license(license)
    secrets, warnings = dict(secrets or {}), []
    token = token or get_token()
    closed = [name for name in (base, *adapters) if not is_public(name, token)]
    for adapter in adapters:
        if trained_from := _check_adapter(adapter, base, token):
            warnings.append(f"{adapter} was trained from {trained_from}, not from {base}; the page says so, too.")
    if token and closed and "HF_TOKEN" not in secrets:
        secrets["HF_TOKEN"] = token
        warnings.append(
            f"Not everybody can read {', '.join(closed)}, so the Space got your token as its secret HF_TOKEN; who "
            "sees the Space sees their answers. A token that may only read is safer: --secret HF_TOKEN=VARIABLE."
        )
    warnings += _memory_warnings(base, hardware or "cpu-basic", token)
    with tempfile.TemporaryDirectory(prefix="hf_reflora-") as temporary:
        folder = Path(temporary) / "space"
        zero_gpu = hardware is not None and hardware.startswith("zero")
        fill(folder, base=base, adapters=adapters, license=license, zero_gpu=zero_gpu)
        given = {f"the value of the secret {name}": value for name, value in secrets.items()}
        check_files(folder, [folder / name for name in FILES], given)
        names = [adapter.rpartition("/")[2] for adapter in adapters]
        # Two adapters of one name (a/tool-calls, b/tool-calls) would have one entry in the page's list: use the ids.
        listed = [
            f"{adapter}={adapter}" if names.count(name) > 1 else adapter
            for adapter, name in zip(adapters, names, strict=True)
        ]
        variables = {"BASE_MODEL": base, "ADAPTERS": ",".join(listed)}
        repo = check_space(repo_id, token=token, private=private)
        check_card(repo, (folder / "README.md").read_text(encoding="utf-8"))
        repo = make_space(repo, hardware=hardware, variables=variables, secrets=secrets)
        upload(repo, folder, "Before and after the fine-tune")
    return Deployed(f"{constants.ENDPOINT}/spaces/{repo.id}", repo.id, warnings)


def _check_adapter(adapter: str, base: str, token: str | None) -> str | None:
    """The name of the model that the adapter was trained from, if it is not `base`'s.

    Raises:
        ValueError: the page could not show the adapter, by the page's own check.
    """
    # The page runs without this package, so the check is among its files.
    page = runpy.run_path(str(_source() / "adapter_check.py"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            call_hub(
                lambda: hf_hub_download(adapter, CONFIG_NAME, token=token, local_dir=folder),
                f"Reading {CONFIG_NAME} of {adapter}",
            )
        except PushError as error:
            raise PushError(f"{error} Is {adapter} an adapter?") from None
        config = page["read_config"](adapter, adapter, folder)
        page["check_adapter"](adapter, adapter, config)

    def has_weights() -> bool:
        files = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        return any(HfApi(token=token).file_exists(adapter, name) for name in files)

    if not call_hub(has_weights, f"Looking for the weights of {adapter}"):
        raise ValueError(
            f"{adapter} has an {CONFIG_NAME}, but no weights ({SAFETENSORS_WEIGHTS_NAME}). Push them first."
        )
    return page["trained_elsewhere"](base, config)


def _memory_warnings(base: str, hardware: str, token: str | None) -> list[str]:
    """A sentence if the base model is too large for the hardware in the page's dtype; none if that cannot be told."""
    try:
        metadata = HfApi(token=token).get_safetensors_metadata(base)
    # It has no safetensors, or ones that cannot be read, or the Hub cannot be asked.
    except (*FAILURES, NotASafetensorsRepoError, SafetensorsParsingError):
        return []
    counts = metadata.parameter_count
    on_cpu = hardware.startswith("cpu")
    # On a CPU the page computes in float32, on a GPU in the dtype of the files.
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    gigabytes = sum(count * (4 if on_cpu else size.get(dtype, 1)) for dtype, count in counts.items()) / 1e9
    memory = MEMORY_GB.get(hardware)
    if memory is None or gigabytes < 0.9 * memory:
        return []
    smaller = " A variable DTYPE=bfloat16 of the Space halves it." if on_cpu else ""
    return [f"{base} takes {gigabytes:.1f} GB and {hardware} has {memory} GB: the Space will not start.{smaller}"]


def _source() -> Path:
    return INSTALLED if INSTALLED.is_dir() else SOURCE


def fill(
    folder: str | os.PathLike, *, base: str, adapters: list[str], license: str = "apache-2.0", zero_gpu: bool = False
) -> None:
    """Writes the Space's files into the new folder, with the models and the license in its front matter.

    `zero_gpu` limits torch to what ZeroGPU has.
    """
    folder = Path(folder)
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(_source() / name, folder / name)
    card = SpaceCard.load(folder / "README.md")
    card.data.models = [base, *adapters]
    card.data.license = license
    card.save(folder / "README.md")
    if zero_gpu:
        requirements = folder / "requirements.txt"
        lines = requirements.read_text(encoding="utf-8").splitlines()
        lines = [ZERO_GPU_TORCH if line.startswith("torch") else line for line in lines]
        requirements.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
