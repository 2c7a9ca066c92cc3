"""A model's name as a folder on this machine: a folder stays where it is, a repo comes from the hub.

Downloads go through huggingface_hub and its cache, so that HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as
everywhere else. A file appears in the cache only when it is complete.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lfm_mlx.errors import CheckpointError, DownloadError, OptionError

_EXPECTED = "expected a folder with config.json or a repo id such as LiquidAI/LFM2.5-8B-A1B-MLX-4bit"
_REPO_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model*.safetensors", "weights*.safetensors")
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_NOTES = ("README.md", "LICENSE*", "NOTICE*")
# The hub's `*` also matches "/", so the folders that a pattern above would reach into are named here.
_NESTED = ("model*/*", "weights*/*", "LICENSE*/*", "NOTICE*/*")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LATER = "try again later, or pass offline=True if it was downloaded before, or name a local folder"
_TOKEN = "set HF_TOKEN or pass token="


def fetch(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    offline: bool = False,
    weights: bool = True,
) -> Path:
    """The folder that holds a checkpoint, after downloading what is not there yet.

    Args:
        model: a folder, or a repo id ``org/name`` or ``org/name/subfolder``. What exists as a folder is taken as one;
            a `Path` is always local.
        revision: branch, tag or commit of the repo; None takes its main branch. Refused for a folder.
        subfolder: the folder within `model` that holds config.json; needed where there are several.
        token: access token, sent to the hub only; None uses the one huggingface_hub knows (HF_TOKEN, `hf auth login`).
        offline: never ask the network, use only what was downloaded before.
        weights: False leaves a repo's weights where they are, for those who need config and tokenizer only.

    Returns:
        The folder with config.json; a repo's lies in huggingface_hub's cache and is not to be written to.

    Raises:
        CheckpointError: nothing is found under this name, or it does not lead to exactly one config.json.
        DownloadError: the repo could not be fetched.
        OptionError: `revision` or `subfolder` does not fit `model`.
    """
    inside = None if subfolder is None else _check_subfolder(subfolder)
    folder = _local_folder(model)
    if folder is not None:
        if revision is not None:
            raise OptionError(f"revision is {revision!r}, but {folder} is a local folder; leave revision out")
        return _checkpoint_in(folder, inside, str(model))
    organisation, name, *rest = str(model).rstrip("/").split("/")
    validate_repo_id(f"{organisation}/{name}")
    named = _check_subfolder("/".join(rest)) if rest else None
    if named and inside and named != inside:
        raise OptionError(f"subfolder is {inside!r}, but {model} names {named!r}; leave one of them out")
    repo = _Repo(id=f"{organisation}/{name}", revision=revision, token=token, offline=offline)
    return _download(repo, named or inside, with_weights=weights)


def upload(folder: Path, repo_id: str, *, token: str | None = None) -> str:
    """Upload the files of `folder` to a repo of the hub, which is made if there is none.

    Args:
        folder: a finished checkpoint.
        repo_id: ``org/name``.
        token: access token; None uses the one huggingface_hub knows.

    Returns:
        The address of the commit.

    Raises:
        DownloadError: the hub refused, or was not reached.
    """
    from huggingface_hub import HfApi  # half a second
    from huggingface_hub.errors import HfHubHTTPError

    validate_repo_id(repo_id)
    repo = _Repo(id=repo_id, revision=None, token=token, offline=False)
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Conversion by lfm_mlx"))
    except (OSError, http_error, RuntimeError, ValueError) as error:
        raise DownloadError(f"{repo_id}: not uploaded: {_explain(error, repo)}") from error


def validate_repo_id(repo_id: str) -> None:
    """Check that `repo_id` has the form ``org/name`` that the hub accepts.

    Args:
        repo_id: what the user gave; whether the repo exists is not asked.

    Raises:
        CheckpointError: it has another form.
    """
    if _REPO_ID.fullmatch(repo_id) and "--" not in repo_id and ".." not in repo_id and not repo_id.endswith(".git"):
        return
    hint = "; a revision goes into revision=" if "@" in repo_id else ""
    raise CheckpointError(
        f"not found: {repo_id!r} is no folder here and no repo id; {_EXPECTED} "
        f"(letters, digits, '-', '_' and '.', without '--' and '..'){hint}"
    )


def _check_subfolder(subfolder: str) -> str:
    parts = subfolder.rstrip("/").split("/")
    if "\\" in subfolder or any(part in ("", ".", "..") for part in parts):
        raise OptionError(f"subfolder is {subfolder!r}, expected a folder below the model's own, such as '4bit'")
    return "/".join(parts)


def _local_folder(model: str | Path) -> Path | None:
    """The folder that `model` names, or None when it can only be a repo id."""
    text = str(model)
    path = Path(os.path.expanduser(text))
    # An empty name would mean the current folder, which nobody asked for.
    if text and os.path.isdir(path):
        return path
    if text and os.path.exists(path):
        raise CheckpointError(f"{text} is a file; {_EXPECTED}; name the folder that holds it: {path.parent}")
    looks_local = text.startswith((".", "/", "~")) or "\\" in text or text.endswith(_WEIGHT_SUFFIXES)
    if isinstance(model, Path) or looks_local or "/" not in text.rstrip("/"):
        raise CheckpointError(f"not found: {text!r}, {_EXPECTED}; check the spelling")
    return None


def _checkpoint_in(folder: Path, subfolder: str | None, name: str) -> Path:
    """`folder`, or the one folder below it that holds config.json; `name` is what the user calls it."""
    wanted = folder / subfolder if subfolder else folder
    if (wanted / "config.json").is_file():
        return wanted
    found = sorted(path.parent.name for path in folder.glob("*/config.json") if not path.parent.name.startswith("."))
    listed = ", ".join(found)
    if subfolder:
        raise CheckpointError(
            f"{name}: no config.json in its subfolder {subfolder}; expected one of: {listed or 'none has one'}; "
            "pass another subfolder, or none"
        )
    if not found:
        raise CheckpointError(
            f"{name}: no config.json, here or one folder below; expected a safetensors checkpoint; "
            "name another one (GGUF and ONNX files cannot be used)"
        )
    if len(found) > 1:
        likely = "4bit" if "4bit" in found else found[0]
        raise CheckpointError(
            f"{name}: several checkpoints, {listed}; expected one; add /{likely} to the name or pass subfolder="
        )
    return folder / found[0]


@dataclass(frozen=True, kw_only=True)
class _Repo:
    """A repo at a revision, and how to ask for it."""

    id: str
    revision: str | None
    token: str | None
    offline: bool

    def get(self, patterns: Iterable[str], *, nested: Iterable[str]) -> Path:
        """The snapshot's folder, holding at least the files that match `patterns` and not `nested`."""
        # Half a second, and a local folder does not need it.
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        # The base of every transport error: httpx's in huggingface_hub 1.x, httpx2's in 2.x.
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        try:
            folder = snapshot_download(
                self.id,
                revision=self.revision,
                token=self.token,
                local_files_only=self.offline,
                allow_patterns=list(patterns),
                ignore_patterns=list(nested),
            )
        # ValueError: an answer that is no JSON (a captive portal); RuntimeError: what hf_xet raises.
        except (OSError, http_error, RuntimeError, ValueError) as error:
            raise DownloadError(f"{self.id}: {_explain(error, self)}") from error
        return Path(folder)


