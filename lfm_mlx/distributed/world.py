"""What `mlx.launch` has told this process: which rank it is, of how many, and where rank 0 is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_mlx.errors import OptionError

LOOK_S = 5.0
"""In which the system has to say who has started this process."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A process among those that were launched together.

    Args:
        rank: its number.
        size: how many there are.
        backend: "ring" or "jaccl": what `mlx.distributed.init` is to start.
        host, port: where rank 0 listens.
    """

    rank: int
    size: int
    backend: str
    host: str
    port: int


def read_world(environment: Mapping[str, str] | None = None) -> World | None:
    """The world by the variables that `mlx.launch` sets; None where it launched nothing, or one process.

    Raises:
        OptionError: they contradict each other, or name a backend that tells no address.
    """
    variables = os.environ if environment is None else environment
    if "MLX_RANK" not in variables:
        return None
    rank = _rank(variables["MLX_RANK"])
    if "MLX_JACCL_COORDINATOR" in variables:
        devices = _read_list(variables, "MLX_IBV_DEVICES")
        return _world(rank, len(devices), "jaccl", variables["MLX_JACCL_COORDINATOR"])
    if "MLX_HOSTFILE" in variables:
        hosts = _read_list(variables, "MLX_HOSTFILE")
        return _world(rank, len(hosts), "ring", hosts[0][0]) if len(hosts) > 1 else None
    raise OptionError(
        f"MLX_RANK is {rank}, but neither MLX_HOSTFILE nor MLX_JACCL_COORDINATOR is set; launch with "
        "mlx.launch --backend ring or --backend jaccl"
    )


def launcher() -> int | None:
    """The process number of `mlx.launch` where it has started this process, on this machine; else None."""
    parent = os.getppid()
    command, entry = ["ps", "-ww", "-o", "command=", "-p", str(parent)], Path(f"/proc/{parent}/cmdline")
    try:
        if entry.exists():
            told = entry.read_text(errors="replace")
        else:  # macOS
            told = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parent if "mlx.launch" in told or "mlx._distributed_utils" in told else None


def is_first_rank() -> bool:
    """Whether this process is rank 0, or was not launched with others."""
    world = read_world()
    return world is None or world.rank == 0


def check_alone(*options: str) -> None:
    """Refuse to work as one process where several were launched: each would do all of it.

    Args:
        *options: those that let them work together, for the message.

    Raises:
        OptionError: several were launched.
    """
    world = read_world()
    if world is not None:
        raise OptionError(
            f"{world.size} processes were launched, each of which would do all of it, expected one of "
            f"{', '.join(options)}; give one, or leave mlx.launch out"
        )


def launched_world(size: int, mode: str) -> World:
    """The world, which has to have `size` processes.

    Raises:
        OptionError: it has another number; the message has the command to use.
    """
    world = read_world()
    found = world.size if world is not None else 1
    if world is None or found != size:
        processes = "1 process was" if found == 1 else f"{found} processes were"
        raise OptionError(
            f"--{mode}-parallel is {size}, but {processes} launched, expected {size}; put a launcher in front: "
            f"mlx.launch -n {size} -- lfm-mlx ... --{mode}-parallel {size} on one machine, or "
            f"mlx.launch --hostfile FILE -- ... with {size} hosts in the file"
        )
    return world


def _world(rank: int, size: int, backend: str, address: str) -> World:
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 <= rank < size:
        raise OptionError(
            f"rank {rank} of {size} with rank 0 at {address!r} makes no sense, expected a rank below the number of "
            "hosts and host:port; launch with mlx.launch"
        )
    return World(rank=rank, size=size, backend=backend, host=host.strip("[]"), port=int(port))


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise OptionError(f"MLX_RANK is {text!r}, expected a whole number; launch with mlx.launch")
    return int(text)


def _read_list(variables: Mapping[str, str], name: str) -> list[Any]:
    """The list in the file that a variable names; empty where the file is."""
    path = Path(variables.get(name, ""))
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.strip() else []
    except (OSError, ValueError) as error:
        raise OptionError(f"{name} is {str(path)!r}, which cannot be read ({error}); launch with mlx.launch") from error
    if not isinstance(found, list) or not all(isinstance(host, list) and host for host in found):
        raise OptionError(f"{path} holds no list of hosts, expected a list of lists; launch with mlx.launch")
    return found
