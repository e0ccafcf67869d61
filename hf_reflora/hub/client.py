"""Uploads that arrive: every call to the Hub that publishing makes, tried again until it is known to be done.

huggingface_hub does not retry the creation of a repository nor a commit, and cannot tell a commit that failed from
one whose answer was lost. Here a commit names its parent, so that it can land once only, and each further attempt
first compares the files with what the Hub has by then.
"""

import functools
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id


T = TypeVar("T")

# huggingface_hub 1.x is built on httpx and 2.x on httpx2, which has the same names. What it raises are exceptions of
# the library that it uses, so take that one; its HfHubHTTPError derives from the library's HTTPError.
httpx: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]

DELAYS = (1, 2, 4, 8, 16)  # seconds before each further attempt
LONGEST_DELAY = 60  # of what the Hub asks for by Retry-After
TIMEOUT = httpx.Timeout(300, connect=10)  # huggingface_hub's own is none
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
CONFLICT = "another conflicting operation is in progress"
TOKENS = "https://huggingface.co/settings/tokens"
FAILURES = (OSError, httpx.HTTPError, RuntimeError, ValueError)  # what huggingface_hub and hf_xet raise


class PushError(RuntimeError):
    """Something was not published; the message says what, why and how to finish."""


@dataclass(frozen=True)
class Repo:
    """A repository that may be written to: its id with the namespace, who writes, and to which branch.

    `create_pr`: commits go to a pull request on it instead.
    """

    id: str
    user: str
    api: HfApi = field(repr=False)  # has the token
    revision: str
    create_pr: bool
    type: str = "model"


def prepare(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    other_base: bool = False,
) -> Repo:
    """Makes sure that an adapter can be pushed: token, name, permission, what is there; creates what is not.

    Args:
        repo_id: Name of the repository, "name" or "owner/name".
        token: Default: the one of `hf auth login` or HF_TOKEN.
        private: Whether a new repository is private. Default: the owner's setting.
        revision: Branch, created if need be. Default: main.
        create_pr: Only see that a pull request can be opened.
        base_model: The adapter's base model on the Hub, if it is known.
        other_base: Accept a repository that holds an adapter of another base model, or a whole model.

    Raises:
        PushError: in one sentence, why not.
    """
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise PushError(f"A pull request goes to main; leave out the revision {revision!r}.")
    repo, info, me = _open(repo_id, "model", token, revision, create_pr)
    if info is None and create_pr:
        raise PushError(f"{repo.id} does not exist or is not visible to {repo.user}: nothing to propose to.")
    if not create_pr:
        _check_writable(repo, info, me, private)
    if info is None:
        create = functools.partial(repo.api.create_repo, repo.id, private=private, exist_ok=True)
        _persist(create, f"Creating {repo.id}", repo.user)
    elif not other_base:
        _check_base(repo, info, base_model)
    if repo.revision != constants.DEFAULT_REVISION and not create_pr and not repo.revision.startswith("refs/"):
        branch = functools.partial(repo.api.create_branch, repo.id, branch=repo.revision, exist_ok=True)
        _persist(branch, f"Creating the branch {repo.revision} of {repo.id}", repo.user)
    return repo


def prepare_space(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    hardware: str | None = None,
    variables: dict[str, str] | None = None,
    secrets: dict[str, str] | None = None,
) -> Repo:
    """Makes sure that a Gradio Space can be pushed, creates it if there is none, and sets what is given.

    Args:
        repo_id, token, private: As in `prepare`.
        hardware: Such as "cpu-basic" or "zero-a10g". Default: as it is; of a new Space the Hub's, the free one.
        variables: Environment variables that everybody can read.
        secrets: Those that nobody can read but the Space.

    Raises:
        PushError: in one sentence, why not.
    """
    repo, info, me = _open(repo_id, "space", token, None, False)
    _check_writable(repo, info, me, private)
    if info is None:
        create = functools.partial(
            repo.api.create_repo, repo.id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        )
        _persist(create, f"Creating the Space {repo.id}", repo.user)
    elif info.sdk != "gradio":
        raise PushError(f"The Space {repo.id} is one of {info.sdk}, not of gradio. Choose another name.")
    settings = [(repo.api.add_space_variable, key, value) for key, value in (variables or {}).items()]
    settings += [(repo.api.add_space_secret, key, value) for key, value in (secrets or {}).items()]
    for add, key, value in settings:
        _persist(functools.partial(add, repo.id, key, value), f"Setting {key} of {repo.id}", repo.user)
    if hardware is not None:
        ask = functools.partial(repo.api.request_space_hardware, repo.id, hardware)
        _persist(ask, f"Asking for {hardware} for {repo.id}", repo.user)
    return repo


