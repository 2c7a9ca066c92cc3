"""What ranks have to tell each other: bytes that each sends and collectives that it waits for, counted on paper.

A ring adds up an array in 2 (N - 1) rounds, in each of which every rank sends one N-th of it, and gathers in N - 1
rounds of a whole part. The notes of `lfm_mlx.distributed.link` come on top: some hundred bytes a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm_mlx.config import ModelConfig

ID_BYTES = 4
"""Of a token id."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends, and how often it waits.

    Args:
        num_collectives: sums and gathers, each of which all ranks have to reach.
        sent_bytes: that one rank sends in them.
    """

    num_collectives: int
    sent_bytes: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            num_collectives=self.num_collectives + other.num_collectives, sent_bytes=self.sent_bytes + other.sent_bytes
        )


def sum_traffic(num_values: int, item_bytes: int, size: int) -> Traffic:
    """Of one sum of so many values over `size` ranks."""
    return Traffic(num_collectives=1, sent_bytes=2 * (size - 1) * -(-num_values // size) * item_bytes)


def gather_traffic(num_values: int, item_bytes: int, size: int) -> Traffic:
    """Of putting together so many values, of which each rank has an equal part."""
    return Traffic(num_collectives=1, sent_bytes=(size - 1) * num_values // size * item_bytes)


def draw_traffic(config: ModelConfig, size: int, *, batch_size: int, item_bytes: int) -> Traffic:
    """Of drawing a token a row: the logits of all ranks side by side, and rank 0's choice.

    Args:
        config: the whole model's.
        size: ranks.
        batch_size: rows.
        item_bytes: of an activation.
    """
    logits = gather_traffic(batch_size * config.vocab_size, item_bytes, size)
    return logits + sum_traffic(batch_size, ID_BYTES, size)


def layers_traffic(config: ModelConfig, size: int, *, num_tokens: int, num_last: int, item_bytes: int) -> Traffic:
    """Of taking tokens through embedding and layers.

    Args:
        config: the whole model's.
        size: ranks.
        num_tokens: of all rows together.
        num_last: those that the last layer's second half is computed for: all in a decode step, one a row in a prompt.
        item_bytes: of an activation.
    """
    whole = sum_traffic(num_tokens * config.hidden_size, item_bytes, size)
    last = sum_traffic(num_last * config.hidden_size, item_bytes, size)
    num_whole = 2 * config.num_layers  # The embedding, and two a layer but for the last one's second.
    return Traffic(num_collectives=num_whole + 1, sent_bytes=num_whole * whole.sent_bytes + last.sent_bytes)


def step_traffic(config: ModelConfig, size: int, *, batch_size: int, item_bytes: int) -> Traffic:
    """Of one decode step, its draw included; arguments as for `draw_traffic`."""
    layers = layers_traffic(config, size, num_tokens=batch_size, num_last=batch_size, item_bytes=item_bytes)
    return layers + draw_traffic(config, size, batch_size=batch_size, item_bytes=item_bytes)
