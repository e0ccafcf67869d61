"""Calls to the Hub that are tried again until they succeed, or fail with a sentence that a person understands.

`huggingface_hub` retries some of its requests, but neither the creation of a repository nor a commit, which are the
two that publishing stands on. Every call of this package goes through `call_hub`.
"""

import re
import sys
import time
from collections.abc import Callable
from json import JSONDecodeError
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, logging, parse_ratelimit_headers


T = TypeVar("T")
logger = logging.get_logger(__name__)

# huggingface_hub 1.x is built on httpx and 2.x on httpx2, which has the same names. What it raises are exceptions of
# the library that it uses, so take that one; its HfHubHTTPError derives from the library's HTTPError.
httpx: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]

DELAYS = (1, 2, 4, 8, 16)  # seconds before each further attempt
LONGEST_DELAY = 310  # seconds; the Hub counts requests in windows of 300 s
ANNOUNCED_DELAY = 20  # seconds; the user is told of a longer wait
TIMEOUT = httpx.Timeout(300, connect=10)  # seconds; huggingface_hub itself sets no limit
# Statuses after which the same request may succeed. 409 and 412: somebody else committed in between, and the next
# attempt starts from the new head of the branch.
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
CONFLICT = "another conflicting operation is in progress"
TOKENS = "https://huggingface.co/settings/tokens"
# What huggingface_hub and hf_xet raise. The last three come from answers of another form than the client expects.
FAILURES = (OSError, httpx.HTTPError, RuntimeError, ValueError, KeyError, AttributeError, TypeError)


class PushError(RuntimeError):
    """Something was not published; the message says what, why and how to finish it."""


def call_hub(call: Callable[[], T], what: str, user: str = "the user") -> T:
    """Makes `call` until it succeeds, fails in a way that no further attempt can change, or has failed too often.

    Args:
        call: One or more requests to the Hub. An attempt may follow one that did land although its answer was lost,
            so a second call must find out what is there already instead of doing it twice.
        what: The beginning of the error message, such as "Pushing to me/adapter".
        user: Who makes the request, for the error message.

    Raises:
        PushError: in one sentence, why it failed.
    """
    _limit_waiting()
    for delay in (*DELAYS, None):
        try:
            return call()
        except PushError:
            raise
        except FAILURES as error:
            if not _is_transient(error) or delay is None:
                # "from None": the client's own messages contain addresses that are signed, which are secrets.
                raise PushError(f"{what} failed: {_reason(error, user)}") from None
            seconds = max(delay, min(_asked_delay(error), LONGEST_DELAY))
            if seconds >= ANNOUNCED_DELAY:
                logger.warning(f"{what}: the Hub limits the number of requests. Trying again in {seconds:.0f} s.")
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _limit_waiting() -> None:
    """Gives huggingface_hub's HTTP client a time limit, and an end to its loop in create_repo.

    While the Hub answers that another operation is in progress, create_repo asks again at once and for ever.
    """
    session = get_session()
    if session.timeout == httpx.Timeout(None):
        session.timeout = TIMEOUT
    hooks = session.event_hooks
    if _stop_at_conflict not in hooks["response"]:
        hooks["response"].append(_stop_at_conflict)
        session.event_hooks = hooks


def _stop_at_conflict(response: Any) -> None:
    """Turns the answer that create_repo would ask again for into an error, which `call_hub` waits after."""
    if response.status_code == 409 and response.request.url.path.endswith("/api/repos/create"):
        response.read()
        if CONFLICT in response.text:
            raise httpx.ReadError(f"The Hub answers that {CONFLICT}", request=response.request)


def _response(error: BaseException | None) -> Any:
    # The upload of LFS files raises a RuntimeError from the HTTP error.
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    response = _response(error)
    if response is not None:
        return response.status_code
    if type(error) is ConnectionError:  # hf_xet raises Python's own, which has the status in its text only
        match = re.search(r"\b([45]\d\d)\b", str(error))
        return int(match[1]) if match else None
    return None


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # A proxy's error page, which the client tried to read as JSON; and a download that did not reach the Hub.
    if isinstance(error, JSONDecodeError | LocalEntryNotFoundError):
        return True
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def _asked_delay(error: BaseException) -> float:
    """The seconds that the Hub asks to wait, 0 if it does not say."""
    response = _response(error)
    if response is None:
        return 0.0
    # The Hub itself announces the end of its window in RateLimit; servers in between use Retry-After.
    limit = parse_ratelimit_headers(response.headers)
    value = response.headers.get("Retry-After", "")
    return max(
        float(value) if value.isdigit() else 0.0,
        limit.reset_in_seconds + 1.0 if limit is not None and limit.remaining == 0 else 0.0,
    )


def _reason(error: BaseException, user: str) -> str:
    """A sentence for a person; without addresses, which may be signed."""
    status = _status(error)
    answer = error.server_message if isinstance(error, HfHubHTTPError) else str(error)
    answer = re.sub(r"https?://\S+", "…", " ".join(str(answer or "").split()))[:300]
    detail = f" ({answer})" if answer else ""
    # The Hub answers 403 for a full quota, too, so the text decides before the status does.
    if status in (402, 413, 507) or re.search(r"quota|storage limit|exceeded your", answer, re.IGNORECASE):
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
    if isinstance(error, KeyError | AttributeError | TypeError):
        return f"the Hub answered in a form that huggingface_hub does not know ({type(error).__name__}: {answer})."
    if isinstance(error, JSONDecodeError):
        return f"the Hub answered {len(DELAYS) + 1} times with something that is not JSON. Try again."
    if isinstance(error, httpx.TransportError | ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} could not be reached, or did not answer{detail}. Is there a network?"
    return f"{answer or type(error).__name__}."
