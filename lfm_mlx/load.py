"""A path or repo id -> a model and its tokenizer."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from lfm_mlx.build import build_model
from lfm_mlx.cache import content_fingerprint
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import ModelConfig, read_json_object
from lfm_mlx.distributed import Mode, Ranks, ShardedWeights, check_size, join_ranks, local_config, set_ranks, shard
from lfm_mlx.errors import OptionError
from lfm_mlx.hub import fetch
from lfm_mlx.kernels import COMPILE_VARIABLE, KERNELS_VARIABLE
from lfm_mlx.memory import (
    SMALLEST_CONTEXT,
    available_bytes,
    plan_memory,
    release_freed,
    return_large_blocks,
    set_memory_limits,
)
from lfm_mlx.model import Model
from lfm_mlx.sampling import recommended_sampling
from lfm_mlx.tokenizer import Tokenizer, load_tokenizer, tool_problems
from lfm_mlx.types import check_integer

_LOG = logging.getLogger(__name__)

DEFAULT_MODEL = "LiquidAI/LFM2.5-8B-A1B-MLX-4bit"
"""The published 4-bit MLX conversion of LFM2.5-8B-A1B."""

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""Compute dtypes by name."""


LARGE_BYTES = 1 << 30
"""Quantised weights from here on keep scales of 16 bits on the CPU too."""


