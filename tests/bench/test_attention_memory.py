"""Attention over quantised columns: its error is what 8 or 4 bits cost, and its memory no matrix of scores."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.attention_memory import ask_attention_memory
from lfm_mlx.errors import OptionError


@pytest.mark.parametrize(("kv_bits", "most"), [(8, 0.02), (4, 0.3)])
def test_chunks_cost_nothing_and_bits_little(kv_bits: int, most: float) -> None:
    report = ask_attention_memory(shapes="tiny-moe", columns=1500, num_tokens=40, kv_bits=kv_bits)
    chunks, bits, control = report.results["relative_errors"].values()
    assert chunks < 1e-5
    assert 100 * chunks < bits < most
    assert control > 10 * chunks
    assert report.results["transient_bytes"] > 0


def test_more_tokens_than_columns_are_refused() -> None:
    with pytest.raises(OptionError, match="tokens is 65, expected at most the columns, 64"):
        ask_attention_memory(shapes="tiny-moe", columns=64, num_tokens=65)
