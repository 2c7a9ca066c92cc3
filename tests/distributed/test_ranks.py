"""Two processes over the ring."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import late_scenario
import prefix_scenario
import pytest
import rank_scenario
from launching import PATIENCE_S, launched, outputs
from random_models import tiny_config, write_checkpoint

from lfm_mlx.config import Quantization
from lfm_mlx.load import load

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
SCENARIO = str(Path(rank_scenario.__file__))
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1344}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts in 4 bits with the embedded checkpoint's tokenizer."""
    raw = tiny_config(**WIDE, intermediate_size=128, moe_intermediate_size=64)
    stored = lambda path: Quantization(group_size=32)  # noqa: E731
    folder = write_checkpoint(tmp_path_factory.mktemp("ranks") / "checkpoint", raw, stored=stored)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Any]:
    """What one process says."""
    found = json.loads(json.dumps(rank_scenario.run(load(checkpoint).model)))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("mode", ["tensor", "expert"])
def test_two_ranks_say_what_one_says(mode: str, checkpoint: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    with launched(tmp_path, SCENARIO, str(checkpoint), mode, "2") as ranks:
        (code, out, err), (other_code, other_out, other_err) = outputs(ranks)
    assert (code, other_code, other_out) == (0, 0, ""), err + other_err
    assert json.loads(out) == alone


def test_two_ranks_reuse_from_disk_what_one_reuses_and_agree_when_one_has_lost_blocks(
    checkpoint: Path, tmp_path: Path
) -> None:
    program = str(Path(prefix_scenario.__file__))
    with launched(tmp_path, program, str(checkpoint), "tensor", str(tmp_path / "ranks")) as ranks:
        (code, out, err), (other_code, other_out, other_err) = outputs(ranks)
    assert (code, other_code, other_out) == (0, 0, ""), err + other_err
    found = json.loads(out)
    alone = prefix_scenario.turns(load(checkpoint).model, tmp_path / "one", ["."])
    assert (found["first"], found["second"]) == (alone["first"], alone["second"])
    assert found["second"]["cached"] >= 64
    for again in ("damaged", "mended", "missing"):
        assert found[again]["answer"] == found["second"]["answer"]
    # Without agreement, the ranks would have gone on from different lengths.
    assert found["alone"]["tensor-2-0"] == found["mended"]["cached"] == len(prefix_scenario.SECOND) - 1
    assert found["alone"]["tensor-2-1"] == found["damaged"]["cached"] < found["mended"]["cached"]
    assert found["missing"]["cached"] == 0


def generate(folder: Path, *options: str) -> list[str]:
    return ["-m", "lfm_mlx.generate", "--model", str(folder), "--prompt", "Hi", "--temp", "0", *options]


def test_a_rank_that_is_killed_ends_all_with_one_line(checkpoint: Path, tmp_path: Path) -> None:
    arguments = generate(checkpoint, "--tensor-parallel", "2", "--max-tokens", "1500")
    with launched(tmp_path, *arguments) as ranks:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.read(4)
        ranks[1].send_signal(signal.SIGKILL)
        started_s = time.monotonic()
        (code, _, err), _ = outputs(ranks)
    assert time.monotonic() - started_s < PATIENCE_S / 2
    assert code == 1
    told = [line for line in err.splitlines() if not line.startswith("[ring]")]  # MLX's own
    assert told == ["error: rank 1 is gone: its connection was closed; all ranks end, start them again"]


def late(folder: Path, *arguments: str) -> list[list[float]]:
    """The times that both ranks tell."""
    with launched(folder, str(Path(late_scenario.__file__)), *arguments) as ranks:
        found = outputs(ranks)
    assert [(code, err) for code, _, err in found] == [(0, ""), (0, "")]
    return [[float(line) for line in out.split()] for _, out, _ in found]


def test_rank_0_ends_when_the_others_have_come_to_what_is_on_its_way(tmp_path: Path) -> None:
    (ended_s,), (begun_s,) = late(tmp_path)
    assert begun_s < ended_s


def test_threads_of_rank_0_may_share_the_model(checkpoint: Path, tmp_path: Path) -> None:
    assert late(tmp_path, str(checkpoint)) == [[], []]
