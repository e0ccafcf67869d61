"""The repository to push to: whether the user may write to it, what it holds, and its creation where there is none."""

import functools
import json
from dataclasses import dataclass, field, replace
from typing import Any, cast

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import (
    HFValidationError,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)
from peft.utils import CONFIG_NAME

from .reading import read_text
from .retry import TOKENS, PushError, call_hub


@dataclass(frozen=True)
class Repo:
    """A repository on the Hub that the user may write to."""

    id: str  # with the namespace, "owner/name"
    user: str  # who writes
    api: HfApi = field(repr=False)  # not shown, because it has the token
    revision: str  # branch to commit to
    create_pr: bool  # commits go to a pull request on the branch instead
    type: str = "model"  # or "space"
    exists: bool = True
    private: bool | None = None  # whether one that does not exist yet is made private


def prepare(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    other_base: bool = False,
    create: bool = True,
) -> Repo:
    """Checks that an adapter can be pushed, and creates the repository and the branch where they do not exist.

    Token, name, permission and the present content are checked before anything is sent, so that a training does not
    end with an error that was certain when it began.

    Args:
        repo_id: Name of the repository, "name" or "owner/name".
        token: Default: the one of `hf auth login` or HF_TOKEN.
        private: Whether a new repository is private. Default: the owner's setting.
        revision: Branch. Default: main.
        create_pr: Check only that a pull request can be opened; nothing is created.
        base_model: The adapter's base model on the Hub, if it is known.
        other_base: Accept a repository that holds an adapter of another base model, or a whole model.
        create: Create what does not exist, rather than leave it to `create_missing`.

    Raises:
        PushError: in one sentence, why the user cannot push there.
    """
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise PushError(f"A pull request goes to main; leave out the revision {revision!r}.")
    repo, info, me = _open(repo_id, "model", token, revision, create_pr)
    if info is None and create_pr:
        raise PushError(f"{repo.id} does not exist or is not visible to {repo.user}: nothing to propose to.")
    if not create_pr:
        _check_writable(repo, info, me, private)
    if info is not None and not other_base:
        _check_base(repo, info, base_model)
    repo = replace(repo, exists=info is not None, private=private)
    return create_missing(repo) if create else repo


def create_missing(repo: Repo) -> Repo:
    """Creates the repository and the branch where they do not exist; for a pull request, nothing.

    Raises:
        PushError: they could not be created.
    """
    if repo.create_pr:
        return repo
    if not repo.exists:
        call_hub(lambda: _create(repo, private=repo.private), f"Creating {repo.id}", repo.user)
    if repo.revision != constants.DEFAULT_REVISION and not repo.revision.startswith("refs/"):
        branch = functools.partial(repo.api.create_branch, repo.id, branch=repo.revision, exist_ok=True)
        call_hub(branch, f"Creating the branch {repo.revision} of {repo.id}", repo.user)
    return replace(repo, exists=True)


def check_space(repo_id: str, *, token: str | None = None, private: bool | None = None) -> Repo:
    """Checks that a Gradio Space of this name can be pushed; nothing is made.

    Args:
        repo_id, token, private: As in `prepare`.

    Raises:
        PushError: in one sentence, why the user cannot push there.
    """
    repo, info, me = _open(repo_id, "space", token, None, False)
    _check_writable(repo, info, me, private)
    if info is not None and info.sdk != "gradio":
        raise PushError(f"The Space {repo.id} is one of {info.sdk}, not of gradio. Choose another name.")
    return replace(repo, exists=info is not None, private=private)


