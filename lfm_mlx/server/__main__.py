"""``python -m lfm_mlx.server``: the same as ``lfm-mlx server``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lfm_mlx.cache import DiskStore, PrefixCache, checkpoint_fingerprint
from lfm_mlx.cli import load_model, loading_options, model_option, read_text
from lfm_mlx.distributed import part_name
from lfm_mlx.errors import OptionError
from lfm_mlx.hub import fetch
from lfm_mlx.memory import available_bytes
from lfm_mlx.model import Model
from lfm_mlx.server import HttpServer, ServerSettings, Service, bind
from lfm_mlx.server.access import read_keys
from lfm_mlx.server.request_log import set_up_log
from lfm_mlx.terminal import run

DEFAULT_CACHE_GB = 4.0
API_KEY_VARIABLE = "LFM_MLX_API_KEY"


@click.command(name="server")
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--alias", multiple=True, help="Further name of the model in requests; may be repeated.")
@click.option("--max-rows", type=click.IntRange(1), default=16, show_default=True, help="Answers written at once.")
@click.option("--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="Answers that may wait.")
@click.option("--max-body-mb", type=click.FloatRange(0.001), default=16, show_default=True, help="Size of a request.")
@click.option("--body-timeout", type=click.FloatRange(0.1), default=60, show_default=True, help="Seconds it may take.")
@click.option("--request-timeout", type=click.FloatRange(0.001), help="Seconds an answer may take [default: no limit].")
@click.option(
    "--prefix-cache-gb",
    type=click.FloatRange(0),
    help="Memory for what earlier prompts have computed; 0 is none [default: an eighth of what is free, at most 4].",
)
@click.option(
    "--prefix-cache-dir", type=click.Path(path_type=Path), help="Folder where that is kept too, beyond the process."
)
@click.option("--prefix-cache-dir-gb", type=click.FloatRange(0.001), default=20, show_default=True, help="Its size.")
@click.option(
    "--read-timeout",
    type=click.FloatRange(0.1),
    default=60,
    show_default=True,
    help="Seconds a client may leave unread what was written for it.",
)
@click.option("--shutdown-timeout", type=click.FloatRange(0), default=10, show_default=True, help="Seconds to finish.")
@click.option("--keep-alive", type=click.FloatRange(0.05), default=10, show_default=True, help="Seconds between signs.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File of API keys, one a line; the variable {API_KEY_VARIABLE} is another way.",
)
@click.option("--cors-origin", multiple=True, help="Site whose pages may call, or *; may be repeated.")
@click.option("--tls-cert", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Certificate, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Its key, PEM.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log.")
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
    loading: dict[str, Any],
) -> int:
    """Serve a model over HTTP: OpenAI's and Anthropic's interfaces.

    One line on standard output says where, when the server is ready; the log goes to standard error.
    """
    if (tls_cert is None) != (tls_key is None):
        raise OptionError("one of --tls-cert and --tls-key was given, expected both; give the other one too")
    settings = ServerSettings(
        names=model_names(model, alias),
        max_rows=max_rows,
        max_waiting=max_waiting,
        api_keys=_keys(api_key_file),
        cors_origins=tuple(cors_origin),
        max_body_bytes=int(max_body_mb * 1e6),
        body_timeout_s=body_timeout,
        request_timeout_s=request_timeout,
        keep_alive_s=keep_alive,
        logs_prompts=log_prompts,
    )
    set_up_log(log_level)
    listening = bind(host, port)
    with listening:
        places = {name: loading.pop(name) for name in ("revision", "subfolder") if name in loading}
        folder = fetch(model, **places, offline=loading.get("offline", False))
        loaded = load_model(str(folder), **loading)
        cache = make_prefix_cache(loaded.model, folder, prefix_cache_gb, prefix_cache_dir, prefix_cache_dir_gb)
        service = Service(*loaded, settings, prefix_cache=cache)
        server = HttpServer(
            service,
            shutdown_timeout_s=shutdown_timeout,
            read_timeout_s=read_timeout,
            tls_cert=tls_cert,
            tls_key=tls_key,
        )
        scheme = "http" if tls_cert is None else "https"
        name = f"[{host}]" if ":" in host else host
        click.echo(f"{service.name} at {scheme}://{name}:{listening.getsockname()[1]}")
        server.run(sockets=[listening])
    return 0


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
        OptionError: a folder was given and no memory.
    """
    if memory_gb is None:
        memory_gb = min(DEFAULT_CACHE_GB, available_bytes() / 8e9)
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


def _keys(file: Path | None) -> tuple[str, ...]:
    texts = [read_text(file)] if file is not None else []
    keys = read_keys([*texts, os.environ.get(API_KEY_VARIABLE, "")])
    if file is not None and not keys:
        raise OptionError(f"{file} holds no API key, expected one a line; write one into it")
    return keys


if __name__ == "__main__":
    run(command, "python -m lfm_mlx.server")
