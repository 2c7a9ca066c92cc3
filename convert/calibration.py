"""Which columns of each matrix matter: the mean square of its inputs over some text.

The error that a column's rounding makes in a matrix's output grows with the square of the column's input, so this is
the weight of its error in the search for scales. Layers stream past: one of them is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import OptionError
from lfm_mlx.model import Block, MoE
from lfm_mlx.names import dense_matrices
from lfm_mlx.tokenizer import load_tokenizer

from .layerwise import Layerwise, step_through
from .segments import Segment

SEQUENCE_TOKENS = 512
_FEWEST_TOKENS = 64
_PRIOR_TOKENS = 32.0
"""An expert that saw few tokens leans on the mean of all experts as if it had seen so many with it."""


def calibrate(source: Path, text: str, file: Path) -> dict[str, Segment]:
    """Measure the inputs of every matrix.

    Args:
        source: an unquantised checkpoint with a tokenizer.
        text: what the model is to be good at; some thousand tokens.
        file: where the float32 results are written.

    Returns:
        By our tensor's name where its row is, or one row for each expert.

    Raises:
        OptionError: the text is too short.
    """
    model = Layerwise(source)
    config = model.config
    sequences = token_sequences(model, source, text)
    measured: dict[str, mx.array] = {}
    hidden = model.embed(sequences)
    for index in range(config.num_layers):
        block = model.layer(index)
        recorders = listen(block, f"model.layers.{index}", config, _Recorder)
        hidden = [step_through(block, x).hidden for x in hidden]
        mx.eval(hidden)
        measured |= {name: recorder.mean_square() for recorder, names in recorders for name in names}
        del block
        mx.clear_cache()
    return _written(measured, file)


def token_sequences(model: Layerwise, source: Path, text: str) -> list[list[int]]:
    """The ids of a text in sequences of at most `SEQUENCE_TOKENS`.

    Raises:
        OptionError: the text is too short.
    """
    config = model.config
    tokenizer = load_tokenizer(source, config_eos_ids=config.eos_token_ids, model_vocab_size=config.vocab_size)
    ids = tokenizer.encode(text)
    starts = range(0, len(ids), SEQUENCE_TOKENS)
    sequences = [chunk for start in starts if len(chunk := ids[start : start + SEQUENCE_TOKENS]) >= _FEWEST_TOKENS]
    if not sequences:
        raise OptionError(f"calibrate has {len(ids)} tokens of text, expected at least {_FEWEST_TOKENS}; give more")
    return sequences


Listener = TypeVar("Listener")


def listen(
    block: Block, path: str, config: ModelConfig, make: Callable[[Any, int], Listener]
) -> list[tuple[Listener, list[str]]]:
    """Put a listener in the place of each matrix of a layer.

    Args:
        block: the layer; it is changed.
        path: its name.
        config: the model's.
        make: makes a listener of a matrix and the number of experts in it, 0 for a matrix that is alone.

    Returns:
        The listeners, with each the names of the tensors that lie in its matrix, row-wise.
    """
    operator, feed_forward = block.operator, block.feed_forward
    num_experts = config.num_experts
    gate, up, down = dense_matrices(config)
    listened: list[tuple[Any, str, list[str], int]]
    if hasattr(operator, "qkv_proj"):
        listened = [
            (operator, "qkv_proj", [f"{path}.self_attn.{which}_proj.weight" for which in "qkv"], 0),
            (operator, "out_proj", [f"{path}.self_attn.out_proj.weight"], 0),
        ]
    else:
        listened = [(operator, f"{name}_proj", [f"{path}.conv.{name}_proj.weight"], 0) for name in ("in", "out")]
    if isinstance(feed_forward, MoE):
        experts = f"{path}.feed_forward.switch_mlp"
        both = [f"{experts}.gate_proj.weight", f"{experts}.up_proj.weight"]
        listened += [
            (feed_forward, "gate", [f"{path}.feed_forward.gate.weight"], 0),
            (feed_forward, "gate_up_proj", both, num_experts),
            (feed_forward, "down_proj", [f"{experts}.down_proj.weight"], num_experts),
        ]
    else:
        both = [f"{path}.feed_forward.{name}.weight" for name in (gate, up)]
        listened += [
            (feed_forward, "gate_up_proj", both, 0),
            (feed_forward, "down_proj", [f"{path}.feed_forward.{down}.weight"], 0),
        ]
    listeners = []
    for owner, attribute, names, count in listened:
        listener = make(getattr(owner, attribute), count)
        setattr(owner, attribute, listener)
        listeners.append((listener, names))
    return listeners


class _Recorder:
    """A matrix that remembers the squares of what it was multiplied with."""

    def __init__(self, inner: Any, num_experts: int) -> None:
        self.inner = inner
        self.num_experts = num_experts
        self.total: mx.array | None = None
        self.counts = mx.zeros((max(1, num_experts),))

    def __call__(self, x: mx.array, experts: mx.array | None = None, *rest: Any, **named: Any) -> mx.array:
        squares = mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if self.total is None:
            self.total = mx.zeros((max(1, self.num_experts), x.shape[-1]))
        rows = mx.zeros((len(squares),), mx.uint32) if experts is None else experts.flatten()
        self.total = self.total.at[rows].add(squares)
        self.counts = self.counts.at[rows].add(1.0)
        mx.eval(self.total, self.counts)
        made: mx.array = self.inner(x) if experts is None else self.inner(x, experts, *rest, **named)
        return made

    def mean_square(self) -> mx.array:
        """Float32 (1, in), or (experts, in)."""
        assert self.total is not None
        shared = self.total.sum(axis=0, keepdims=True) / mx.maximum(self.counts.sum(), 1.0)
        if not self.num_experts:
            return shared
        return (self.total + _PRIOR_TOKENS * shared) / (self.counts[:, None] + _PRIOR_TOKENS)


def _written(measured: dict[str, mx.array], file: Path) -> dict[str, Segment]:
    places, offset = {}, 0
    with file.open("wb") as stream:
        for name, values in measured.items():
            num_rows, width = values.shape
            stream.write(np.array(values, np.float32).tobytes())
            places[name] = Segment(file=file, offset=offset, num_rows=num_rows, row_bytes=4 * width, dtype="F32")
            offset += values.nbytes
    return places


def read_text(files: Sequence[Path]) -> str:
    """The text of files, joined.

    Raises:
        OptionError: one cannot be read.
    """
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, ValueError) as error:
        raise OptionError(f"calibrate: {error}; expected a file of text") from error
