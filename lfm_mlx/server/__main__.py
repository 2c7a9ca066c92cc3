"""``python -m lfm_mlx.server``: the same as ``lfm-mlx server``."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lfm_mlx.cache import DiskStore, PrefixCache, checkpoint_fingerprint, content_fingerprint
from lfm_mlx.cli import is_parallel, load_model, loading_options, model_option, read_text
from lfm_mlx.distributed import Link, agree, is_first_rank, join_link, part_name
from lfm_mlx.errors import OptionError
from lfm_mlx.hub import fetch
from lfm_mlx.memory import available_bytes
from lfm_mlx.model import Model
from lfm_mlx.server import HttpServer, ServerSettings, Service, bind, check_certificate, make_app
from lfm_mlx.server.access import read_keys
from lfm_mlx.server.request_log import set_up_log
from lfm_mlx.terminal import FiniteRange, run

DEFAULT_CACHE_GB = 4.0
API_KEY_VARIABLE = "LFM_MLX_API_KEY"
REPLICA_KEY_VARIABLE = "LFM_MLX_REPLICA_KEY"

OF_A_FRONT = frozenset(
    {
        "host",
        "port",
        "max_body_mb",
        "body_timeout",
        "read_timeout",
        "shutdown_timeout",
        "api_key_file",
        "cors_origin",
        "tls_cert",
        "tls_key",
        "log_level",
        "replica",
        "replica_key_file",
    }
)
"""Options that mean something where other servers answer."""


@click.command(name="server")
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--alias", multiple=True, help="Further name of the model in requests; may be repeated.")
@click.option("--max-rows", type=click.IntRange(1), default=16, show_default=True, help="Answers written at once.")
@click.option("--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="Answers that may wait.")
@click.option("--max-body-mb", type=FiniteRange(0.001), default=16, show_default=True, help="Size of a request.")
@click.option("--body-timeout", type=FiniteRange(0.1), default=60, show_default=True, help="Seconds it may take.")
@click.option("--request-timeout", type=FiniteRange(0.001), help="Seconds an answer may take [default: no limit].")
@click.option(
    "--prefix-cache-gb",
    type=FiniteRange(0),
    help="Memory for what earlier prompts have computed; 0 is none [default: an eighth of what is free, at most 4].",
)
@click.option(
    "--prefix-cache-dir", type=click.Path(path_type=Path), help="Folder where that is kept too, beyond the process."
)
@click.option("--prefix-cache-dir-gb", type=FiniteRange(0.001), default=20, show_default=True, help="Its size.")
@click.option(
    "--read-timeout",
    type=FiniteRange(0.1),
    default=60,
    show_default=True,
    help="Seconds a client may leave unread what was written for it.",
)
@click.option("--shutdown-timeout", type=FiniteRange(0), default=10, show_default=True, help="Seconds to finish.")
@click.option("--keep-alive", type=FiniteRange(0.05), default=10, show_default=True, help="Seconds between signs.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File of API keys, one a line; the variable {API_KEY_VARIABLE} is another way.",
)
@click.option("--cors-origin", multiple=True, help="Site whose pages may call, or *; may be repeated.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its key, PEM.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log.")
@click.option(
    "--replica", multiple=True, help="Server that answers instead of a model here, as http://mac1:8080; repeated."
)
@click.option(
    "--replica-key-file",
    type=click.Path(path_type=Path),
    help=f"File with the API key of those servers; the variable {REPLICA_KEY_VARIABLE} is another way.",
)
@click.option(
    "--data-parallel",
    type=click.IntRange(1),
    default=1,
    help="Ranks that each serve the whole model behind this address, under mlx.launch.",
)
@loading_options
def command(
    model: str,
    host: str,
    port: int,
    alias: Sequence[str],
    max_rows: int,
    max_waiting: int,
    max_body_mb: float,
    body_timeout: float,
    request_timeout: float | None,
    read_timeout: float,
    shutdown_timeout: float,
    prefix_cache_gb: float | None,
    prefix_cache_dir: Path | None,
    prefix_cache_dir_gb: float,
    keep_alive: float,
    api_key_file: Path | None,
    cors_origin: Sequence[str],
    tls_cert: Path | None,
    tls_key: Path | None,
    log_level: str,
    log_prompts: bool,
    replica: Sequence[str],
    replica_key_file: Path | None,
    data_parallel: int,
    loading: dict[str, Any],
) -> int:
    """Serve a model over HTTP: OpenAI's and Anthropic's interfaces.

    One line on standard output says where, when the server is ready; the log goes to standard error.
    """
    settings = ServerSettings(
        names=model_names(model, alias),
        max_rows=max_rows,
        max_waiting=max_waiting,
        api_keys=_keys(api_key_file, API_KEY_VARIABLE),
        cors_origins=tuple(map(_origin, cors_origin)),
        max_body_bytes=int(max_body_mb * 1e6),
        body_timeout_s=body_timeout,
        request_timeout_s=request_timeout,
        keep_alive_s=keep_alive,
        logs_prompts=log_prompts,
    )
    set_up_log(log_level)
    start = Start(
        host=host,
        port=port,
        model=model,
        loading=loading,
        settings=settings,
        cache=CacheOptions(memory_gb=prefix_cache_gb, folder=prefix_cache_dir, folder_gb=prefix_cache_dir_gb),
        limits={"shutdown_timeout_s": shutdown_timeout, "read_timeout_s": read_timeout},
        secrecy=_secrecy(tls_cert, tls_key),
    )
    if replica:
        _refuse_options_of_a_model()
        key = next(iter(_keys(replica_key_file, REPLICA_KEY_VARIABLE)), None)
        with bind(host, port) as listening:
            serve_replicas(start, listening, replica, key)
    elif replica_key_file is not None:
        raise OptionError("--replica-key-file was given without --replica, expected both; name the servers")
    elif data_parallel > 1:
        serve_ranks(start, data_parallel)
    else:
        serve_model(start)
    return 0


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where what earlier prompts have computed is kept, as `make_prefix_cache` takes it."""

    memory_gb: float | None
    folder: Path | None
    folder_gb: float


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a server is started with.

    Args:
        host, port: where it listens.
        model: folder or repo id.
        loading: what `load_model` takes beside it.
        settings: limits and rules.
        cache: of prompts.
        limits, secrecy: what `HttpServer` takes beside them.
    """

    host: str
    port: int
    model: str
    loading: Mapping[str, Any]
    settings: ServerSettings
    cache: CacheOptions
    limits: Mapping[str, Any]
    secrecy: Mapping[str, Any]

    def fetch(self) -> Path:
        """The checkpoint's folder."""
        places = {name: self.loading[name] for name in ("revision", "subfolder") if name in self.loading}
        return fetch(self.model, **places, offline=self.loading.get("offline", False))

    def make_service(self, folder: Path, **changes: Any) -> Service:
        """The model, loaded, and its settings with these changes."""
        loading = {name: value for name, value in self.loading.items() if name not in ("revision", "subfolder")}
        loaded = load_model(str(folder), **loading)
        cache = make_prefix_cache(loaded.model, folder, self.cache.memory_gb, self.cache.folder, self.cache.folder_gb)
        settings = replace(self.settings, fingerprint=content_fingerprint(folder), **changes)
        return Service(*loaded, settings, prefix_cache=cache)

    def url(self, listening: socket.socket) -> str:
        """Where the server is."""
        scheme = "http" if self.secrecy["tls_cert"] is None else "https"
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{name}:{listening.getsockname()[1]}"


