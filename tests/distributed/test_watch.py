"""The process that ends one that stands still."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import PATIENCE_S, launched

PROGRAM = """
import sys, time
from lfm_mlx.distributed import watch
watch.STILL_S, watch.FAREWELL_S = float(sys.argv[3]), 0.5
one = watch.Watch("it stood still")
for _ in range(int(sys.argv[1])):
    time.sleep(0.2)
    one.sign()
if sys.argv[2] == "ends":
    sys.exit(3)
if sys.argv[2] == "says":
    one.sign(is_last=True)
time.sleep(60)
"""


def run(num_signs: int, then: str, still_s: float) -> tuple[int, str]:
    """Exit code and standard error of a program that gives signs of life and then ends, says so, or hangs."""
    command = [sys.executable, "-c", PROGRAM, str(num_signs), then, str(still_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stderr


def test_a_process_that_stands_still_is_ended_and_others_are_not() -> None:
    assert run(0, "hangs", 0.5) == (-signal.SIGKILL, "it stood still")
    assert run(1, "says", PATIENCE_S) == (-signal.SIGKILL, "")
    assert run(2, "ends", PATIENCE_S) == (3, "")


def test_a_process_that_stands_still_is_ended_even_if_nobody_reads_why() -> None:
    command = [sys.executable, "-c", PROGRAM, "0", "hangs", "0.5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(PATIENCE_S) == -signal.SIGKILL


ALONE = """
import sys
from lfm_mlx.distributed import join_link, watch
watch.STILL_S = 2
join_link(2, "tensor")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_before_another_one_has_come_is_ended(rank: int, tmp_path: Path) -> None:
    with launched(tmp_path, "-c", ALONE) as ranks:
        alone, other = ranks[rank], ranks[1 - rank]
        other.kill()
        deadline_s = time.monotonic() + PATIENCE_S
        while subprocess.run(["pgrep", "-P", str(alone.pid)], capture_output=True).returncode != 0:
            assert alone.poll() is None
            assert time.monotonic() < deadline_s
        alone.send_signal(signal.SIGSTOP)
        assert alone.wait(PATIENCE_S) == -signal.SIGKILL
