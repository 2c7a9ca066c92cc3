"""A repo of the hub, and in one line what went wrong with it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lfm_mlx.errors import DownloadError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LATER = "try again later, or pass offline=True if it was downloaded before, or name a local folder"
_TOKEN = "set HF_TOKEN or pass token="


@dataclass(frozen=True, kw_only=True)
class Repo:
    """A repo at a revision, and how to ask for it.

    Args:
        id: ``org/name``.
        revision: branch, tag or commit; None is the main branch.
        token: access token; None uses the one huggingface_hub knows.
        offline: the network is not asked.
    """

    id: str
    revision: str | None
    token: str | None
    offline: bool

    @contextlib.contextmanager
    def asked(self, *, to_write: Path | None = None) -> Iterator[None]:
        """Within the block the hub is asked for something, or to take the folder `to_write`.

        Raises:
            DownloadError: instead of whatever huggingface_hub raises.
        """
        # Half a second, and a local folder does not need it.
        from huggingface_hub.errors import HfHubHTTPError

        # The base of every transport error: httpx's in huggingface_hub 1.x, httpx2's in 2.x.
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        try:
            yield
        # ValueError: an answer that is no JSON (a captive portal); RuntimeError: what hf_xet raises.
        except (OSError, http_error, RuntimeError, ValueError) as error:
            told = _explain(error, self) if to_write is None else _explain_upload(error, self, to_write)
            raise DownloadError(f"{self.id}: {told}") from error


def _explain(error: BaseException, repo: Repo) -> str:
    """What went wrong, what was expected and what to do, in one line."""
    from huggingface_hub import constants, errors  # slow, see Repo.asked

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, errors.LocalEntryNotFoundError) and not repo.offline and error.__cause__ is not None:
        return _explain(error.__cause__, repo)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"not complete in {cache}, and offline; expected an earlier download of the same revision and subfolder; "
            "run it once online (without offline=True and HF_HUB_OFFLINE=1), or name a local folder"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"no revision {repo.revision!r} (HTTP {error.response.status_code}); expected a branch, tag or commit of "
            f"{hub}/{repo.id}; leave revision out for the main branch"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repo, hub)
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or "No space left" in told:
        return f"no room in {cache} ({told}); expected room for the weights; free some, or set HF_HOME to a larger disk"
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot write the cache ({told}); expected {cache} to be writable; fix its permissions or set HF_HOME"
    if isinstance(error, errors.HfHubHTTPError.__bases__[0] | ConnectionError):
        return f"no connection to {hub} ({told}); expected the hub, or a mirror in HF_ENDPOINT; {_LATER}"
    return f"the download from {hub} broke off ({told}); expected complete files; run it again, finished files are kept"


def _explain_status(error: Exception, repo: Repo, hub: str) -> str:
    """The answers of a hub that was reached."""
    from huggingface_hub import errors  # slow, see Repo.asked

    assert isinstance(error, errors.HfHubHTTPError)
    status, page = error.response.status_code, f"{hub}/{repo.id}"
    if isinstance(error, errors.GatedRepoError):
        return f"gated (HTTP {status}); expected an account that accepted its licence; accept it at {page} and {_TOKEN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"not found at {hub}, or private (HTTP {status}), and no such folder here; expected a repo that can be "
            f"read; check the spelling; if it is private or gated, accept its licence at {page} and {_TOKEN}"
        )
    if status in (401, 403):
        return (
            f"access refused (HTTP {status}); expected a token that may read it; check the spelling, look at {page}, "
            f"then {_TOKEN}"
        )
    if status == 429:
        return f"too many requests (HTTP {status}); expected fewer; wait some minutes, or {_TOKEN} for a higher limit"
    return f"{hub} answered HTTP {status}; expected the repo's files; {_LATER}"


def _explain_upload(error: BaseException, repo: Repo, folder: Path) -> str:
    """What went wrong while `folder` was uploaded."""
    from huggingface_hub import constants, errors  # slow, see Repo.asked

    hub = constants.ENDPOINT
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    again = f"{folder} is complete and stays; upload it again with python -m lfm_mlx.convert upload {folder} {repo.id}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return (
                f"not uploaded: {hub} refused it (HTTP {status}); expected a token that may write to {repo.id}: set "
                f"HF_TOKEN; {again}"
            )
        return f"not uploaded: {hub} answered HTTP {status}; {again}"
    if isinstance(error, errors.HfHubHTTPError.__bases__[0] | ConnectionError):
        return f"not uploaded: the connection to {hub} failed ({told}); {again}"
    return f"not uploaded: {told}; {again}"
