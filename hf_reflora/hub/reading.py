"""What is read from the Hub: texts of a repository, the license of a base model, whether a model is there."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..report.front_matter import LICENSE_ENTRIES, OwnEntries
from ..report.licenses import is_license
from .retry import FAILURES, PushError, call_hub


if TYPE_CHECKING:
    from .repository import Repo


def read_text(repo: "Repo", path: str) -> str | None:
    """The text file `path` of the repository, None if it has no such file; of a branch to be made, main's."""
    if not repo.exists:
        return None

    def attempt(revision: str | None = repo.revision) -> str | None:
        # Not into the cache: where the Hub cannot be reached, hf_hub_download returns an old copy from there.
        with tempfile.TemporaryDirectory() as folder:
            try:
                file = repo.api.hf_hub_download(repo.id, path, revision=revision, local_dir=folder)
            except RemoteEntryNotFoundError:
                return None
            except RevisionNotFoundError:
                if revision is None:
                    raise
                return attempt(None)
            return Path(file).read_text(encoding="utf-8")

    return call_hub(attempt, f"Reading {path} of {repo.id}", repo.user)


def license_of(repo: "Repo", model_id: str) -> OwnEntries:
    """The license in the card of a model on the Hub, of another kind with its name and link; empty if it names none.

    Empty also if the model cannot be reached.
    """
    try:
        data = repo.api.model_info(model_id).card_data
    except FAILURES:
        return OwnEntries()
    entries = data.to_dict() if data else {}
    if not is_license(entries.get("license")):
        return OwnEntries()
    more = {name: entries[name] for name in LICENSE_ENTRIES if entries.get(name)}
    if "license_link" in more and "://" not in more["license_link"]:  # a file in the base model's repository
        more["license_link"] = f"{constants.ENDPOINT}/{model_id}/blob/main/{more['license_link'].removeprefix('./')}"
    return OwnEntries(license=entries["license"], more=more)


def is_there(repo: "Repo", name: str, kind: str) -> bool:
    """Whether the Hub has a "model" or "dataset" of this id that the user can see; True if it cannot be reached."""
    try:
        repo.api.repo_info(name, repo_type=kind)
    except GatedRepoError:
        return True
    except RepositoryNotFoundError:
        return False
    except FAILURES:
        return True
    return True


def is_public(model_id: str, token: str | None) -> bool:
    """Whether everybody can download the model: it is neither private nor gated.

    Raises:
        PushError: the token's owner does not see such a model, or the Hub cannot be reached.
    """

    def attempt() -> bool:
        try:
            info = HfApi(token=token).model_info(model_id)
        except RepositoryNotFoundError:
            raise PushError(
                f"There is no model {model_id} on the Hub that you can see. Check its name, or log in with a token "
                "that may read it."
            ) from None
        return not info.private and not info.gated

    return call_hub(attempt, f"Looking for {model_id}")
