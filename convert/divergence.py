"""How far a converted model is from its source: layer by layer, and in what it predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .layerwise import Layerwise, step_through

Column = NDArray[np.float32]
"""A number for each predicted token."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What one layer's output has become.

    Args:
        error: root mean square of the difference, relative to that of the source's output.
        changed_experts: share of tokens for which other experts were chosen; None in a dense layer.
    """

    error: float
    changed_experts: float | None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How two models predict the next tokens of the same text.

    Args:
        num_tokens: predictions compared.
        perplexity_source, perplexity: of the source and of the converted model.
        kl_mean, kl_p99: Kullback-Leibler divergence from the source's distribution in nats, mean and 99th percentile.
        top1_agreement: share of tokens where both find the same token likeliest.
    """

    num_tokens: int
    perplexity_source: float
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Both, for some sequences; `predictions` has one entry for each group of them."""

    layers: tuple[LayerError, ...]
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Ids of which those from `start` on are predicted."""

    ids: tuple[int, ...]
    start: int = 1


def measure_divergence(source: Layerwise, converted: Layerwise, groups: Sequence[Sequence[Scored]]) -> Divergence:
    """Run both models over the same sequences, one layer of each in memory at a time.

    Args:
        source: the unquantised model.
        converted: the other one.
        groups: sequences whose predictions are told together; one that predicts nothing is left out.
    """
    groups = [[item for item in group if len(item.ids) > item.start] for group in groups]
    ids = [item.ids for group in groups for item in group]
    first, second = source.embed(ids), converted.embed(ids)
    layers = []
    for index in range(source.config.num_layers):
        error, first, second = _layer(source, converted, index, first, second)
        layers.append(error)
    pairs = zip(source.logits(first), converted.logits(second), strict=True)
    predictions = []
    for group in groups:
        found = [_compare(item, pairs) for item in group]
        predictions.append(_summed([np.concatenate(column) for column in zip(*found, strict=True)]))
    return Divergence(layers=tuple(layers), predictions=tuple(predictions))


def _layer(
    source: Layerwise, converted: Layerwise, index: int, first: list[mx.array], second: list[mx.array]
) -> tuple[LayerError, list[mx.array], list[mx.array]]:
    blocks = source.layer(index), converted.layer(index)
    difference = size = 0.0
    changed = num_tokens = 0
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        a, b = step_through(blocks[0], x), step_through(blocks[1], y)
        wanted, found = a.hidden.astype(mx.float32), b.hidden.astype(mx.float32)
        sums = mx.square(found - wanted).sum(), mx.square(wanted).sum()
        mx.eval(sums, a.hidden, b.hidden)
        difference += float(np.array(sums[0]))
        size += float(np.array(sums[1]))
        if a.experts is not None and b.experts is not None:
            changed += int(np.array((a.experts != b.experts).any(axis=-1).sum()))
        num_tokens += x.shape[1]
        first[i], second[i] = a.hidden, b.hidden
    mx.clear_cache()
    has_experts = source.config.has_experts(index)
    error = LayerError(
        error=math.sqrt(difference / max(size, 1e-30)), changed_experts=changed / num_tokens if has_experts else None
    )
    return error, first, second


def _compare(item: Scored, pairs: Iterator[tuple[mx.array, mx.array]]) -> tuple[Column, ...]:
    """For each predicted token: log-probability in both models, divergence, whether the likeliest is the same."""
    columns: list[list[Column]] = [[], [], [], []]
    done = 0
    while done < len(item.ids):
        a, b = next(pairs)
        log_a, log_b = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (a, b))
        divergence = (mx.exp(log_a) * (log_a - log_b)).sum(axis=-1)
        is_same = mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)
        nexts = mx.array([*item.ids[done + 1 : done + 1 + a.shape[0]], 0][: a.shape[0]])[:, None]
        chosen = [mx.take_along_axis(log, nexts, axis=-1)[:, 0] for log in (log_a, log_b)]
        for column, array in zip(columns, (*chosen, divergence, is_same), strict=True):
            column.append(np.array(array))
        done += a.shape[0]
    # The last token predicts nothing that is known.
    return tuple(np.concatenate(column)[item.start - 1 : len(item.ids) - 1] for column in columns)


def _summed(columns: Sequence[Column]) -> Prediction:
    log_source, log_converted, divergence, is_same = columns
    return Prediction(
        num_tokens=len(divergence),
        perplexity_source=float(np.exp(-log_source.mean())),
        perplexity=float(np.exp(-log_converted.mean())),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.percentile(divergence, 99)),
        top1_agreement=float(is_same.mean()),
    )
