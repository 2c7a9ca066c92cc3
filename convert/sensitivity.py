"""How much a model's predictions suffer from noise in each matrix, found by passing back through it once.

Noise of variance n in one weight moves the predictions on a text by a Kullback-Leibler divergence of about n G^2 / 2,
where G is the gradient of the text's log-probability by that weight, each token drawn from the model's own prediction
(the Fisher information; noise in different weights adds up). Layers stream past twice, forwards and backwards; one of
them is in memory at a time, beside what each layer got as input.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.kernels import KERNELS_VARIABLE, Routing, without_blocks
from lfm_mlx.model import Block, Embedding, MoE
from lfm_mlx.names import EMBEDDING, HEAD, expected_tensors

from .calibration import listen, token_sequences
from .layerwise import HEAD_TOKENS, Layerwise, step_through

MAX_TOKENS = 2048
"""Tokens that are passed back; what layers got as input is kept for so many."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How noise in a matrix is weighed.

    Args:
        columns: float32 (experts, in), one expert for a matrix that is alone: the squares of the gradients by the
            weights of a column, summed over its rows, for each token of the text. With the mean noise of each column,
            half the sum of products is the divergence.
    """

    columns: mx.array


def measure_sensitivity(source: Path, text: str) -> dict[str, tuple[Sensitivity, ...]]:
    """Pass a text forwards and back.

    Args:
        source: an unquantised checkpoint with a tokenizer.
        text: what the model is to be good at; `MAX_TOKENS` of it are used.

    Returns:
        By our tensor's name what its noise does, in each place where the matrix is used.

    Raises:
        OptionError: the text is too short.
    """
    model = Layerwise(source)
    sequences = _first(token_sequences(model, source, text), MAX_TOKENS)
    num_tokens = sum(map(len, sequences))
    inputs = [model.embed(sequences)]
    found: dict[str, tuple[Sensitivity, ...]] = {}
    with _stock_operations():
        for index in range(model.config.num_layers):
            block = model.layer(index)
            inputs.append([step_through(block, x).hidden for x in inputs[-1]])
            mx.eval(inputs[-1])
            del block
            mx.clear_cache()
        head, gradients = _pass_head(model, inputs.pop(), num_tokens)
        for index in reversed(range(model.config.num_layers)):
            measured, gradients = _pass_layer(model, index, inputs.pop(), gradients, num_tokens)
            found |= measured
    found[EMBEDDING] = (_looked_up(sequences, gradients, num_tokens),)
    if model.config.tie_embeddings:
        found[EMBEDDING] += (head,)
    else:
        found[HEAD] = (head,)
    mx.eval([each.columns for places in found.values() for each in places])
    return found


def _looked_up(sequences: Sequence[Sequence[int]], gradients: Sequence[mx.array], num_tokens: int) -> Sensitivity:
    """The sensitivity of the table of tokens where it is looked up: a token that comes again brings its noise again."""
    total = mx.array(0.0)
    for ids, gradient in zip(sequences, gradients, strict=True):
        seen, places = np.unique(ids, return_inverse=True)
        by_token = mx.zeros((len(seen), gradient.shape[-1]))
        by_token = by_token.at[mx.array(places.astype(np.uint32))].add(gradient[0].astype(mx.float32))
        total = total + mx.square(by_token).sum(axis=0)
    return Sensitivity(columns=total[None] / num_tokens)


def _first(sequences: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    kept: list[list[int]] = []
    for ids in sequences:
        if kept and sum(map(len, kept)) + len(ids) > num_tokens:
            break
        kept.append(ids)
    return kept


@contextlib.contextmanager
def _stock_operations() -> Iterator[None]:
    """Without the fused kernels, which cannot be passed back through."""
    before = os.environ.get(KERNELS_VARIABLE)
    os.environ[KERNELS_VARIABLE] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ[KERNELS_VARIABLE]
        else:
            os.environ[KERNELS_VARIABLE] = before


def _pass_head(model: Layerwise, hidden: Sequence[mx.array], num_tokens: int) -> tuple[Sensitivity, list[mx.array]]:
    """The head's sensitivity, and the gradient of a drawn token's log-probability by `hidden`, of the same shapes."""
    norm, head = model.head()
    key = mx.random.key(0)
    columns = mx.array(0.0)
    gradients = []
    for x in hidden:
        parts = []
        for first in range(0, x.shape[1], HEAD_TOKENS):
            key, now = mx.random.split(key)
            normed, back = _with_vjp(norm, x[:, first : first + HEAD_TOKENS])
            logits, back_to_norm = _with_vjp(head.as_linear if isinstance(head, Embedding) else head, normed)
            likely = mx.softmax(logits.astype(mx.float32), axis=-1)
            drawn = mx.random.categorical(logits.astype(mx.float32), key=now)
            one_hot = mx.arange(likely.shape[-1]) == drawn[..., None]
            parts.append(back(back_to_norm((one_hot - likely).astype(logits.dtype))))
            spread = (likely * (1 - likely)).sum(axis=-1, keepdims=True)  # the mean over all drawn tokens is known here
            columns = columns + (spread * mx.square(normed.astype(mx.float32))).sum(axis=(0, 1))
            mx.eval(parts, columns)
        gradients.append(mx.concatenate(parts, axis=1))
    mx.eval(gradients)
    return Sensitivity(columns=columns[None] / num_tokens), gradients


def _with_vjp(function: Any, x: mx.array) -> tuple[mx.array, Any]:
    """The value at `x`, and what takes a gradient by the value to one by `x`."""
    value = function(x)
    return value, lambda gradient: mx.vjp(function, [x], [gradient])[1][0]


def _pass_layer(
    model: Layerwise, index: int, inputs: Sequence[mx.array], gradients: Sequence[mx.array], num_tokens: int
) -> tuple[dict[str, tuple[Sensitivity, ...]], list[mx.array]]:
    """The sensitivity of a layer's matrices, and the gradients by its inputs."""
    block = model.layer(index)
    probes = listen(block, f"model.layers.{index}", model.config, _Probe)
    shapes = expected_tensors(model.config)
    heights = [[shapes[name][-2] for name in names] for _, names in probes]
    passed = []
    for x, gradient in zip(inputs, gradients, strict=True):
        passed.append(_pass_back(block, [probe for probe, _ in probes], heights, x, gradient))
        mx.eval(passed[-1])
        mx.clear_cache()
    measured: dict[str, tuple[Sensitivity, ...]] = {}
    for (probe, names), each in zip(probes, heights, strict=True):
        found = probe.sensitivities(each, shapes[names[0]][-1], num_tokens)
        measured |= {name: (one,) for name, one in zip(names, found, strict=True)}
    return measured, passed


