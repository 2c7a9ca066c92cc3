"""(B, V) logits -> (B,) token ids on the device, with parameters per row.

Order of operations, in float32:

1. logit bias is added;
2. the mask of allowed tokens: the others become minus infinity;
3. repetition penalty, then frequency, then presence penalty;
4. division by the temperature;
5. top-k, then top-p on what top-k left, then min-p relative to the likeliest token;
6. a draw: the largest score plus Gumbel noise, which is a draw from the softmax of the scores.

Steps 3 to 5 follow transformers' order. A row with temperature 0 takes the likeliest token after step 3, the lowest id
among equals.

The t-th token of a row is a function of its logits, parameters, seed and t: of no other row and of no feature that only
other rows use. It holds bit for bit on one device (tested on the CPU backend); other devices round differently.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from lfm_mlx.errors import OptionError
from lfm_mlx.sampling import noise, penalties, truncation
from lfm_mlx.sampling.options import (
    Features,
    Parameters,
    check_bias,
    effective_window,
    find_features,
    parameter_arrays,
)
from lfm_mlx.types import SamplingParams

State = dict[str, mx.array]
"""What a sampler remembers between tokens, by name, rows on the first axis; a tree that `mx.compile` takes.

``keys`` (B, 2) uint32, the random keys of the next token, and the arrays of `penalties`; only those a feature reads.
"""


class Sampler:
    """Draws the next token of every row of a batch.

    A sampler is a value: its rows never change; `keep` and `join` make new ones. `sample`, `choose` and `advance` are
    pure functions of arrays that evaluate nothing, and can stand inside `mx.compile`. There the options of the rows are
    constants of the graph; a caller whose rows change often compiles the module's `choose` and `advance` once for each
    `Features` and passes `parameters` in.

    Args:
        params: the options of each row, at least one.
        vocab_size: V.

    Attributes:
        params: the options with every seed filled in; a seed of None is replaced by a fresh one.
        vocab_size: V.
        features: what decides the graph.
        parameters: the options as arrays.

    Raises:
        OptionError: there are no rows, or logit_bias names a token outside the vocabulary.
    """

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int) -> None:
        if not params:
            raise OptionError("params is empty, expected the options of at least one row")
        for one in params:
            check_bias(one, vocab_size)
        self.params = tuple(replace(one, seed=fresh_seed()) if one.seed is None else one for one in params)
        self.vocab_size = vocab_size
        self.features = find_features(self.params, vocab_size)
        self.parameters = parameter_arrays(self.params, self.features, vocab_size)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.params)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each row, given or drawn."""
        return tuple(one.seed for one in self.params if one.seed is not None)

    def start(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] | None = None) -> State:
        """The state before the next token.

        Args:
            prompts: the token ids of each row's prompt, all of it, whatever part came from a prefix cache.
            answers: what each row has generated so far, for rows that go on; None: nothing.

        Raises:
            OptionError: the number of prompts or answers is not that of the rows, or a token is outside the vocabulary.
        """
        written = list(answers) if answers is not None else [()] * self.num_rows
        self._check_tokens("prompt", prompts)
        self._check_tokens("answer", written)
        windows = [effective_window(one) for one in self.params]
        state = blank_state(self.features, self.num_rows, self.vocab_size)
        if "keys" in state:
            state["keys"] = noise.seed_keys(self.seeds, [len(answer) for answer in written])
        if "context_counts" in state:
            texts = [[*prompt, *answer] for prompt, answer in zip(prompts, written, strict=True)]
            latest = [penalties.latest_tokens(text, window) for text, window in zip(texts, windows, strict=True)]
            state["context_counts"] = penalties.count_tokens(latest, self.vocab_size)
        if "answer_counts" in state:
            latest = [penalties.latest_tokens(answer, window) for answer, window in zip(written, windows, strict=True)]
            state["answer_counts"] = penalties.count_tokens(latest, self.vocab_size)
        if "recent" in state:
            state["recent"] = penalties.start_ring(prompts, windows, self.vocab_size, written)
            state["index"] = mx.array([len(answer) for answer in written], dtype=mx.uint32)
        return state

    def sample(self, logits: mx.array, state: State, allowed: mx.array | None = None) -> tuple[mx.array, State]:
        """The next token of each row, and the state after it.

        Args:
            logits: (B, V), any float type.
            state: from `start` or the previous call. With no other reference to it, its arrays are updated in place.
            allowed: (B, V) bool, the tokens that may be drawn, at least one a row; None allows all.

        Returns:
            ids (B,) uint32, and the new state.

        Raises:
            OptionError: logits have another shape.
        """
        ids = self.choose(logits, state, allowed)
        return ids, self.advance(state, ids)

    def choose(self, logits: mx.array, state: State, allowed: mx.array | None = None) -> mx.array:
        """The ids (B,) uint32 that `sample` returns; the state is left as it is."""
        expected = (self.num_rows, self.vocab_size)
        if logits.shape != expected:
            raise OptionError(f"logits are {logits.shape}, expected {expected}; pass the last position of each row")
        return choose(self.features, logits, state, self.parameters, allowed)

    def advance(self, state: State, ids: mx.array) -> State:
        """The state after `ids` (B,), drawn or forced by the caller, became the rows' next tokens."""
        return advance(self.features, state, self.parameters, ids)

    def keep(self, state: State, rows: Sequence[int]) -> tuple[Sampler, State]:
        """The sampler and state of some rows, at least one, in the order given; they continue as before."""
        sampler = Sampler([self.params[row] for row in rows], self.vocab_size)
        chosen = mx.array(list(rows), dtype=mx.int32)
        kept = {name: array[chosen] for name, array in state.items()}
        return sampler, fit_state(kept, sampler.features, len(rows), self.vocab_size)

    def join(self, state: State, other: Sampler, other_state: State) -> tuple[Sampler, State]:
        """The sampler and state of these rows followed by those of `other`; all continue as before.

        Raises:
            OptionError: the vocabularies differ.
        """
        if other.vocab_size != self.vocab_size:
            raise OptionError(f"other has a vocabulary of {other.vocab_size}, expected {self.vocab_size}")
        sampler = Sampler([*self.params, *other.params], self.vocab_size)
        first = fit_state(state, sampler.features, self.num_rows, self.vocab_size)
        second = fit_state(other_state, sampler.features, other.num_rows, self.vocab_size)
        return sampler, {name: mx.concatenate([array, second[name]]) for name, array in first.items()}

    def _check_tokens(self, kind: str, rows: Sequence[Sequence[int]]) -> None:
        if len(rows) != self.num_rows:
            raise OptionError(f"{len(rows)} {kind}s were given, expected one for each of {self.num_rows} rows")
        for row, ids in enumerate(rows):
            if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise OptionError(
                    f"the {kind} of row {row} has token ids from {min(ids)} to {max(ids)}, "
                    f"expected 0 to {self.vocab_size - 1}; does the tokenizer belong to this model?"
                )