def upload(repo: Repo, folder: Path, message: str) -> CommitInfo:
    """Commits all files of `folder` that the Hub does not have yet, in one commit, or none if it has them all.

    A pull request of the same user and title that is still open is continued.

    Raises:
        PushError: in one sentence, why not.
    """
    revision = _pull_request(repo, message) if repo.create_pr else repo.revision
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def attempt() -> CommitInfo:
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

    commit = _persist(attempt, f"Pushing to {repo.id}", repo.user)
    if repo.create_pr:
        number = int(revision.rsplit("/", 1)[1])
        _persist(lambda: _publish_draft(repo, number), f"Opening pull request {number} of {repo.id}", repo.user)
        commit.pr_url = f"{constants.ENDPOINT}/{repo.id}/discussions/{number}"
        commit.__post_init__()
    return commit


def read_text(repo: Repo, path: str) -> str | None:
    """A text file of the repository as it is on the Hub, None if there is none."""

    def attempt() -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                file = repo.api.hf_hub_download(repo.id, path, revision=repo.revision, local_dir=folder)
            except RemoteEntryNotFoundError:
                return None
            return Path(file).read_text(encoding="utf-8")

    return _persist(attempt, f"Reading {path} of {repo.id}", repo.user)


def license_of(repo: Repo, model_id: str) -> str | None:
    """The license that a model on the Hub states, None if it cannot be found out."""
    try:
        data = repo.api.model_info(model_id).card_data
    except FAILURES:
        return None
    return data.license if data and isinstance(data.license, str) else None


def is_public(model_id: str) -> bool:
    """Whether everybody can download it: it is there, neither private nor gated."""

    def attempt() -> bool:
        try:
            info = HfApi(token=False).model_info(model_id)
        except RepositoryNotFoundError:
            return False
        return not info.private and not info.gated

    return _persist(attempt, f"Looking for {model_id}")


def _open(
    repo_id: str, kind: str, token: str | None, revision: str | None, create_pr: bool
) -> tuple[Repo, Any, dict[str, Any]]:
    """The repository, what the Hub says of it (None: nothing), and what it says of the user."""
    token = token or get_token()
    if constants.is_offline_mode():
        raise PushError("Nothing can be pushed while HF_HUB_OFFLINE is set. Unset it.")
    if token is None:
        raise PushError(
            "No Hugging Face token was found. Log in with `hf auth login`, or set HF_TOKEN to a token with write "
            f"permission ({TOKENS})."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} cannot be the name of a repository: {error}") from None
    api = HfApi(token=token)
    me = _persist(api.whoami, "Asking who the token belongs to")
    user = me["name"]
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(
            f"The token of {user} may only read. Make one with write permission at {TOKENS} and log in with it "
            "(`hf auth login`, or HF_TOKEN)."
        )
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    repo = Repo(repo_id, user, api, revision or constants.DEFAULT_REVISION, create_pr, kind)
    return repo, _existing(repo), me


def _check_writable(repo: Repo, info: Any, me: dict[str, Any], private: bool | None) -> None:
    _check_namespace(repo, me)
    if info is None:
        return
    if private and not info.private:
        raise PushError(
            f"{repo.id} exists and is public. Make it private in its settings on the Hub, push to another name, "
            "or leave out private."
        )
    _check_write(repo)


def _existing(repo: Repo) -> Any:
    """What the Hub says of the repository, None if there is none that the user can see."""

    def attempt() -> Any:
        try:
            return repo.api.repo_info(repo.id, repo_type=repo.type)
        except RepositoryNotFoundError:
            return None

    return _persist(attempt, f"Looking for {repo.id}", repo.user)


def _check_namespace(repo: Repo, me: dict[str, Any]) -> None:
    namespace, name = repo.id.split("/")
    organizations = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if namespace == repo.user:
        return
    if namespace not in organizations:
        member = f"a member of {', '.join(organizations)}" if organizations else "a member of no organisation"
        raise PushError(
            f"{repo.user} cannot push to {repo.id}: there is no organisation {namespace} that {repo.user} belongs to "
            f"({repo.user} is {member}). Push to {repo.user}/{name}, or propose a pull request."
        )
    if organizations[namespace] == "read":
        raise PushError(
            f"{repo.user} may only read in the organisation {namespace}. Ask its admins for the role of a "
            f"contributor, push to {repo.user}/{name}, or propose a pull request."
        )


def _check_write(repo: Repo) -> None:
    def attempt() -> None:
        try:
            repo.api.auth_check(repo.id, repo_type=repo.type, write=True)
        except RepositoryNotFoundError:
            return  # a server without this call; the commit will tell

    _persist(attempt, f"Asking for permission to write to {repo.id}", repo.user)


