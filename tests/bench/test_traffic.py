"""Bytes and operations of a step, against numbers computed by hand for LFM2.5-8B-A1B."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.sides import Ours
from lfm_mlx.bench.traffic import kv_bytes_per_position, prefill_operations, step_weight_bytes, touched_share


@pytest.mark.parametrize(("batch_size", "megabytes_per_row"), [(1, 948), (4, 552), (16, 266)])
def test_a_row_reads_fewer_bytes_in_a_larger_batch(ours: Ours, batch_size: int, megabytes_per_row: float) -> None:
    assert step_weight_bytes(ours.model, batch_size) / batch_size / 1e6 == pytest.approx(megabytes_per_row, rel=0.01)


def test_a_position_takes_the_keys_and_values_of_all_attention_layers(ours: Ours) -> None:
    rows = ours.new_rows([100], capacity=101, is_view=True)
    assert kv_bytes_per_position(rows.state) == ours.config.kv_bytes_per_token == 12_288


def test_experts_are_all_touched_by_many_rows(ours: Ours) -> None:
    assert touched_share(ours.config, 1) == 4 / 32
    assert touched_share(ours.config, 1000) == pytest.approx(1)


def test_a_prompt_token_takes_two_operations_an_active_parameter(ours: Ours) -> None:
    # 1.686 billion active parameters, of which the embedding (the head, once) has 262 million.
    per_token = (prefill_operations(ours.config, 2) - prefill_operations(ours.config, 1)) / 2
    assert per_token == pytest.approx(1_685_667_264 - 128000 * 2048, rel=0.001)
