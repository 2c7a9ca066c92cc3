"""How many bytes a model needs, known before anything is allocated.

Weights are counted from the checkpoint's headers, caches from the context, transients from the widest layer of one
prompt chunk. What does not fit is refused with the numbers instead of being found out by crashing.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from lfm_mlx.cache import GROWTH_TOKENS, kv_group_size
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import MemoryPlanError
from lfm_mlx.kernels import SCORE_BYTES

CHUNK_BUDGET_BYTES = 256 << 20
"""What the activations of one prompt chunk may take."""

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 64, 2048

LIVE_SCORE_ARRAYS = 8
"""Arrays of the size of a chunk's scores that are alive at once: scores, mask, weights, and those being made."""

GPU_CACHE_BYTES, CPU_CACHE_BYTES = 512 << 20, 16 << 20
"""Freed buffers that MLX keeps for the next allocation; on the CPU a new one costs little."""

GPU_STEP_BYTES, CPU_STEP_BYTES = 256 << 20, 16 << 20
"""What a GPU reads, and the CPU computes on, in the time that a step takes to be launched."""

SMALLEST_CONTEXT = 4096
"""The context that has to fit for a model to be loaded at all, unless the caller names one."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by what they are for, with the context and rows that they were computed for."""

    context: int
    batch_size: int
    kv_bits: int | None
    weight_bytes: int
    kv_bytes: int
    conv_bytes: int
    transient_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together, at its highest."""
        return self.weight_bytes + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """What comes on top of loaded weights."""
        return self.kv_bytes + self.conv_bytes + self.transient_bytes

    def check(self, available_bytes: int, *, are_weights_loaded: bool) -> None:
        """Refuse a plan that does not fit.

        Raises:
            MemoryPlanError: with what is needed, what is free, and what would need less.
        """
        needed = self.state_bytes if are_weights_loaded else self.total_bytes
        if needed <= available_bytes:
            return
        parts = [("weights", 0 if are_weights_loaded else self.weight_bytes), ("keys and values", self.kv_bytes)]
        parts += [("working memory", self.transient_bytes + self.conv_bytes)]
        listed = ", ".join(f"{name} {_gigabytes(count)}" for name, count in parts if count)
        remedies = ["a shorter context (--max-context)"]
        if self.kv_bits != 4:
            remedies.append(f"--kv-bits {8 if self.kv_bits is None else 4}")
        if not are_weights_loaded and self.weight_bytes > available_bytes // 2:
            remedies.append("weights of fewer bits")
        raise MemoryPlanError(
            f"{self.batch_size} x {self.context:,} tokens need {_gigabytes(needed)} ({listed}), expected at most "
            f"{_gigabytes(available_bytes)}, which is what is free; try {' or '.join(remedies)}"
        )


def plan_memory(
    config: ModelConfig,
    *,
    weight_bytes: int,
    context: int,
    batch_size: int = 1,
    kv_bits: int | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    chunk_tokens: int | None = None,
) -> MemoryPlan:
    """Compute what running a model takes.

    Args:
        config: the model's.
        weight_bytes: bytes of all weights in memory.
        context: tokens a row holds at most.
        batch_size: rows.
        kv_bits: 8 or 4 for quantised keys and values.
        dtype: of the activations.
        chunk_tokens: tokens a row of one prompt chunk; None takes `prefill_chunk_tokens`.
    """
    chunk = min(chunk_tokens or prefill_chunk_tokens(config, dtype), context)
    capacity = -(-context // GROWTH_TOKENS) * GROWTH_TOKENS
    layer_bytes = batch_size * capacity * kv_bytes_per_token(config, kv_bits, dtype)
    num_attention = len(config.attention_layers)
    num_conv = config.num_layers - num_attention
    return MemoryPlan(
        context=context,
        batch_size=batch_size,
        kv_bits=kv_bits,
        weight_bytes=weight_bytes,
        kv_bytes=num_attention * layer_bytes,
        conv_bytes=num_conv * batch_size * (config.conv_taps - 1) * config.conv_size * dtype.size,
        # A growing cache exists twice, layer by layer; the layer's scores are computed when it has grown.
        transient_bytes=layer_bytes * bool(num_attention)
        + batch_size * chunk * activation_bytes_per_token(config, dtype)
        + batch_size * config.vocab_size * 4 * 3
        + LIVE_SCORE_ARRAYS * SCORE_BYTES * bool(num_attention),
    )


class Sized(Protocol):
    """What planning an answer has to know of a `lfm_mlx.model.Model`."""

    config: ModelConfig
    max_context: int
    dtype: mx.Dtype


def room_for_answer(
    model: Sized, prompt_len: int, max_tokens: int | None, *, kv_bits: int | None = None, free_bytes: int | None = None
) -> int:
    """Tokens an answer may have.

    Args:
        model: weights in memory already.
        prompt_len: tokens of the prompt, fewer than the context.
        max_tokens: what the caller asked for; None asks for as much as context and memory hold.
        kv_bits: 8 or 4 for quantised keys and values.
        free_bytes: that may still be allocated; None looks here.

    Raises:
        MemoryPlanError: what was asked for, or a single token, does not fit into the memory that is free.
    """
    room = model.max_context - prompt_len
    wanted = min(max_tokens or room, room)
    free = available_bytes() if free_bytes is None else free_bytes
    options: Any = {"weight_bytes": 0, "kv_bits": kv_bits, "dtype": model.dtype}
    if plan_memory(model.config, context=prompt_len + wanted, **options).state_bytes <= free:
        return wanted
    if max_tokens is None:
        fitting = largest_context(model.config, free, kv_bits=kv_bits, dtype=model.dtype) - prompt_len
        if fitting >= 1:
            return fitting
    asked = prompt_len + (wanted if max_tokens is not None else 1)
    plan_memory(model.config, context=asked, **options).check(free, are_weights_loaded=True)
    return wanted


def largest_context(
    config: ModelConfig, available_bytes: int, *, kv_bits: int | None = None, dtype: mx.Dtype = mx.bfloat16
) -> int:
    """The longest context of one row that fits into `available_bytes` beside loaded weights; 0 if none does."""
    low, high = 0, config.max_context
    while low < high:
        middle = (low + high + 1) // 2
        plan = plan_memory(config, weight_bytes=0, context=middle, kv_bits=kv_bits, dtype=dtype)
        low, high = (middle, high) if plan.state_bytes <= available_bytes else (low, middle - 1)
    return low


def row_capacity(num_tokens: int) -> int:
    """Tokens that buffers are made for when a row has so many: at most a quarter more, so that copying stays rare."""
    step = max(GROWTH_TOKENS, 1 << max(num_tokens.bit_length() - 3, 0))
    return -(-num_tokens // step) * step


def step_bytes(shared_bytes: int) -> int:
    """What one more decode step costs, as bytes that could be read meanwhile.

    Args:
        shared_bytes: of the weights that every step reads.
    """
    return shared_bytes + (CPU_STEP_BYTES if _gpu_working_set() is None else GPU_STEP_BYTES)


def row_bytes(config: ModelConfig, num_tokens: int, *, kv_bits: int | None, dtype: mx.Dtype) -> int:
    """Bytes that a row of so many tokens holds in an engine: keys, values and convolution rows."""
    num_attention = len(config.attention_layers)
    num_conv = config.num_layers - num_attention
    kv_bytes = num_attention * row_capacity(num_tokens) * kv_bytes_per_token(config, kv_bits, dtype)
    return kv_bytes + num_conv * (config.conv_taps - 1) * config.conv_size * dtype.size


def rows_budget_bytes(config: ModelConfig, available_bytes: int, *, dtype: mx.Dtype, max_rows: int) -> int:
    """What an engine's rows may hold together out of so many bytes, beside loaded weights and working memory."""
    chunk_bytes = prefill_chunk_tokens(config, dtype) * activation_bytes_per_token(config, dtype)
    working = chunk_bytes + max_rows * config.vocab_size * 4 * 3 + LIVE_SCORE_ARRAYS * SCORE_BYTES
    # A growing cache exists twice, layer by layer.
    num_attention = max(len(config.attention_layers), 1)
    return max(available_bytes - working, 0) * num_attention // (num_attention + 1)


