"""Connections between ranks, here between threads of one process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import PATIENCE_S, free_ports

from lfm_mlx.distributed.link import Link
from lfm_mlx.distributed.world import World, check_alone, launched_world, read_world
from lfm_mlx.errors import OptionError, RankError


def world(rank: int, size: int, port: int) -> World:
    return World(rank=rank, size=size, backend="ring", host="127.0.0.1", port=port)


def in_threads(size: int, work: Callable[[Link], Any]) -> list[Any]:
    """What `work` returns or raises for the link of each rank."""
    (port,) = free_ports(1)
    results: list[Any] = [None] * size
    links: list[Link] = []

    def run(rank: int) -> None:
        link = Link(world(rank, size, port))
        links.append(link)
        try:
            results[rank] = work(link)
        except (RankError, SystemExit) as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for link in links:
        link.close()
    return results


def test_ranks_that_are_alike_agree_and_get_notes_in_order() -> None:
    def work(link: Link) -> list[Any]:
        link.agree({"mlx": "1", "numbers": (1, 2)})
        notes = [{"step": i} for i in range(100)]
        if link.is_leader:
            for note in notes:
                link.send(note)
            return notes
        return [link.receive() for _ in notes]

    found = in_threads(3, work)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 100


def test_a_difference_is_named_on_rank_0_and_ends_the_others() -> None:
    def work(link: Link) -> None:
        link.agree({"mlx": "0.32.4", "kv_bits": 8 if link.world.rank == 2 else None})

    leader, *others = in_threads(3, work)
    assert isinstance(leader, RankError)
    assert str(leader) == "rank 2 has kv_bits 8, expected None as rank 0 has; give every rank the same"
    assert [other.code for other in others] == [1, 1]


def test_ranks_that_do_not_come_are_named() -> None:
    (port,) = free_ports(1)
    with pytest.raises(RankError, match=r"rank 1, 2 did not come within 0\.2 s"):
        Link(world(0, 3, port), arrival_s=0.2)
    with pytest.raises(RankError, match=rf"rank 0 was not at 127\.0\.0\.1:{port} within 0\.2 s"):
        Link(world(1, 3, port), arrival_s=0.2)


def test_rank_0_says_for_whom_it_waits(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lfm_mlx.distributed.arrival.TELLING_S", 0.05)
    (port,) = free_ports(1)
    with pytest.raises(RankError, match="did not come"):
        Link(world(0, 2, port), arrival_s=0.3)
    assert capfd.readouterr().err == f"waiting for rank 1 at 127.0.0.1:{port}, 0 s more\n"


STARTING = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])"
WAITING = """
import sys
from lfm_mlx.distributed import Link, World
Link(World(rank=0, size=3, backend="ring", host="127.0.0.1", port=int(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("name", "told"), [("mlx.launch", "error: mlx.launch is gone;"), ("a-shell", "error: rank 1 is gone:")]
)
def test_a_rank_ends_when_its_launcher_is_killed(name: str, told: str) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", STARTING, name, "-c", WAITING, str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher, connected(port) as connection:
        connection.sendall(b"lfm_mlx rank 1      \n")
        assert connection.recv(1)  # A sign of life: the link is there.
        launcher.kill()
        launcher.wait()
        if name != "mlx.launch":  # Whoever starts a rank by hand may go away.
            assert all(connection.recv(1) for _ in range(4))
            connection.shutdown(socket.SHUT_RDWR)
        _, err = launcher.communicate(timeout=PATIENCE_S)
    assert told in err


LOSING = """
import os, sys, time
from lfm_mlx.distributed import Link, World
link = Link(World(rank=0, size=2, backend="ring", host="127.0.0.1", port=int(sys.argv[1])))
link.on_failure = lambda failure: os.write(2, b"clients are told\\n") * 0.0
os.write(2, b"ready\\n")
time.sleep(60)
"""


def test_clients_are_told_of_a_loss_before_a_launcher_may_end_this_process() -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", LOSING, str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as rank_0, connected(port) as connection:
        assert rank_0.stderr is not None
        connection.sendall(b"lfm_mlx rank 1      \n")
        assert rank_0.stderr.readline() == "ready\n"
        connection.shutdown(socket.SHUT_RDWR)
        _, err = rank_0.communicate(timeout=PATIENCE_S)
    assert [line.split(":")[0] for line in err.splitlines()] == ["clients are told", "error"]


def test_whoever_is_no_rank_is_turned_away() -> None:
    (port,) = free_ports(1)
    found: list[Link] = []
    leading = threading.Thread(target=lambda: found.append(Link(world(0, 2, port))), daemon=True)
    leading.start()
    for greeting in (b"GET / HTTP/1.1\r\n\r\n      ", b"lfm_mlx rank 7      \n"):
        connection = connected(port)
        connection.sendall(greeting)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    found.append(Link(world(1, 2, port)))
    leading.join(PATIENCE_S)
    assert [sorted(link.peers) for link in found] in ([[0], [1]], [[1], [0]])
    for link in found:
        link.close()


def connected(port: int) -> socket.socket:
    """A connection to a port that is about to be listened on."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            continue
        connection.settimeout(PATIENCE_S)
        return connection


def test_an_address_of_another_machine_cannot_be_rank_0() -> None:
    with pytest.raises(OptionError, match=r"rank 0 cannot listen on 192\.0\.2\.1:7777"):
        Link(World(rank=0, size=2, backend="ring", host="192.0.2.1", port=7777))


def variables(folder: Path, rank: int, **hosts: Any) -> dict[str, str]:
    (folder / "hosts.json").write_text(json.dumps(hosts["hosts"]))
    return {"MLX_RANK": str(rank), hosts["name"]: str(folder / "hosts.json")}


def test_the_world_is_what_the_launcher_says(tmp_path: Path) -> None:
    ring = variables(tmp_path, 1, name="MLX_HOSTFILE", hosts=[["10.0.0.1:5"], ["10.0.0.2:6", "10.0.1.2:7"]])
    assert read_world(ring) == World(rank=1, size=2, backend="ring", host="10.0.0.1", port=5)
    jaccl = variables(tmp_path, 0, name="MLX_IBV_DEVICES", hosts=[[None, "rdma_en5"], ["rdma_en5", None]])
    jaccl["MLX_JACCL_COORDINATOR"] = "10.0.0.1:9"
    assert read_world(jaccl) == World(rank=0, size=2, backend="jaccl", host="10.0.0.1", port=9)
    assert read_world({}) is None
    (tmp_path / "empty").write_text("")
    assert read_world({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "empty")}) is None
    with pytest.raises(OptionError, match="neither MLX_HOSTFILE nor"):
        read_world({"MLX_RANK": "0"})
    with pytest.raises(OptionError, match="rank 3 of 2"):
        read_world(variables(tmp_path, 3, name="MLX_HOSTFILE", hosts=[["a:1"], ["b:2"]]))


def test_without_a_launcher_the_command_to_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    with pytest.raises(OptionError, match=r"but 1 process was launched, expected 2; .*mlx\.launch -n 2 -- lfm-mlx"):
        launched_world(2, "tensor")


def test_processes_that_were_launched_together_do_not_all_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    check_alone("--tensor-parallel")
    for name, value in variables(tmp_path, 1, name="MLX_HOSTFILE", hosts=[["a:1"], ["b:2"]]).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=r"2 processes were launched, .* expected one of --tensor-parallel, --other;"):
        check_alone("--tensor-parallel", "--other")


def test_the_rank_with_the_least_free_memory_counts() -> None:
    (port,) = free_ports(1)
    found: list[Link] = []
    leading = threading.Thread(target=lambda: found.append(Link(world(0, 2, port))), daemon=True)
    leading.start()
    with connected(port) as connection:
        connection.sendall(b'lfm_mlx rank 1      \n{"free_bytes":5}\n')
        leading.join(PATIENCE_S)
        deadline_s = time.monotonic() + PATIENCE_S
        while found[0].free_bytes != 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        found[0].close()