def serve_model(start: Start) -> None:
    """Serve a model that this process loads."""
    with bind(start.host, start.port) as listening:
        service = start.make_service(start.fetch())
        server = HttpServer(make_app(service), service, **start.limits, **start.secrecy)
        click.echo(f"{service.name} at {start.url(listening)}")
        server.run(sockets=[listening])


def serve_replicas(
    start: Start, listening: socket.socket, urls: Sequence[str], key: str | None, link: Link | None = None
) -> None:
    """Serve what other servers answer.

    Args:
        start: what the server is started with.
        listening: its socket.
        urls: of the other servers.
        key: theirs; None where they ask for none.
        link: to the ranks that they run on, whose loss clients are told.
    """
    # Imported here: an HTTP client takes a while to import, and a server with a model needs none.
    from lfm_mlx.replicas import Fleet, Front, FrontSettings, Replica, make_front_app, serve_front

    settings = FrontSettings(
        api_keys=start.settings.api_keys,
        cors_origins=start.settings.cors_origins,
        max_body_bytes=start.settings.max_body_bytes,
        body_timeout_s=start.settings.body_timeout_s,
    )
    front = Front(Fleet([Replica(url, key=key) for url in urls]), settings)
    if link is not None:
        link.on_failure = front.lose

    def tell() -> None:
        click.echo(f"{front.fleet.num_ready} of {len(urls)} replicas at {start.url(listening)}")

    server = HttpServer(make_front_app(front), front, **start.limits, **start.secrecy)
    serve_front(front, server, listening, tell)


