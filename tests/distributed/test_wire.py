"""Bytes and collectives on paper; that ranks really send so much is in test_distributed_run."""

from __future__ import annotations

from lfm_mlx.bench.shapes import config_named
from lfm_mlx.distributed.wire import Traffic, draw_traffic, gather_traffic, layers_traffic, step_traffic, sum_traffic


def test_a_ring_sends_what_was_measured_of_it() -> None:
    assert sum_traffic(2048, 4, 2).sent_bytes == 8192
    assert sum_traffic(2048, 2, 4).sent_bytes == 6144
    assert sum_traffic(1, 4, 2).sent_bytes == 8
    assert sum_traffic(1, 4, 4).sent_bytes == 24
    assert gather_traffic(4 * 16, 4, 4).sent_bytes == 192


def test_a_token_of_the_real_model_takes_two_sums_a_layer_and_three_beside() -> None:
    config = config_named("lfm2.5-8b-a1b")
    layers = layers_traffic(config, 2, num_tokens=1, num_last=1, item_bytes=2)
    draw = draw_traffic(config, 2, batch_size=1, item_bytes=2)
    assert layers == Traffic(num_collectives=49, sent_bytes=49 * 4096)
    assert draw == Traffic(num_collectives=2, sent_bytes=128_000 + 8)
    assert step_traffic(config, 2, batch_size=1, item_bytes=2) == layers + draw


def test_the_last_layer_of_a_prompt_sends_its_last_token_only() -> None:
    config = config_named("tiny-moe")
    found = layers_traffic(config, 2, num_tokens=10, num_last=1, item_bytes=4)
    assert found == Traffic(num_collectives=9, sent_bytes=8 * 10 * 1024 + 1024)