def make_space(
    repo: Repo,
    *,
    hardware: str | None = None,
    variables: dict[str, str] | None = None,
    secrets: dict[str, str] | None = None,
) -> Repo:
    """Creates the Space where there is none, and applies the given settings.

    Args:
        repo: See `check_space`.
        hardware: Such as "cpu-basic" or "zero-a10g". Default: an existing Space keeps what it has, a new one gets the
            Hub's default, which is free.
        variables: Environment variables, which everybody can read.
        secrets: Environment variables that only the Space itself can read.

    Raises:
        PushError: in one sentence, what the Hub has against it. A new Space with hardware that the Hub refuses is not
            made.
    """
    is_new = not repo.exists
    if is_new:
        # A Space that is made first, and asks for its hardware then, would stay behind if the Hub refuses that.
        create = functools.partial(_create, repo, space_sdk="gradio", space_hardware=hardware, private=repo.private)
        call_hub(create, f"Creating the Space {repo.id}", repo.user)
    settings: list[tuple[Any, str, str]] = [
        (repo.api.add_space_variable, key, value) for key, value in (variables or {}).items()
    ]
    settings += [(repo.api.add_space_secret, key, value) for key, value in (secrets or {}).items()]
    for add, key, value in settings:
        call_hub(functools.partial(add, repo.id, key, value), f"Setting {key} of {repo.id}", repo.user)
    if hardware is not None and not is_new:
        ask = functools.partial(
            repo.api.request_space_hardware, repo.id, cast(Any, hardware)
        )  # a name, also one newer than the enum
        call_hub(ask, f"Asking for {hardware} for {repo.id}", repo.user)
    return replace(repo, exists=True)


def _open(
    repo_id: str, kind: str, token: str | None, revision: str | None, create_pr: bool
) -> tuple[Repo, Any, dict[str, Any]]:
    """The repository, the Hub's description of it (None if there is none), and its description of the user."""
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

    def attempt() -> tuple[str, dict[str, Any]]:
        answer = api.whoami()
        return answer["name"], answer

    user, me = call_hub(attempt, "Asking who the token belongs to")
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


def _create(repo: Repo, **settings: Any) -> None:
    """Creates the repository, unless somebody else, or an attempt whose answer was lost, has created it by now."""
    try:
        repo.api.create_repo(repo.id, repo_type=repo.type, exist_ok=True, **settings)
    except KeyError:
        # huggingface_hub takes the address from the answer "409, it exists"; not every server puts one there.
        repo.api.repo_info(repo.id, repo_type=repo.type)


def _existing(repo: Repo) -> Any:
    """The Hub's description of the repository; None if there is none that the user can see."""

    def attempt() -> Any:
        try:
            return repo.api.repo_info(repo.id, repo_type=repo.type)
        except RepositoryNotFoundError:
            return None

    return call_hub(attempt, f"Looking for {repo.id}", repo.user)


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
            # What HfApi.auth_check(write=True) asks; huggingface_hub 1.3 has no such argument.
            address = f"{repo.api.endpoint}/api/{repo.type}s/{repo.id}/auth-check/write"
            response = get_session().get(address, headers=build_hf_headers(token=repo.api.token))
            if response.status_code == 404:
                return  # a server that does not know this request: the commit will show whether the user may write
            hf_raise_for_status(response)
        except RepositoryNotFoundError:
            return

    call_hub(attempt, f"Asking for permission to write to {repo.id}", repo.user)


def _check_base(repo: Repo, info: Any, base_model: str | None) -> None:
    """Raises if a push would overwrite a full model, or an adapter of another base model."""
    names = {file.rfilename for file in info.siblings or []}
    if "config.json" in names and CONFIG_NAME not in names:
        raise PushError(
            f"{repo.id} holds a whole model, not an adapter. Push to another name, or allow it with other_base "
            "(--other-base)."
        )
    theirs = getattr(info.card_data, "base_model", None) if info.card_data else None
    if base_model and isinstance(theirs, str) and theirs != base_model and base_model != _base_in_config(repo, names):
        raise PushError(
            f"{repo.id} holds an adapter of {theirs}, this one is of {base_model}. Push to another name, or allow it "
            "with other_base (--other-base)."
        )


def _base_in_config(repo: Repo, names: set[str]) -> str | None:
    """The base model in the repository's adapter configuration. A person may name another form of it in the card."""
    if CONFIG_NAME not in names:
        return None
    try:
        config = json.loads(read_text(repo, CONFIG_NAME) or "null")
    except ValueError:
        return None
    return config.get("base_model_name_or_path") if isinstance(config, dict) else None