def choose(
    features: Features, logits: mx.array, state: State, parameters: Parameters, allowed: mx.array | None = None
) -> mx.array:
    """The next token of each row, in the module's order of operations: (B,) uint32.

    Args:
        features: static; all other arguments are arrays.
        logits: (B, V), any float type.
        state: of a `Sampler` with these features.
        parameters: of the same.
        allowed: (B, V) bool or None.
    """
    scores = adjust(features, logits, state, parameters, allowed)
    if not features.is_random:
        return mx.argmax(scores, axis=-1)
    scores = truncate(features, scores / parameters["temperature"][:, None], parameters)
    gumbel = noise.gumbel_noise(state["keys"], scores.shape[-1])
    if features.is_mixed:
        gumbel = mx.where(parameters["is_greedy"][:, None], 0.0, gumbel)
    return mx.argmax(scores + gumbel, axis=-1)


def adjust(
    features: Features, logits: mx.array, state: State, parameters: Parameters, allowed: mx.array | None
) -> mx.array:
    """Logits after bias, mask and penalties; in float32 as soon as there is arithmetic to do."""
    if features.is_random or features.has_logit_bias or features.has_penalty:
        logits = logits.astype(mx.float32)
    if features.has_logit_bias:
        logits = logits + parameters["bias"]
    if allowed is not None:
        logits = mx.where(allowed, logits, truncation.MINUS_INFINITY)
    if features.has_repetition:
        logits = penalties.apply_repetition(logits, state["context_counts"], parameters["repetition"])
    if features.has_frequency:
        logits = penalties.apply_frequency(logits, state["answer_counts"], parameters["frequency"])
    if features.has_presence:
        logits = penalties.apply_presence(logits, state["answer_counts"], parameters["presence"])
    return logits


def truncate(features: Features, scores: mx.array, parameters: Parameters) -> mx.array:
    """Scores with minus infinity for the tokens that top-k, top-p or min-p drop; the likeliest always stays."""
    thresholds = []
    if features.has_top_p:
        thresholds.append(truncation.top_k_top_p_threshold(scores, parameters.get("top_k"), parameters["tail"]))
    elif features.max_top_k:
        thresholds.append(truncation.top_k_threshold(scores, parameters["top_k"], features.max_top_k))
    if features.has_min_p:
        thresholds.append(truncation.min_p_threshold(scores, parameters["log_min_p"]))
    for threshold in thresholds:
        scores = mx.where(scores >= threshold, scores, truncation.MINUS_INFINITY)
    return scores


def advance(features: Features, state: State, parameters: Parameters, ids: mx.array) -> State:
    """The state after `ids` (B,) became the rows' next tokens; arguments as in `choose`."""
    new_state = dict(state)
    if features.is_random:
        new_state["keys"] = noise.next_keys(state["keys"])
    if features.has_penalty:
        new_state.update(penalties.record_tokens(state, ids, parameters["rows"], parameters.get("window")))
    return new_state


def blank_state(features: Features, num_rows: int, vocab_size: int) -> State:
    """The arrays that `features` read, for rows that have seen nothing."""
    state: State = {}
    if features.is_random:
        state["keys"] = mx.zeros((num_rows, 2), dtype=mx.uint32)
    if features.has_repetition:
        state["context_counts"] = mx.zeros((num_rows, vocab_size), dtype=mx.int32)
    if features.counts_answer:
        state["answer_counts"] = mx.zeros((num_rows, vocab_size), dtype=mx.int32)
    if features.max_window:
        state["recent"] = mx.full((num_rows, features.max_window), vocab_size, dtype=mx.uint32)
        state["index"] = mx.zeros((num_rows,), dtype=mx.uint32)
    return state


def fit_state(state: State, features: Features, num_rows: int, vocab_size: int) -> State:
    """`state` with exactly the arrays that `features` read; blank ones where the rows had no use for them so far."""
    blank = blank_state(features, num_rows, vocab_size)
    fitted = {name: state.get(name, array) for name, array in blank.items()}
    if "recent" in fitted:
        # A row only uses as many slots as its own window has, so the ring can be cut or padded on the right.
        ring = fitted["recent"][:, : features.max_window]
        fitted["recent"] = mx.concatenate([ring, blank["recent"][:, ring.shape[1] :]], axis=1)
    return fitted


def fresh_seed() -> int:
    """A seed of 64 bits from the operating system."""
    return secrets.randbits(64)
