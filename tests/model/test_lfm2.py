"""The module tree: what it takes, what it refuses, and that nothing in it waits for the device."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx.core as mx
import pytest
from random_models import random_tokens, relative_error, tiny_config, tiny_dense_config, tiny_model

import lfm_mlx
from lfm_mlx.errors import OptionError

PACKAGE = Path(lfm_mlx.__file__).parent
OUTSIDE = {PACKAGE / path for path in ("kernels/verdict.py", "cache/block_file.py", "kernels/cpu_attention.py")}
"""Tries kernels out before their first use, and has to wait for the results; reads files, between steps; the CPU's."""
FORWARD = sorted(
    path
    for room in ("model", "cache", "sampling", "kernels")
    for path in (PACKAGE / room).glob("*.py")
    if path not in OUTSIDE
)

WAITING = {"item", "tolist", "asarray"}
"""Methods that copy an array to the host and so wait for it."""


def waits(source: str) -> list[str]:
    """The places in a file where an array would be read on the host."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"line {node.lineno}: imports numpy" for name in names if name.split(".")[0] == "numpy"]
        elif isinstance(node, ast.Attribute) and node.attr in WAITING:
            found.append(f"line {node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "memoryview":
            found.append(f"line {node.lineno}: memoryview")
    return found


@pytest.mark.parametrize("path", FORWARD, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_in_the_forward_pass_reads_an_array_on_the_host(path):
    assert waits(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source", ["import numpy as np", "from numpy import array", "x = y.item()", "x = y[0].tolist()", "memoryview(x)"]
)
def test_control_a_read_on_the_host_is_found(source):
    assert len(waits(source)) == 1


@pytest.mark.parametrize(
    "tokens", [mx.array([1, 2]), mx.zeros((1, 0), mx.int32), mx.zeros((1, 2, 3), mx.int32)], ids=str
)
def test_tokens_of_another_shape_are_refused(moe_model, tokens):
    with pytest.raises(OptionError, match=r"tokens has shape \(.*\), expected \(rows, tokens\), both at least 1"):
        moe_model(tokens)


def test_rows_that_do_not_fit_the_state_or_the_lengths_are_refused_without_effect(moe_model):
    state = moe_model.new_state(2)
    with pytest.raises(OptionError, match="tokens has 3 rows, but the state has 2"):
        moe_model(random_tokens(3, 4), state)
    with pytest.raises(OptionError, match=r"lengths is \[5, 1\], expected 2 whole numbers"):
        moe_model(random_tokens(2, 4), state, lengths=[5, 1])
    assert state.lengths == (0, 0)


def test_logits_are_the_head_of_the_hidden_states(moe_model):
    tokens = random_tokens(2, 6)
    hidden = moe_model.hidden(tokens)
    assert hidden.shape == (2, 6, 32)
    assert mx.array_equal(moe_model.head(hidden), moe_model(tokens))
    assert relative_error(moe_model.head(hidden[:, -1]), moe_model(tokens)[:, -1]) < 1e-6


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_model_has_no_head_of_its_own(is_tied):
    model = tiny_model(tiny_dense_config(tie_word_embeddings=is_tied))
    assert ("lm_head" in model) != is_tied
    hidden = model.hidden(random_tokens(1, 4))
    before = model.head(hidden)
    model.embed_tokens.table.weight = model.embed_tokens.table.weight[::-1]
    assert mx.array_equal(model.head(hidden), before).item() is not is_tied


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_activations_and_state_are_in_the_model_s_dtype(dtype):
    model = tiny_model(tiny_dense_config(), dtype=dtype)
    state = model.new_state()
    assert model(random_tokens(1, 4), state).dtype == dtype
    assert {array.dtype for array in state.arrays} == {dtype}


def test_the_same_tokens_give_the_same_logits_bit_for_bit_whether_remembered_or_not(moe_model):
    tokens = random_tokens(1, 20)
    assert mx.array_equal(moe_model(tokens), moe_model(tokens, moe_model.new_state()))


def test_a_model_of_convolutions_only_or_attention_only_works():
    for kind in ("conv", "full_attention"):
        model = tiny_model(tiny_config(layer_types=[kind] * 4))
        tokens, state = random_tokens(1, 10), model.new_state()
        parts = [model(tokens[:, i : i + 1], state) for i in range(10)]
        assert relative_error(mx.concatenate(parts, axis=1), model(tokens)) < 1e-5