class Loaded(NamedTuple):
    """What `load` returns: ``model, tokenizer = load(...)``."""

    model: Model
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoadProgress:
    """How far loading has come, in bytes of weights."""

    done_bytes: int
    total_bytes: int
    elapsed_s: float


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    offline: bool = False,
    max_context: int | None = None,
    kv_bits: int | None = None,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    on_progress: Callable[[LoadProgress], None] | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    On several ranks, every rank loads its part; all but rank 0 then call `lfm_mlx.engine.follow`.

    Args:
        model: a folder, or a repo id that is downloaded first (only the files needed). MLX checkpoints made here or by
            mlx-lm, quantised or not, and Hugging Face checkpoints are all read directly.
        dtype: "float32", "float16" or "bfloat16" for activations and unquantised weights; None takes what the device
            computes well (`compute_dtype`).
        revision: branch, tag or commit of the repo.
        subfolder: the folder in the repo that holds the precision wanted.
        token: access token; None uses the one huggingface_hub knows.
        offline: never ask the network, use only what was downloaded before.
        max_context: most tokens a conversation may hold; None allows what the model was made for. It is planned for
            before loading: a smaller one asks for less memory.
        kv_bits: 8 or 4 to keep keys and values quantised.
        tensor_parallel: processes, started by ``mlx.launch``, that each hold a part of every matrix.
        expert_parallel: the same with experts dealt out whole; one of the two.
        on_progress: called as weights arrive in memory.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit the config; lists everything that is wrong.
        ConfigError: the model type is not supported or a value cannot be used.
        DownloadError: the repo could not be fetched.
        MemoryPlanError: weights and context need more memory than is free.
        OptionError: an argument is refused.
        RankError: another rank is not there, or has another version, checkpoint or option.
    """
    facts = {"dtype": dtype, "max_context": max_context, "kv_bits": kv_bits}
    ranks = _join(tensor_parallel, expert_parallel, facts)
    with ranks.link.failing_together() if ranks is not None else contextlib.nullcontext():
        folder = fetch(model, revision=revision, subfolder=subfolder, token=token, offline=offline)
        loaded = _load_folder(str(model), folder, ranks, dtype, max_context, kv_bits, on_progress)
    return loaded


def _join(tensor_parallel: int, expert_parallel: int, facts: Mapping[str, object]) -> Ranks | None:
    """The ranks that were asked for; None for a single one."""
    for name, value in (("tensor_parallel", tensor_parallel), ("expert_parallel", expert_parallel)):
        check_integer(name, value, minimum=1)
    if tensor_parallel > 1 and expert_parallel > 1:
        raise OptionError(
            f"tensor_parallel is {tensor_parallel} and expert_parallel {expert_parallel}, expected one of them; with "
            "expert_parallel everything but the experts is cut as with tensor_parallel"
        )
    if max(tensor_parallel, expert_parallel) == 1:
        return None
    mode: Mode = "tensor" if tensor_parallel > 1 else "expert"
    variables = {name: os.environ.get(name) for name in (KERNELS_VARIABLE, COMPILE_VARIABLE)}
    return join_ranks(max(tensor_parallel, expert_parallel), mode, {**facts, **variables})


def _load_folder(
    name: str,
    folder: Path,
    ranks: Ranks | None,
    dtype: str | None,
    max_context: int | None,
    kv_bits: int | None,
    on_progress: Callable[[LoadProgress], None] | None,
) -> Loaded:
    checkpoint = Checkpoint(folder)
    chosen = compute_dtype(checkpoint.config, dtype, weight_bytes=checkpoint.num_bytes)
    context = _checked_context(checkpoint.config, max_context)
    part = ranks.part if ranks is not None else None
    config = checkpoint.config
    if ranks is not None and part is not None:
        check_size(config, checkpoint, part.size, part.mode)
        ranks.link.agree(
            {
                "checkpoint": content_fingerprint(folder),
                "compute dtype": str(chosen),
                "device": str(mx.default_device()),
            }
        )
        config = local_config(config, part)
    plan = plan_memory(
        config,
        weight_bytes=checkpoint.memory_bytes(chosen.size, part),
        context=context if max_context is not None else min(SMALLEST_CONTEXT, context),
        kv_bits=kv_bits,
        dtype=chosen,
    )
    plan.check(available_bytes(), are_weights_loaded=False)
    set_memory_limits(plan, part.size if part is not None else 1)
    tokenizer = load_tokenizer(
        folder, config_eos_ids=checkpoint.config.eos_token_ids, model_vocab_size=checkpoint.config.vocab_size
    )
    for problem in tool_problems(tokenizer, checkpoint.config.vocab_size):
        _LOG.warning("%s: %s", folder, problem)
    total_bytes, started, done_bytes = plan.weight_bytes, time.perf_counter(), 0

    def on_part(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        if ranks is not None:
            release_freed()  # What was read and joined leaves much of a layer behind.
        if on_progress is not None:
            elapsed_s = time.perf_counter() - started
            on_progress(LoadProgress(done_bytes=done_bytes, total_bytes=total_bytes, elapsed_s=elapsed_s))

    if ranks is None or part is None:
        built = build_model(config, checkpoint, chosen, on_part)
    else:
        return_large_blocks()  # Parts are copied out of what is read.
        built = build_model(config, ShardedWeights(checkpoint, part, checkpoint.tensor_part), chosen, on_part)
        set_ranks(shard(built, ranks.group, part), ranks)
    built.sampling = recommended_sampling(
        model_type=checkpoint.config.model_type,
        vocab_size=checkpoint.config.vocab_size,
        name=_model_name(name, checkpoint.config),
        generation_config=read_json_object(folder / "generation_config.json"),
    )
    built.max_context = context
    built.kv_bits = kv_bits
    return Loaded(built, tokenizer)


def _checked_context(config: ModelConfig, max_context: int | None) -> int:
    if max_context is None:
        return config.max_context
    check_integer("max_context", max_context, minimum=1, maximum=config.max_context)
    return max_context


def _model_name(model: str, config: ModelConfig) -> str:
    """What the model is called: by its config where that says so, else by the folder or repo it was loaded from."""
    named = config.raw.get("_name_or_path")
    return named if isinstance(named, str) and named else model


def compute_dtype(config: ModelConfig, dtype: str | None = None, *, weight_bytes: int = 0) -> mx.Dtype:
    """The dtype a model computes in.

    A GPU takes the dtype the checkpoint was stored in. MLX's CPU backend is slower in 16 bits than in float32 and runs
    an unquantised mixture of experts in float32 only, so there it is float32; but not for large quantised checkpoints,
    whose scales would take a tenth more memory.

    Args:
        config: the model's.
        dtype: the wish of the caller, by name; None chooses.
        weight_bytes: bytes of the stored weights.

    Raises:
        OptionError: an unknown name, or one that the device cannot compute in.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    on_cpu = mx.default_device().type == mx.cpu
    if dtype is None:
        stored = config.dtype if config.dtype in DTYPES else "bfloat16"
        is_large = config.quantization is not None and weight_bytes >= LARGE_BYTES
        return mx.float32 if on_cpu and not is_large else DTYPES[str(stored)]
    if on_cpu and dtype != "float32" and config.is_moe and config.quantization is None:
        raise OptionError(
            f"dtype is {dtype!r}, expected 'float32': MLX's CPU backend runs an unquantised mixture of experts in "
            "float32 only; leave dtype out, or load a quantised checkpoint"
        )
    return DTYPES[dtype]
