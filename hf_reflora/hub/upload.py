"""What goes to the Hub: one commit of a folder, and before it the card, which the Hub checks.

A commit is tried again like every other call (`retry.call_hub`), and a commit whose answer was lost may have landed.
So each commit names its parent, which makes the Hub refuse it a second time, and each further attempt first compares
the files with what the Hub has by then: it ends without a commit if everything is there.
"""

from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, constants
from huggingface_hub.utils import build_hf_headers, get_session

from .repository import Repo
from .retry import PushError, call_hub


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
