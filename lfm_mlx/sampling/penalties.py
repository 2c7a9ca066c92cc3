"""Repetition, presence and frequency penalties over a window of the latest tokens of each row.

The state is dense counts, one number per row and token, so that a penalty is elementwise arithmetic and a new token is
one scatter. Rows with a finite window also keep the tokens in it, to take each out when it leaves.

=================  ===================  =====================================================================
``context_counts`` (B, V) int32         how often a token stands in the window, prompt and answer
``answer_counts``  (B, V) int32         the same for generated tokens only
``recent``         (B, N) uint32        the window as a ring; slot t mod n leaves when generated token t comes;
                                        V marks a slot that never held a token
``index``          (B,) uint32          how many tokens the row has generated
=================  ===================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx


def count_tokens(rows: Sequence[Sequence[int]], vocab_size: int) -> mx.array:
    """How often each token stands in each row: (B, V) int32."""
    counts = mx.zeros((len(rows), vocab_size), dtype=mx.int32)
    row_of = [row for row, tokens in enumerate(rows) for _ in tokens]
    if not row_of:
        return counts
    tokens = [token for row in rows for token in row]
    return counts.at[mx.array(row_of), mx.array(tokens)].add(1)


def latest_tokens(tokens: Sequence[int], window: int) -> Sequence[int]:
    """The last `window` tokens; all of them when `window` is 0."""
    return tokens[-window:] if window else tokens


def start_ring(
    prompts: Sequence[Sequence[int]],
    windows: Sequence[int],
    vocab_size: int,
    answers: Sequence[Sequence[int]] | None = None,
) -> mx.array:
    """The windows behind the prompts, and the answers so far, each row padded to the longest window: (B, N) uint32."""
    longest = max(windows)
    rings = []
    for prompt, window, answer in zip(prompts, windows, answers or [()] * len(prompts), strict=True):
        tokens = list(latest_tokens(prompt, window)) if window else []
        ring = [vocab_size] * (window - len(tokens)) + tokens
        for t in range(max(len(answer) - window, 0), len(answer) if window else 0):
            ring[t % window] = answer[t]
        rings.append(ring + [vocab_size] * (longest - window))
    return mx.array(rings, dtype=mx.uint32)


def apply_repetition(logits: mx.array, counts: mx.array, penalty: mx.array) -> mx.array:
    """Logits with those of tokens in the window divided (positive) or multiplied (negative) by the penalty.

    As transformers' RepetitionPenaltyLogitsProcessor (Keskar et al. 2019, CTRL).

    Args:
        logits: (B, V) float32.
        counts: (B, V) int32, context counts.
        penalty: (B,) float32, above 0.
    """
    penalty = penalty[:, None]
    penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(counts > 0, penalised, logits)


def apply_presence(logits: mx.array, counts: mx.array, penalty: mx.array) -> mx.array:
    """Logits minus the (B,) penalty for each token generated in the window, as OpenAI and vLLM define it."""
    return logits - mx.where(counts > 0, penalty[:, None], 0.0)


def apply_frequency(logits: mx.array, counts: mx.array, penalty: mx.array) -> mx.array:
    """Logits minus the (B,) penalty times how often the token was generated in the window."""
    return logits - counts.astype(mx.float32) * penalty[:, None]


def record_tokens(
    state: Mapping[str, mx.array], ids: mx.array, rows: mx.array, window: mx.array | None
) -> dict[str, mx.array]:
    """The penalty arrays of `state` after each row has generated one more token.

    Args:
        state: those of the arrays above that are in use.
        ids: (B,) uint32, the new tokens.
        rows: (B,) uint32, the numbers 0 to B - 1; of the type of `ids`, which saves two casts.
        window: (B,) uint32 window lengths, 0 for all tokens; None where no row has a finite window.
    """
    changed = {name: state[name].at[rows, ids].add(1) for name in ("context_counts", "answer_counts") if name in state}
    if window is None:
        return changed
    recent, index = state["recent"], state["index"]
    slot = (index % mx.maximum(window, 1))[:, None]
    leaving = mx.take_along_axis(recent, slot, axis=1)[:, 0]
    if "context_counts" in changed:
        is_leaving = (window > 0) & (leaving < changed["context_counts"].shape[1])
        changed["context_counts"] = take_out(changed["context_counts"], rows, leaving, is_leaving)
    if "answer_counts" in changed:
        # The oldest token of a window is a generated one exactly when the answer is as long as the window.
        is_leaving = (window > 0) & (index >= window)
        changed["answer_counts"] = take_out(changed["answer_counts"], rows, leaving, is_leaving)
    changed["recent"] = mx.put_along_axis(recent, slot, ids[:, None].astype(recent.dtype), axis=1)
    changed["index"] = index + 1
    return changed


def take_out(counts: mx.array, rows: mx.array, ids: mx.array, is_leaving: mx.array) -> mx.array:
    """Counts less one for the token of each row that leaves its window."""
    # An id outside the vocabulary stands for no token; scatter does not check bounds.
    inside = mx.minimum(ids, counts.shape[1] - 1)
    return counts.at[rows, inside].subtract(is_leaving.astype(counts.dtype))
