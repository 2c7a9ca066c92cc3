"""What a question is asked about."""

from __future__ import annotations

import mlx.core as mx
import pytest

from lfm_mlx.bench import subject as module
from lfm_mlx.bench.subject import Subject, uneven_lengths
from lfm_mlx.errors import MemoryPlanError, OptionError


@pytest.mark.parametrize(("batch_size", "context"), [(1, 1), (4, 1000), (16, 16), (16, 1024)])
def test_rows_end_at_the_context_and_differ(batch_size: int, context: int) -> None:
    lengths = uneven_lengths(batch_size, context)
    assert max(lengths) == context
    assert min(lengths) >= 1
    assert len(set(lengths)) == len(lengths) == batch_size


def test_rows_of_one_token_cannot_differ() -> None:
    assert uneven_lengths(3, 1) == [1, 1, 1]


def test_two_copies_of_the_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_bytes", lambda: 1_000_000)
    with pytest.raises(MemoryPlanError, match="weights twice"):
        Subject(shapes="tiny-dense", peer=True).to_run()
    assert len(Subject(shapes="tiny-dense").to_run()) == 1


def test_quantised_keys_are_not_compared_with_a_peer() -> None:
    with pytest.raises(OptionError, match="kv_bits is 8"):
        Subject(kv_bits=8, peer=True)


def test_a_named_geometry_has_no_folder() -> None:
    with pytest.raises(OptionError, match="no checkpoint"):
        assert Subject(shapes="tiny-moe").folder


def test_the_card_of_the_model_decides_how_it_samples() -> None:
    assert Subject().sampling().top_k == 80
    assert Subject(shapes="lfm2.5-230m").sampling().top_k == 50


def test_sides_that_take_no_memory_are_compiled_whatever_the_device() -> None:
    (ours,) = Subject(shapes="tiny-moe").without_memory()
    assert ours.stepper.is_compiled  # type: ignore[attr-defined]
    assert ours.model.dtype == mx.bfloat16  # type: ignore[attr-defined]
