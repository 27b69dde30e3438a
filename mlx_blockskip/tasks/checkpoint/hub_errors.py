"""What the Hub refuses and why, as one sentence with the way out. No token is ever part of it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from mlx_blockskip.engine.errors import UserError

HUB = "https://huggingface.co"
LOGIN = "run `hf auth login`"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
ABOUT_TOKEN = re.compile(r"token|credential|expired", re.I)


class UnreachableError(UserError):
    """The Hub gave no answer; what is here already may do."""


@contextmanager
def speaking(repo: str, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn the Hub's errors into UserError, its UnreachableError where what is here already may do. writing: to it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # the HTTP library's own errors: which library that is differs by version of huggingface_hub
    network: tuple[type[Exception], ...] = (OSError, *(b for b in HfHubHTTPError.__bases__ if issubclass(b, Exception)))
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo}: no such directory here, and not a repo id ({error}); check the name") from error
    except HfHubHTTPError as error:
        raise refusal(error, repo, revision, writing) from error
    except network as error:
        if getattr(error, "errno", None) in FULL:
            raise UserError(f"{repo}: cannot be stored ({reason(error)}); set HF_HOME to another disk") from error
        raise UnreachableError(
            f"{repo}: the Hub could not be reached ({reason(error)}); try again when online"
        ) from error


def refusal(error: Any, repo: str, revision: str | None = None, writing: bool = False) -> UserError:
    """The sentence for an HfHubHTTPError."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    url, why = f"{HUB}/{repo}", reason(error)
    status = getattr(error.response, "status_code", None)
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo}: is gated ({why}); accept its licence at {url}, then {LOGIN}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{repo}: has no revision {revision or 'main'}; see {url}/tree/main")
    if status == HTTPStatus.UNAUTHORIZED and ABOUT_TOKEN.search(getattr(error, "server_message", None) or ""):
        return UserError(
            f"{repo}: the Hub does not take your token ({why}); {LOGIN} with a new one, and unset HF_TOKEN if it is set"
        )
    if writing and status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
        return UserError(f"{repo}: the Hub does not let you write there ({why}); {LOGIN} with a token that may")
    if isinstance(error, RepositoryNotFoundError) or status == HTTPStatus.UNAUTHORIZED:
        return UserError(
            f"{repo}: no such directory here, and no such repo on the Hub ({why}); "
            f"check the name, and for a private repo {LOGIN}"
        )
    if status == HTTPStatus.FORBIDDEN:
        return UserError(f"{repo}: the Hub refuses this ({why}); {LOGIN} with a token that is allowed to")
    if status == HTTPStatus.NOT_FOUND:
        return UserError(f"{repo}: a file is not there ({why}); see {url}/tree/{revision or 'main'}")
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return UnreachableError(f"{repo}: the Hub is asked too often ({why}); try again {_when(error)}, or {LOGIN}")
    if status is not None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return UnreachableError(
            f"{repo}: the Hub could not be reached: it has trouble of its own ({status} {why}); "
            f"try again {_when(error)}"
        )
    return UnreachableError(f"{repo}: the Hub could not be reached ({why}); try again when online")


def _when(error: Any) -> str:
    """When the server wants to be asked again."""
    after = error.response.headers.get("Retry-After", "")
    return f"in {after} s" if after.isdecimal() else "later"


def reason(error: BaseException) -> str:
    """What the server said, else what the error says, in one line."""
    return without_tokens(" ".join(str(getattr(error, "server_message", None) or error).split()))[:200]


def without_tokens(text: str) -> str:
    """The text with every token of the Hub's made unreadable: those of its form, and the user's own."""
    from huggingface_hub import get_token

    try:
        own = get_token()
    except Exception:  # whatever is wrong with the token, it is not what is reported here
        own = None
    text = text.replace(own, "hf_***") if own else text
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_***", text)