def kv_bytes_per_token(config: ModelConfig, kv_bits: int | None, dtype: mx.Dtype) -> int:
    """Bytes that one token leaves in one attention layer."""
    width = config.head_dim
    if kv_bits is None:
        return 2 * config.num_kv_heads * width * dtype.size
    groups = width // kv_group_size(width, kv_bits)
    return 2 * config.num_kv_heads * (width * kv_bits // 8 + groups * 8)


def activation_bytes_per_token(config: ModelConfig, dtype: mx.Dtype) -> int:
    """Bytes a token takes in the widest part of a layer, with the residual and the layer's input alive beside it."""
    D = config.hidden_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    parts = [3 * config.conv_size + 4 * D, 2 * heads + 2 * config.num_heads * config.head_dim, 3 * config.ffn_size]
    if config.is_moe:
        # Sorted copies of the input, gate and up, their product, outputs, and outputs put back in order.
        parts.append(config.num_active_experts * (3 * D + 3 * config.expert_ffn_size))
    return (max(parts) + 4 * D) * dtype.size


def prefill_chunk_tokens(config: ModelConfig, dtype: mx.Dtype, budget_bytes: int = CHUNK_BUDGET_BYTES) -> int:
    """Tokens a row to compute at once so that activations stay within the budget: a power of two, 64 to 2,048."""
    fitting = budget_bytes // activation_bytes_per_token(config, dtype)
    return max(MIN_CHUNK_TOKENS, min(MAX_CHUNK_TOKENS, 1 << max(fitting.bit_length() - 1, 0)))


def set_memory_limits(plan: MemoryPlan, num_ranks: int = 1) -> None:
    """Keep few freed buffers, and on a Mac keep the weights from being paged out while others use memory.

    Args:
        plan: what this process is to hold.
        num_ranks: processes that share a model: on the CPU they share a machine, and what they keep, too.
    """
    working_set = _gpu_working_set()
    if working_set is None:
        mx.set_cache_limit(CPU_CACHE_BYTES // num_ranks)
        return_large_blocks()
        return
    mx.set_cache_limit(GPU_CACHE_BYTES)
    if mx.metal.is_available():
        mx.set_wired_limit(min(plan.total_bytes, working_set))


LARGE_BLOCK_BYTES = 256 << 10
_M_MMAP_THRESHOLD = -3
"""As <malloc.h> has it."""


def release_freed() -> None:
    """Give freed buffers, which MLX and the C library keep for the next allocation, back to the system."""
    mx.clear_cache()
    # Of glibc: its arenas keep what MLX has freed. Other C libraries have no such function.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """Have the C library give blocks of `LARGE_BLOCK_BYTES` back to the system as soon as they are freed."""
    # Of glibc, which otherwise takes ever larger ones from its heap, where they leave holes.
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def available_bytes() -> int:
    """Bytes that may still be allocated: of the GPU's working set, or, where MLX uses the CPU, of main memory."""
    working_set = _gpu_working_set()
    if working_set is not None:
        return max(working_set - mx.get_active_memory(), 0)
    return _available_host_bytes() + mx.get_cache_memory()


def _gpu_working_set() -> int | None:
    """Bytes that the GPU in use may keep resident; None on the CPU."""
    if mx.default_device().type == mx.cpu:
        return None
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size", info.get("memory_size"))
    return size if isinstance(size, int) else None


def _available_host_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
