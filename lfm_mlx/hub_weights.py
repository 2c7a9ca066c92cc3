"""Weights that are still at the hub: what is in them, and one file after another."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_mlx.errors import CheckpointError, DownloadError
from lfm_mlx.hub import INDEX, WEIGHTS, Texts, fetch_texts, repo_named, shards_of
from lfm_mlx.hub_repo import Repo

_LARGEST_HEADER = 100 << 20
_ATTEMPTS = 8
"""How often a download is taken up again by itself, as long as each attempt got something."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of weights.

    Args:
        name: its name in the checkpoint's folder.
        num_bytes: its length.
        etag: SHA-256 of its content for large files, the hub's other hash for small ones.
        cached: where it is if it was downloaded before, complete; huggingface_hub's cache.
    """

    name: str
    num_bytes: int
    etag: str
    cached: Path | None


class RemoteCheckpoint:
    """A repo's checkpoint; its small files are here. Make one with `open_remote`.

    Attributes:
        folder: config.json, tokenizer, index.
        files: the files of weights.
    """

    def __init__(self, texts: Texts, files: tuple[RemoteFile, ...]) -> None:
        self._texts = texts
        self.folder = texts.folder
        self.files = files

    @property
    def name(self) -> str:
        """Repo id and, where there is one, subfolder."""
        return "/".join(filter(None, (self._texts.repo.id, self._texts.subfolder)))

    @property
    def commit(self) -> str:
        """The commit that all files are of."""
        return str(self._texts.repo.revision)

    def read_start(self, file: RemoteFile) -> bytes:
        """The safetensors header of a file, with the eight bytes of its length; nothing more is downloaded.

        Raises:
            CheckpointError: it does not start with a header.
            DownloadError: the hub was not reached.
        """
        start = self._bytes(file, 0, 1 << 17)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, file.num_bytes - 8):
            raise CheckpointError(
                f"{self.name}: {file.name} does not start with a safetensors header; tell the repo's owner"
            )
        if len(start) < 8 + length:
            start += self._bytes(file, len(start), 8 + length - len(start))
        return start[: 8 + length]

    def download(self, file: RemoteFile) -> Path:
        """Fetch a file into huggingface_hub's cache.

        Args:
            file: one of `files`.

        Returns:
            Its path.

        Raises:
            DownloadError: the hub was not reached.
        """
        if file.cached is not None:
            return file.cached
        from huggingface_hub import hf_hub_download  # slow, see Repo.asked

        repo = self._texts.repo
        with repo.asked():
            return Path(hf_hub_download(repo.id, self._path(file.name), revision=repo.revision, token=repo.token))

    def download_to(self, file: RemoteFile, target: Path, is_wanted: Callable[[], bool]) -> None:
        """Fetch a file to `target`, going on where an earlier attempt broke off, be it one that was killed.

        huggingface_hub starts a file anew, and leaves what a killed process had got of it on the disk.

        Args:
            file: one of `files`.
            target: where it goes; what there is of it lies beside, as ``NAME.part``, until it is complete.
            is_wanted: asked after each chunk; when it says no, the download is given up.

        Raises:
            DownloadError: the hub was not reached, or sends something else.
        """
        part = target.with_name(f"{target.name}.part")
        for attempt in range(_ATTEMPTS):
            before = part.stat().st_size if part.is_file() else 0
            try:
                self._go_on(file, part, is_wanted)
            except DownloadError:
                got = part.stat().st_size if part.is_file() else 0
                if got <= before or attempt == _ATTEMPTS - 1:
                    raise
                continue  # a long download may lose its connection; what was got is kept
            break
        if not is_wanted():
            return
        if part.stat().st_size != file.num_bytes:
            found = part.stat().st_size
            part.unlink()
            raise DownloadError(
                f"{self.name}: {file.name} came with {found:,} bytes, expected {file.num_bytes:,}; try again"
            )
        part.rename(target)

    def _go_on(self, file: RemoteFile, part: Path, is_wanted: Callable[[], bool]) -> None:
        with part.open("ab") as stream, self._texts.repo.asked():
            while stream.tell() < file.num_bytes and is_wanted():
                before = stream.tell()
                with self._answer(file, f"bytes={before}-") as response:
                    if response.status_code != 206:
                        stream.truncate(0)  # a mirror that sends the whole file whatever is asked
                    for chunk in response.iter_bytes():
                        stream.write(chunk)
                        if not is_wanted():
                            break
                if stream.tell() <= before:
                    raise ConnectionError(f"the connection ended after {before:,} of {file.num_bytes:,} bytes")

    def _path(self, name: str) -> str:
        return "/".join(filter(None, (self._texts.subfolder, name)))

    def _bytes(self, file: RemoteFile, first: int, count: int) -> bytes:
        if file.cached is not None:
            with file.cached.open("rb") as stream:
                stream.seek(first)
                return stream.read(count)
        got = b""
        with self._texts.repo.asked(), self._answer(file, f"bytes={first}-{first + count - 1}") as response:
            skipped = 0 if response.status_code == 206 else first
            for chunk in response.iter_bytes():
                got += chunk
                if len(got) >= skipped + count:
                    break
        return got[skipped : skipped + count]

    @contextlib.contextmanager
    def _answer(self, file: RemoteFile, byte_range: str) -> Iterator[Any]:
        """The hub's answer to a request for some bytes of a file, its body not read yet."""
        from huggingface_hub import hf_hub_url  # slow, see Repo.asked
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        repo = self._texts.repo
        url = hf_hub_url(repo.id, self._path(file.name), revision=repo.revision)
        headers = {**build_hf_headers(token=repo.token), "Range": byte_range, "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            yield response


def open_remote(
    model: str, *, revision: str | None = None, subfolder: str | None = None, token: str | None = None
) -> RemoteCheckpoint:
    """The checkpoint of a repo; its small files are downloaded, its weights are not.

    Args:
        model: ``org/name`` or ``org/name/subfolder``.
        revision: branch, tag or commit; None takes the main branch.
        subfolder: as for `lfm_mlx.hub.fetch`.
        token: likewise.

    Raises:
        CheckpointError, DownloadError: as `lfm_mlx.hub.fetch`.
    """
    repo, inside = repo_named(model, revision=revision, subfolder=subfolder, token=token)
    texts = fetch_texts(repo, inside, with_index=True)
    index = texts.folder / INDEX
    names = shards_of(index) if index.is_file() else None
    if names is not None:
        cached = [_cached(texts, name) for name in names]
        if all(cached):
            return RemoteCheckpoint(texts, tuple(file for file in cached if file is not None))
    listed = _listed(texts)
    if names is None:
        found = ([name for name in listed if fnmatch.fnmatchcase(name, pattern)] for pattern in WEIGHTS)
        names = next((sorted(each) for each in found if each), [])
        if not names:
            raise DownloadError(
                f"{repo.id}: no weights, expected model.safetensors or shards with {INDEX}; name another repo (GGUF "
                "and ONNX files cannot be used)"
            )
    if missing := [name for name in names if name not in listed]:
        raise DownloadError(
            f"{repo.id}: {', '.join(missing)} cannot be had, but {INDEX} names it; expected every shard; the repo is "
            "incomplete, try another revision"
        )
    return RemoteCheckpoint(texts, tuple(_cached(texts, name) or listed[name] for name in names))


def _cached(texts: Texts, name: str) -> RemoteFile | None:
    """A file that huggingface_hub's cache has, where its blobs are called by their etags."""
    path = texts.folder / name
    if not path.is_file():
        return None
    blob = Path(os.path.realpath(path))
    return RemoteFile(name=name, num_bytes=blob.stat().st_size, etag=blob.name, cached=path)


def _listed(texts: Texts) -> dict[str, RemoteFile]:
    """The files that the hub has in the checkpoint's folder itself."""
    from huggingface_hub import HfApi  # slow, see Repo.asked

    repo: Repo = texts.repo
    with repo.asked():
        info = HfApi(token=repo.token).model_info(repo.id, revision=repo.revision, files_metadata=True)
    prefix = f"{texts.subfolder}/" if texts.subfolder else ""
    files = {}
    for sibling in info.siblings or []:
        name = sibling.rfilename.removeprefix(prefix)
        if sibling.rfilename.startswith(prefix) and "/" not in name and sibling.size is not None:
            etag = sibling.lfs.sha256 if sibling.lfs is not None else str(sibling.blob_id)
            files[name] = RemoteFile(name=name, num_bytes=sibling.size, etag=etag, cached=None)
    return files