def _pass_back(
    block: Block, probes: Sequence[_Probe], heights: Sequence[Sequence[int]], x: mx.array, gradient: mx.array
) -> mx.array:
    with without_blocks(), _fixed_experts(block, step_through(block, x).experts):
        return _vjp(block, probes, heights, x, gradient)


@contextlib.contextmanager
def _fixed_experts(block: Block, chosen: mx.array | None) -> Iterator[None]:
    """The choice of experts is no function that has a gradient: within the block it is what it was."""
    feed_forward = block.feed_forward
    if not isinstance(feed_forward, MoE):
        yield
        return
    assert chosen is not None
    experts = chosen.astype(mx.uint32)
    mx.eval(experts)

    def route(tokens: mx.array) -> Routing:
        return Routing(experts, mx.take_along_axis(feed_forward.gate(tokens), experts, axis=-1), False)

    usual = feed_forward.route
    object.__setattr__(feed_forward, "route", route)
    try:
        yield
    finally:
        object.__setattr__(feed_forward, "route", usual)


def _vjp(
    block: Block, probes: Sequence[_Probe], heights: Sequence[Sequence[int]], x: mx.array, gradient: mx.array
) -> mx.array:
    step_through(block, x)  # tells the probes their shapes; nothing of it is computed

    def run(x: mx.array, *shifts: mx.array) -> list[mx.array]:
        for probe, shift in zip(probes, shifts, strict=True):
            probe.shift = shift
        hidden = step_through(block, x).hidden
        return [hidden, *(probe.x for probe in probes)]

    shifts = [mx.zeros(probe.shape, x.dtype) for probe in probes]
    still = [mx.zeros_like(probe.x) for probe in probes]
    outputs, (by_input, *by_output) = mx.vjp(run, [x, *shifts], [gradient, *still])
    for probe, each, seen, found in zip(probes, heights, outputs[1:], by_output, strict=True):
        probe.add(seen, found, each)
        probe.shift = None
    return by_input


class _Probe:
    """A matrix that remembers the squares of the gradients by its weights."""

    def __init__(self, inner: Any, num_experts: int) -> None:
        self.inner = inner
        self.num_experts = num_experts
        self.shift: mx.array | None = None
        self.squares: dict[tuple[int, int], mx.array] = {}

    def __call__(self, x: mx.array, experts: mx.array | None = None, *rest: Any, **named: Any) -> mx.array:
        made: mx.array = self.inner(x) if experts is None else self.inner(x, experts, *rest, **named)
        self.x, self.experts, self.shape = x, experts, made.shape
        return made if self.shift is None else made + self.shift

    def add(self, x: mx.array, gradient: mx.array, heights: Sequence[int]) -> None:
        """Take in a sequence.

        Args:
            x: inputs (..., in).
            gradient: by the outputs (..., out).
            heights: rows of each of the matrices that lie in this one.
        """
        x, gradient = (array.astype(mx.float32).reshape(-1, array.shape[-1]) for array in (x, gradient))
        ends = list(itertools.accumulate(heights))
        for expert, rows in enumerate(self._rows(len(x))):
            if rows is None:
                continue
            for i, (end, height) in enumerate(zip(ends, heights, strict=True)):
                by_weight = gradient[rows][:, end - height : end].T @ x[rows]
                before = self.squares.get((i, expert), mx.array(0.0))
                self.squares[i, expert] = before + mx.square(by_weight).sum(axis=0)
            mx.eval(self.squares)

    def _rows(self, count: int) -> list[mx.array | slice | None]:
        """For each expert its rows of a sequence, None where it has none."""
        if self.experts is None:
            return [slice(0, count)]
        chosen = np.array(self.experts.flatten())
        found = [np.flatnonzero(chosen == expert).astype(np.uint32) for expert in range(self.num_experts)]
        return [mx.array(rows) if len(rows) else None for rows in found]

    def sensitivities(self, heights: Sequence[int], width: int, num_tokens: int) -> list[Sensitivity]:
        """One for each of the matrices of so many rows that lie in this one."""
        nothing = mx.zeros((width,))
        stacks = (
            mx.stack([self.squares.get((i, expert), nothing) for expert in range(max(1, self.num_experts))])
            for i in range(len(heights))
        )
        return [Sensitivity(columns=stack / num_tokens) for stack in stacks]
