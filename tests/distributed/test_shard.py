"""Ranks in threads of one process: what they compute together is what one computes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from random_models import RandomWeights, random_tokens, relative_error, tiny_config, tiny_dense_config

from lfm_mlx.build import build_model
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.distributed import Mode, RankPart, ShardedWeights, local_config, shard
from lfm_mlx.model import Model

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 96}
MOE = tiny_config(**WIDE, intermediate_size=256, moe_intermediate_size=128)
DENSE = tiny_dense_config(**WIDE, intermediate_size=256)
BIASED = tiny_dense_config(**WIDE, intermediate_size=256, conv_bias=True, tie_word_embeddings=False)
PATIENCE_S = 60.0


class Threads:
    """A group of threads: arrays are computed, laid on a table, and taken from there in the order of ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.table: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def member(self, rank: int) -> Member:
        return Member(self, rank)

    def exchange(self, rank: int, x: mx.array) -> list[mx.array]:
        self.table[rank] = np.array(x.astype(mx.float32))
        self.barrier.wait(PATIENCE_S)
        found = list(self.table)
        self.barrier.wait(PATIENCE_S)
        return [mx.array(array).astype(x.dtype) for array in found]


class Member:
    """One thread's view of them."""

    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank = group, rank

    def sum(self, x: mx.array) -> mx.array:
        first, *others = self.group.exchange(self.rank, x)
        return sum(others, first)

    def gather(self, x: mx.array) -> mx.array:
        return mx.stack(self.group.exchange(self.rank, x))


def weights_of(raw: dict[str, Any], bits: int | None) -> RandomWeights:
    weights = RandomWeights(ModelConfig.from_dict(raw), 0)
    return weights if bits is None else weights.quantize(lambda path: Quantization(group_size=32, bits=bits))


def in_parts(raw: dict[str, Any], bits: int | None, size: int, mode: Mode, run: Callable[[Model], Any]) -> list[Any]:
    """What `run` returns for each rank's model."""
    group, results = Threads(size), [None] * size

    def work(rank: int) -> None:
        part = RankPart(rank=rank, size=size, mode=mode)
        weights = weights_of(raw, bits)
        try:
            built = build_model(
                local_config(ModelConfig.from_dict(raw), part), ShardedWeights(weights, part), mx.float32
            )
            results[rank] = run(shard(built, group.member(rank), part))
        except BaseException:
            group.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return results


def run(model: Model) -> np.ndarray:
    """Logits of two prompts of 40 tokens, and of three tokens of each after them."""
    tokens, state = random_tokens(2, 43, vocab_size=96), model.new_state(2)
    parts = [model(tokens[:, :40], state)] + [model(tokens[:, i : i + 1], state) for i in range(40, 43)]
    return np.array(mx.concatenate(parts, axis=1))


@pytest.mark.parametrize(
    ("raw", "mode", "size", "bits"),
    [
        (MOE, "tensor", 4, 4),
        (MOE, "expert", 2, 4),
        (MOE, "expert", 4, None),
        (DENSE, "tensor", 2, 4),
        (BIASED, "tensor", 2, None),
    ],
)
def test_ranks_compute_together_what_one_computes_alone(
    raw: dict[str, Any], mode: Mode, size: int, bits: int | None
) -> None:
    weights = weights_of(raw, bits)
    alone = run(build_model(ModelConfig.from_dict(raw), weights, mx.float32))
    found = in_parts(raw, bits, size, mode, run)
    assert all(np.array_equal(logits, found[0]) for logits in found)
    assert relative_error(found[0], alone) < 1e-5
