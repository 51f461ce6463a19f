"""What went wrong between moec and the Hugging Face hub, in one sentence with a remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from moec.errors import MoecError, SetupError
from moec.files.os_errors import reason
from moec.spelling import did_you_mean_file


class HubDown(SetupError):
    """The hub cannot be reached, or does not answer as one."""


@contextmanager
def explained(text: str, revision: str | None, downloads: bool = False) -> Iterator[None]:
    """Raises SetupError for all that huggingface_hub raises about the id `text`; `downloads` where
    files were on their way."""
    try:
        yield
    except MoecError:
        raise
    except Exception as error:
        kind = HubDown if _is_down(error) else SetupError
        raise kind(_explanation(text, revision, downloads, error)) from error


def _is_down(error: Exception) -> bool:
    from huggingface_hub import errors, get_session

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500
    client = import_module(type(get_session()).__module__)  # httpx or httpx2, by the version
    return isinstance(error, client.TransportError)


def _explanation(text: str, revision: str | None, downloads: bool, error: Exception) -> str:
    from huggingface_hub import constants, errors

    server = constants.ENDPOINT
    page = f"{server}/{text.partition(':')[0]}"
    match error:
        case errors.GatedRepoError():
            return (
                f"{text} is gated: accept its terms at {page}, then log in (hf auth login) or set "
                "HF_TOKEN, and run the same command again"
            )
        case errors.RepositoryNotFoundError():
            near = did_you_mean_file(Path(text))
            return (
                f"{text} exists neither here nor at {server}{near}; if the model is private, log "
                "in (hf auth login) or set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return (
                f"{text} has no revision {revision!r}: give a branch, a tag or a commit of "
                f"{page}/commits"
            )
        case errors.RemoteEntryNotFoundError():
            return f"{text}: a file is gone from {page}: give another revision"
        case errors.HFValidationError():
            return f"{text} does not exist, and cannot be the id of a model of the hub"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            if status in (401, 403):
                return f"{server} refuses the token for {text}: log in again (hf auth login)"
            return f"{server} answers {status} for {text}: run the same command again later"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            return f"{text} cannot be written to {constants.HF_HUB_CACHE}: {reason(error)}"
    cause = error.__cause__ or error  # where files are looked up, it has the reason
    words = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    if not downloads:
        return (
            f"{text} does not exist here, and {server} cannot be reached ({words}): check the "
            "network, or set HF_HUB_OFFLINE=1 to use what the hub's cache has"
        )
    return (
        f"the download of {text} ended early ({words}): run the same command again, which resumes "
        "with the files that are missing"
    )
