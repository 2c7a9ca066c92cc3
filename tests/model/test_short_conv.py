"""The short convolution against plain NumPy, whole, in chunks and one token at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_models import relative_error, tiny_config, tiny_model

from lfm_mlx.cache import ConvState, Span
from lfm_mlx.model import ShortConv

TOLERANCE = 1e-5
NUM_TOKENS = 11


@pytest.fixture(scope="module", params=[(3, False), (3, True), (2, False), (5, True)], ids=str)
def conv(request) -> ShortConv:
    taps, has_bias = request.param
    return tiny_model(tiny_config(conv_L_cache=taps, conv_bias=has_bias)).layers[0].operator


def hidden(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, NUM_TOKENS, 32)).astype(np.float32)


def reference(conv: ShortConv, x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """``out(C * conv(B * x))``, written out: tap W - 1 multiplies the current token."""

    def linear(matrix, values):
        y = values @ np.array(matrix.weight).T
        return y + np.array(matrix.bias) if "bias" in matrix else y

    gate_in, gate_out, value = np.split(linear(conv.in_proj, x), 3, axis=-1)
    gated = gate_in * value
    mixed = np.zeros_like(gated)
    for position in range(x.shape[1]):
        for tap in range(len(taps)):
            source = position - (len(taps) - 1) + tap
            if source >= 0:
                mixed[:, position] += taps[tap] * gated[:, source]
    if "bias" in conv:
        mixed += np.array(conv.bias)
    return linear(conv.out_proj, gate_out * mixed)


def new_state(conv: ShortConv) -> ConvState:
    return ConvState.zeros(2, len(conv.taps) - 1, 32, mx.float32)


def token(x: mx.array, position: int) -> mx.array:
    """One token a row of `x` (B, L, D), in the shape of a step: (B, 1, 1, D)."""
    return x[:, position, None, None]


def test_a_whole_sequence_gives_what_numpy_gives(conv):
    x, taps = hidden(), np.stack([np.array(tap) for tap in conv.taps])
    span = Span.make((0, 0), NUM_TOKENS)
    for state in (None, new_state(conv)):
        found = conv(mx.array(x), state, span)
        assert relative_error(found, reference(conv, x, taps)) < TOLERANCE
        assert relative_error(found, reference(conv, x, taps[::-1])) > 0.1


def test_steps_give_what_the_whole_sequence_gives(conv):
    x = mx.array(hidden())
    expected = conv(x, None, Span.make((0, 0), NUM_TOKENS))
    rows, parts = new_state(conv).rows, []
    for i in range(NUM_TOKENS):
        y, rows = conv.step(token(x, i), rows)
        parts.append(y[:, 0])
    assert relative_error(mx.concatenate(parts, axis=1), expected) < TOLERANCE
    forgotten = [conv.step(token(x, i), new_state(conv).rows)[0][:, 0] for i in range(NUM_TOKENS)]
    assert relative_error(mx.concatenate(forgotten, axis=1), expected) > 0.1


def test_a_step_remembers_what_a_call_remembers(conv):
    x = mx.array(hidden())
    state = new_state(conv)
    conv(x[:, :5], state, Span.make((0, 0), 5))
    _, stepped = conv.step(token(x, 5), state.rows)
    conv(x[:, 5:6], state, Span.make((5, 5), 1))
    for found, expected in zip(stepped, state.rows, strict=True):
        assert relative_error(found, expected) < TOLERANCE


def test_a_token_reaches_exactly_as_many_outputs_as_there_are_taps(conv):
    x = hidden()
    changed = x.copy()
    changed[:, 2] += 1
    span = Span.make((0, 0), NUM_TOKENS)
    difference = np.abs(np.array(conv(mx.array(x), None, span) - conv(mx.array(changed), None, span))).max(axis=(0, 2))
    num_taps = len(conv.taps)
    assert (difference[2 : 2 + num_taps] > 1e-3).all()
    assert (difference[:2] == 0).all()
    assert (difference[2 + num_taps :] == 0).all()


def test_many_tokens_of_one_row_are_convolved_in_blocks(conv, monkeypatch):
    x = mx.array(hidden()[:1])
    span = Span.make((0,), NUM_TOKENS)
    expected = conv(x, None, span)
    monkeypatch.setattr("lfm_mlx.model.short_conv.BLOCK_TOKENS", 4)
    found = conv(x, None, span)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(conv(x[:, ::-1], None, span), expected) > 0.1
