"""The process that ends one that stands still."""

from __future__ import annotations

import signal
import subprocess
import sys

from launching import PATIENCE_S

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
