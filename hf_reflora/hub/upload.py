"""What goes to the Hub and what is read from it: one commit of a folder, texts, licenses.

A commit is tried again like every other call (`retry.call_hub`), and a commit whose answer was lost may have landed.
So each commit names its parent, which makes the Hub refuse it a second time, and each further attempt first compares
the files with what the Hub has by then: it ends without a commit if everything is there.
"""

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session

from ..report.front_matter import LICENSE_ENTRIES, OwnEntries
from ..report.licenses import is_license
from .repository import Repo
from .retry import FAILURES, PushError, call_hub


def upload(repo: Repo, folder: Path, message: str) -> CommitInfo:
    """Commits all files of `folder` that the Hub does not have yet, in one commit, or none if it has them all.

    A pull request of the same user and title that is still open is continued.

    Raises:
        PushError: in one sentence, why it was not committed.
    """
    revision = _pull_request(repo, message) if repo.create_pr else repo.revision
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def attempt() -> CommitInfo:
        # Made again in each attempt: the branch may have a new head by then, and a CommitOperationAdd remembers
        # whether it was committed and refuses to be used again.
        head = repo.api.repo_info(repo.id, repo_type=repo.type, revision=revision).sha
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        return repo.api.create_commit(
            repo.id,
            operations,
            commit_message=message,
            repo_type=repo.type,
            revision=revision,
            parent_commit=head,
        )

    commit = call_hub(attempt, f"Pushing to {repo.id}", repo.user)
    if repo.create_pr:
        number = int(revision.rsplit("/", 1)[1])
        call_hub(lambda: _publish_draft(repo, number), f"Opening pull request {number} of {repo.id}", repo.user)
        commit.pr_url = f"{constants.ENDPOINT}/{repo.id}/discussions/{number}"
        commit.__post_init__()  # derives pr_revision and pr_num from the address
    return commit


def _pull_request(repo: Repo, title: str) -> str:
    """The ref of the pull request to commit to: the user's open one of this title, or a new one.

    huggingface_hub opens a pull request together with its commit, so that an attempt after a lost answer would open a
    second one.
    """

    def attempt() -> int:
        for pull in repo.api.get_repo_discussions(repo.id, author=repo.user, discussion_type="pull_request"):
            if pull.title == title and pull.author == repo.user and pull.status in ("draft", "open"):
                return pull.num
        return repo.api.create_pull_request(repo.id, title).num

    return f"refs/pr/{call_hub(attempt, f'Opening a pull request on {repo.id}', repo.user)}"


def _publish_draft(repo: Repo, number: int) -> None:
    """Opens a pull request that `create_pull_request` has made as a draft."""
    if repo.api.get_discussion_details(repo.id, number).status == "draft":
        repo.api.change_discussion_status(repo.id, number, "open")


def check_card(repo: Repo, text: str) -> None:
    """Asks the Hub what it has against a card, as every commit with one does.

    Raises:
        PushError: with the Hub's words, or if it cannot be reached.
    """

    def attempt() -> None:
        answer = get_session().post(
            f"{repo.api.endpoint}/api/validate-yaml",
            json={"repoType": repo.type, "content": text},
            headers=build_hf_headers(token=repo.api.token),
        )
        if answer.status_code == 400:
            errors = answer.json().get("errors") or [{"message": answer.text}]
            raise PushError(f"The Hub refuses the card: {'; '.join(error['message'] for error in errors)}.")

    call_hub(attempt, f"Checking the card of {repo.id}", repo.user)


def read_text(repo: Repo, path: str) -> str | None:
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


def license_of(repo: Repo, model_id: str) -> OwnEntries:
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


def is_there(repo: Repo, name: str, kind: str) -> bool:
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
