"""A model's name as a folder on this machine: a folder stays where it is, a repo comes from the hub.

Downloads go through huggingface_hub and its cache, so that HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as
everywhere else. A file appears in the cache only when it is complete.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lfm_mlx.errors import CheckpointError, DownloadError, OptionError
from lfm_mlx.hub_repo import Repo

_EXPECTED = "expected a folder with config.json or a repo id such as LiquidAI/LFM2.5-8B-A1B-MLX-4bit"
_REPO_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model*.safetensors", "weights*.safetensors")
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
    repo, named = repo_named(model, revision=revision, subfolder=inside, token=token, offline=offline)
    texts = fetch_texts(repo, named, with_index=weights)
    if weights:
        _get_weights(texts.repo, texts.subfolder, texts.folder)
    return texts.folder


def repo_named(
    model: str | Path, *, revision: str | None, subfolder: str | None, token: str | None, offline: bool = False
) -> tuple[Repo, str | None]:
    """The repo that `model` names and the folder in it, if one is named; arguments as for `fetch`."""
    from huggingface_hub import constants  # slow, see Repo.asked

    organisation, name, *rest = str(model).rstrip("/").split("/")
    validate_repo_id(f"{organisation}/{name}")
    inside = None if subfolder is None else _check_subfolder(subfolder)
    named = _check_subfolder("/".join(rest)) if rest else None
    if named and inside and named != inside:
        raise OptionError(f"subfolder is {inside!r}, but {model} names {named!r}; leave one of them out")
    is_offline = offline or constants.HF_HUB_OFFLINE
    return Repo(id=f"{organisation}/{name}", revision=revision, token=token, offline=is_offline), named or inside


def is_local(model: str | Path) -> bool:
    """Whether `model` names a folder on this machine.

    Raises:
        CheckpointError: it names a file, or can be no repo id either.
    """
    return _local_folder(model) is not None


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
    from huggingface_hub import HfApi  # slow, see Repo.asked

    validate_repo_id(repo_id)
    repo = Repo(id=repo_id, revision=None, token=token, offline=False)
    with repo.asked(to_write=folder):
        api = HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Conversion by lfm_mlx"))
    raise AssertionError  # `asked` lets no error pass


def check_can_upload(repo_id: str) -> None:
    """Refuse, before hours of work, an upload that cannot work: asks no network.

    Raises:
        CheckpointError: `repo_id` has another form than ``org/name``.
        DownloadError: no token is known.
    """
    from huggingface_hub import get_token  # slow, see Repo.asked

    validate_repo_id(repo_id)
    if get_token() is None:
        raise DownloadError(
            f"{repo_id}: no token, expected one that may write to it; set HF_TOKEN, or run hf auth login"
        )


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


def _get(repo: Repo, patterns: Iterable[str], *, nested: Iterable[str]) -> Path:
    """The snapshot's folder, holding at least the files that match `patterns` and not `nested`."""
    from huggingface_hub import snapshot_download  # slow, see Repo.asked

    with repo.asked():
        folder = snapshot_download(
            repo.id,
            revision=repo.revision,
            token=repo.token,
            local_files_only=repo.offline,
            allow_patterns=list(patterns),
            ignore_patterns=list(nested),
        )
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The small files of a repo's checkpoint, which are here.

    Args:
        repo: the repo, its revision the commit they are of.
        folder: where config.json is, in huggingface_hub's cache.
        subfolder: the same folder within the repo; None is its root.
    """

    repo: Repo
    folder: Path
    subfolder: str | None


def fetch_texts(repo: Repo, subfolder: str | None, *, with_index: bool) -> Texts:
    """Download all but the weights: they tell which folder and which shards are wanted.

    Raises:
        CheckpointError, DownloadError: as `fetch`.
    """
    snapshot = _get_texts(repo, subfolder, with_index=with_index)
    # The branch may move between two requests; the commit does not.
    repo = replace(repo, revision=snapshot.name)
    folder = snapshot / subfolder if subfolder else snapshot
    if not (folder / "config.json").is_file():
        _get(repo, ["*/config.json"], nested=["*/*/*"])
        folder = _checkpoint_in(snapshot, subfolder, repo.id)
        subfolder = folder.name
        _get_texts(repo, subfolder, with_index=with_index)
    return Texts(repo=repo, folder=folder, subfolder=subfolder)


def _get_texts(repo: Repo, subfolder: str | None, *, with_index: bool) -> Path:
    names = [*_TEXTS, INDEX] if with_index else [*_TEXTS]
    if not repo.offline:
        # Not asked for offline: another program may have cached the repo without them, and it works just the same.
        names += _NOTES
    return _get(repo, _below(subfolder, names), nested=_below(subfolder, _NESTED))


def _get_weights(repo: Repo, subfolder: str | None, folder: Path) -> None:
    nested = _below(subfolder, _NESTED)
    index = folder / INDEX
    if index.is_file():
        shards = shards_of(index)
        _get(repo, _below(subfolder, map(glob.escape, shards)), nested=[])
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise DownloadError(
                f"{repo.id}: {', '.join(missing)} cannot be had, but {INDEX} names it; expected every shard; "
                f"{'go online once' if repo.offline else 'the repo is incomplete, try another revision'}"
            )
        return
    for pattern in WEIGHTS:
        _get(repo, _below(subfolder, [pattern]), nested=nested)
        if any(folder.glob(pattern)):
            return
    raise DownloadError(
        f"{repo.id}: no weights, expected model.safetensors or shards with {INDEX}; "
        f"{'go online once' if repo.offline else 'name another repo (GGUF and ONNX files cannot be used)'}"
    )


def shards_of(index: Path) -> list[str]:
    """The files of weights that an index names.

    Raises:
        CheckpointError: it has no usable weight_map.
    """
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: no usable weight_map ({error}); tell the repo's owner") from error


def _below(subfolder: str | None, patterns: Iterable[str]) -> list[str]:
    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    return [prefix + pattern for pattern in patterns]