def _download(repo: _Repo, subfolder: str | None, *, with_weights: bool) -> Path:
    """Small files first: they tell which folder and which shards are wanted."""
    from huggingface_hub import constants  # slow, see _Repo.get

    repo = replace(repo, offline=repo.offline or constants.HF_HUB_OFFLINE)
    snapshot = _get_texts(repo, subfolder, with_index=with_weights)
    # The branch may move between two requests; the commit does not.
    repo = replace(repo, revision=snapshot.name)
    folder = snapshot / subfolder if subfolder else snapshot
    if not (folder / "config.json").is_file():
        repo.get(["*/config.json"], nested=["*/*/*"])
        folder = _checkpoint_in(snapshot, subfolder, repo.id)
        subfolder = folder.name
        _get_texts(repo, subfolder, with_index=with_weights)
    if with_weights:
        _get_weights(repo, subfolder, folder)
    return folder


def _get_texts(repo: _Repo, subfolder: str | None, *, with_index: bool) -> Path:
    names = [*_TEXTS, _INDEX] if with_index else [*_TEXTS]
    if not repo.offline:
        # Not asked for offline: another program may have cached the repo without them, and it works just the same.
        names += _NOTES
    return repo.get(_below(subfolder, names), nested=_below(subfolder, _NESTED))


def _get_weights(repo: _Repo, subfolder: str | None, folder: Path) -> None:
    nested = _below(subfolder, _NESTED)
    index = folder / _INDEX
    if index.is_file():
        shards = _shards(index)
        repo.get(_below(subfolder, map(glob.escape, shards)), nested=[])
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise DownloadError(
                f"{repo.id}: {', '.join(missing)} cannot be had, but {_INDEX} names it; expected every shard; "
                f"{'go online once' if repo.offline else 'the repo is incomplete, try another revision'}"
            )
        return
    for pattern in _WEIGHTS:
        repo.get(_below(subfolder, [pattern]), nested=nested)
        if any(folder.glob(pattern)):
            return
    raise DownloadError(
        f"{repo.id}: no weights, expected model.safetensors or shards with {_INDEX}; "
        f"{'go online once' if repo.offline else 'name another repo (GGUF and ONNX files cannot be used)'}"
    )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no usable weight_map ({error}); tell the repo's owner") from error


def _below(subfolder: str | None, patterns: Iterable[str]) -> list[str]:
    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    return [prefix + pattern for pattern in patterns]


def _explain(error: BaseException, repo: _Repo) -> str:
    """What went wrong, what was expected and what to do, in one line."""
    from huggingface_hub import constants, errors  # slow, see _Repo.get

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


def _explain_status(error: Exception, repo: _Repo, hub: str) -> str:
    """The answers of a hub that was reached."""
    from huggingface_hub import errors  # slow, see _Repo.get

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