def _check_base(repo: Repo, info: Any, base_model: str | None) -> None:
    names = {file.rfilename for file in info.siblings or []}
    if "config.json" in names and "adapter_config.json" not in names:
        raise PushError(
            f"{repo.id} holds a whole model, not an adapter. Push to another name, or allow it with other_base "
            "(--other-base)."
        )
    theirs = getattr(info.card_data, "base_model", None) if info.card_data else None
    if base_model and isinstance(theirs, str) and theirs != base_model:
        raise PushError(
            f"{repo.id} holds an adapter of {theirs}, this one is of {base_model}. Push to another name, or allow it "
            "with other_base (--other-base)."
        )


def _pull_request(repo: Repo, title: str) -> str:
    """The ref of the pull request to commit to: the user's open one of this title, or a new one."""

    def attempt() -> int:
        for found in repo.api.get_repo_discussions(repo.id, author=repo.user, discussion_type="pull_request"):
            if found.title == title and found.author == repo.user and found.status in ("draft", "open"):
                return found.num
        return repo.api.create_pull_request(repo.id, title).num

    return f"refs/pr/{_persist(attempt, f'Opening a pull request on {repo.id}', repo.user)}"


def _publish_draft(repo: Repo, number: int) -> None:
    if repo.api.get_discussion_details(repo.id, number).status == "draft":
        repo.api.change_discussion_status(repo.id, number, "open")


def _persist(call: Callable[[], T], what: str, user: str = "the user") -> T:
    """`call` until it succeeds, fails for good, or has failed too often."""
    _bound_session()
    for delay in (*DELAYS, None):
        try:
            return call()
        except FAILURES as error:
            # "from None": the client's own messages show signed addresses.
            if not _is_transient(error) or delay is None:
                raise PushError(f"{what} failed: {_reason(error, user)}") from None
            time.sleep(max(delay, min(_retry_after(error), LONGEST_DELAY)))
    raise AssertionError("unreachable")


def _bound_session() -> None:
    """Gives huggingface_hub's HTTP client a time limit, and an end to its loop in create_repo.

    The client asks again at once and for ever while the Hub answers that another operation is in progress.
    """
    session = get_session()
    if session.timeout == httpx.Timeout(None):
        session.timeout = TIMEOUT
    hooks = session.event_hooks
    if _pause_at_conflicts not in hooks["response"]:
        hooks["response"].append(_pause_at_conflicts)
        session.event_hooks = hooks


def _pause_at_conflicts(response: Any) -> None:
    if response.status_code == 409 and response.request.url.path.endswith("/api/repos/create"):
        response.read()
        if CONFLICT in response.text:
            raise httpx.ReadError(f"The Hub answers that {CONFLICT}", request=response.request)


def _response(error: BaseException) -> Any:
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    response = _response(error)
    if response is not None:
        return response.status_code
    if type(error) is ConnectionError:  # hf_xet's: the status is only in its text
        found = re.search(r"\b([45]\d\d)\b", str(error))
        return int(found[1]) if found else None
    return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, JSONDecodeError | LocalEntryNotFoundError):
        return True  # an error page of a proxy that the client took for JSON; a download that did not reach the Hub
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def _retry_after(error: BaseException) -> float:
    response = _response(error)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.isdigit() else 0.0


def _reason(error: BaseException, user: str) -> str:
    """A sentence for a person; without addresses, which may be signed."""
    status = _status(error)
    said = error.server_message if isinstance(error, HfHubHTTPError) else str(error)
    said = re.sub(r"https?://\S+", "…", " ".join(str(said or "").split()))[:300]
    detail = f" ({said})" if said else ""
    if status in (402, 413, 507) or re.search(r"quota|storage limit|exceeded your", said, re.IGNORECASE):
        return f"the storage or plan of {user} does not allow it{detail}. Free some space or ask for more."
    if status == 401:
        return f"the token is not valid{detail}. Log in again with `hf auth login`, or set HF_TOKEN ({TOKENS})."
    if status == 403:
        return f"{user} may not do this with the token in use{detail}. Use one with write permission ({TOKENS})."
    if status == 404:
        return f"it was not found{detail}."
    if status == 429:
        return f"the Hub limits the number of requests{detail}. Try again in a while."
    if status in (409, 412):
        return f"others kept changing it at the same time{detail}. Try again."
    if status is not None and status >= 500:
        return f"the Hub answered with an error {len(DELAYS) + 1} times, the last one {status}{detail}. Try again."
    if isinstance(error, JSONDecodeError):
        return f"the Hub answered {len(DELAYS) + 1} times with something that is not JSON. Try again."
    if isinstance(error, httpx.TransportError | ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} could not be reached, or did not answer{detail}. Is there a network?"
    return f"{said or type(error).__name__}."