def serve_ranks(start: Start, size: int) -> None:
    """Serve a model that every rank loads, behind one address on rank 0."""
    from lfm_mlx.replicas import serving_rank, share_key

    if is_parallel(start.loading):
        raise OptionError(
            "--data-parallel was given with --tensor-parallel or --expert-parallel, expected one of them: a rank holds "
            "the whole model or a part of it"
        )
    with bind(start.host, start.port) if is_first_rank() else contextlib.nullcontext() as listening:
        link = join_link(size, "data")
        with link.failing_together():
            folder = start.fetch()
            options = {name: start.loading.get(name) for name in ("max_context", "kv_bits", "dtype")}
            agree(link, "data", {"checkpoint": content_fingerprint(folder), "names": start.settings.names, **options})
            key = share_key(link)
            if start.cache.folder is not None:  # The ranks may be on one machine.
                own = start.cache.folder / f"replica-{link.world.rank}"
                start = replace(start, cache=replace(start.cache, folder=own))
            service = start.make_service(folder, api_keys=(key,), cors_origins=())
            server = HttpServer(make_app(service), service, **start.limits)
            with serving_rank(link, server) as urls:
                if listening is None:
                    link.wait_for_end()
                else:
                    serve_replicas(start, listening, urls, key, link)


def _origin(origin: str) -> str:
    """A site, checked to be what a browser sends as the origin of a page."""
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#]+", origin):
        raise OptionError(
            f"--cors-origin is {origin!r}, expected * or an origin such as https://app.example; correct it"
        )
    return origin


def _refuse_options_of_a_model() -> None:
    """Where other servers answer, what belongs to a model is theirs."""
    context = click.get_current_context()
    for param in context.command.params:
        source = context.get_parameter_source(str(param.name))
        if param.name not in OF_A_FRONT and source is ParameterSource.COMMANDLINE:
            raise OptionError(
                f"{param.opts[0]} was given with --replica, expected it at those servers: no model is loaded here; "
                "leave it out"
            )


def model_names(model: str, aliases: Sequence[str] = ()) -> tuple[str, ...]:
    """What a model may be called: a folder by its last name, a repo by its id, both as they were given; and aliases."""
    folder = Path(model)
    own = [folder.resolve().name, model] if folder.is_dir() else [model]
    return tuple(dict.fromkeys([*own, *aliases]))


def make_prefix_cache(
    model: Model, checkpoint: Path, memory_gb: float | None, folder: Path | None, folder_gb: float
) -> PrefixCache | None:
    """What earlier prompts have computed, in memory and in a folder.

    Args:
        model: whose it is.
        checkpoint: its folder, which tells it from other models.
        memory_gb: most that is held, in 10^9 bytes; 0 is no cache, None decides by what is free.
        folder: where it is kept too.
        folder_gb: most that is kept there.

    Raises:
        OptionError: a folder was given and no memory, or more memory than is free.
    """
    free_gb = available_bytes() / 1e9
    if memory_gb is None:
        memory_gb = min(DEFAULT_CACHE_GB, free_gb / 8)
    elif memory_gb > free_gb:
        raise OptionError(
            f"--prefix-cache-gb is {memory_gb:g}, expected less than the {free_gb:.1f} GB that are free, as answers "
            "need memory too; give less"
        )
    max_bytes = int(memory_gb * 1e9)
    if not max_bytes:
        if folder is not None:
            raise OptionError(
                "--prefix-cache-dir was given with --prefix-cache-gb 0, expected memory too; leave one out"
            )
        return None
    disk = None
    if folder is not None:
        fingerprint = checkpoint_fingerprint(checkpoint)
        max_disk_bytes = int(folder_gb * 1e9)
        disk = DiskStore(folder, max_bytes=max_disk_bytes, fingerprint=fingerprint, part=part_name(model))
    return PrefixCache(model.config, dtype=model.dtype, kv_bits=model.kv_bits, max_bytes=max_bytes, disk=disk)


def _secrecy(cert: Path | None, key: Path | None) -> dict[str, Path | None]:
    """The files of TLS, which only rank 0 has to have, as the front of all."""
    if (cert is None) != (key is None):
        raise OptionError("one of --tls-cert and --tls-key was given, expected both; give the other one too")
    for file in (cert, key):
        if file is not None and is_first_rank() and not file.is_file():
            raise OptionError(f"{file} is no file, expected one in PEM form; name an existing one")
    if cert is not None and key is not None and is_first_rank():
        check_certificate(cert, key)
    return {"tls_cert": cert, "tls_key": key}


def _keys(file: Path | None, variable: str) -> tuple[str, ...]:
    """The API keys that a file and a variable hold, which only rank 0 has to have."""
    if not is_first_rank():
        return ()
    texts = [read_text(file)] if file is not None else []
    keys = read_keys([*texts, os.environ.get(variable, "")])
    if file is not None and not keys:
        raise OptionError(f"{file} holds no API key, expected one a line; write one into it")
    return keys


if __name__ == "__main__":
    run(command, "python -m lfm_mlx.server")
