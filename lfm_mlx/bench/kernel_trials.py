"""Are the fused kernels right and fast on this device? Each in every size of the family and every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.report import Report
from lfm_mlx.bench.shapes import SHAPES, config_named
from lfm_mlx.kernels import (
    ADD_NORM,
    COMBINE_NORM,
    QK_NORM_ROPE,
    ROUTER,
    Case,
    FusedKernel,
    Verdict,
    choice,
    tried_again,
)

DTYPES = (mx.bfloat16, mx.float16, mx.float32)

NOTES = (
    "Compared on random data with stock operations, and timed beside them; microseconds of a call with one token.",
    "Kernels that disagree or are slower are left out by themselves. To report a line, please add the JSON below.",
)
NO_METAL_NOTE = "Nothing was tried: MLX does not compute on Metal here, and stock operations run instead."


def ask_kernel_trials() -> Report:
    """Try every fused kernel out, whatever earlier trials found, and remember the verdicts."""
    tried = [
        (kernel, case, tried_again(kernel, case) if choice.has_metal() else None) for kernel, case in family_cases()
    ]
    return Report(
        question="kernel trials",
        parameters={},
        results={"trials": [_as_json(*trial) for trial in tried]},
        title="Fused kernels on this device",
        header=["kernel", "case", "agrees", "us", "stock us", "runs"],
        rows=[_table_row(*trial) for trial in tried],
        notes=NOTES if choice.has_metal() else (*NOTES, NO_METAL_NOTE),
    )


def family_cases() -> Iterator[tuple[FusedKernel, Case]]:
    """Every kernel in each of the sizes that models of the family have, and in every dtype."""
    configs = [config_named(name) for name in SHAPES]
    experts = [config for config in configs if config.is_moe]
    for dtype in DTYPES:
        for width in sorted({config.hidden_size for config in configs}):
            yield ADD_NORM, Case.of(dtype, D=width)
        for H, G, P in sorted({(config.num_heads, config.num_kv_heads, config.head_dim) for config in configs}):
            yield QK_NORM_ROPE, Case.of(dtype, H=H, G=G, P=P)
        for E, A in sorted({(config.num_experts, config.num_active_experts) for config in experts}):
            yield ROUTER, Case.of(dtype, E=E, A=A, normalized=True)
        for D, A in sorted({(config.hidden_size, config.num_active_experts) for config in experts}):
            # Behind the router's kernel, and, where that one is left out, behind stock operations.
            yield COMBINE_NORM, Case.of(dtype, D=D, A=A, weighed=True, normalized=False)
            yield COMBINE_NORM, Case.of(dtype, D=D, A=A, weighed=False, normalized=True)


def _as_json(kernel: FusedKernel, case: Case, verdict: Verdict | None) -> dict[str, Any]:
    named = {"kernel": kernel.name, "case": str(case)}
    if verdict is None:
        return {**named, "agrees": None, "problem": None, "kernel_us": None, "stock_us": None, "runs": False}
    is_right = verdict.problem is None
    return {
        **named,
        "agrees": is_right,
        "problem": verdict.problem,
        "kernel_us": round(verdict.kernel_us, 2) if is_right else None,
        "stock_us": round(verdict.reference_us, 2) if is_right else None,
        "runs": verdict.permits(is_forced=False),
    }


def _table_row(kernel: FusedKernel, case: Case, verdict: Verdict | None) -> list[object]:
    found = _as_json(kernel, case, verdict)
    said = {True: "yes", False: found["problem"], None: "not tried"}[found["agrees"]]
    return [kernel.name, str(case), said, found["kernel_us"], found["stock_us"], "yes" if found["runs"] else "no"]
