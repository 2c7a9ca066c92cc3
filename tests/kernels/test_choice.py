"""Which fused kernels run, as the environment and the machine have it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from lfm_mlx.errors import OptionError
from lfm_mlx.kernels import ADD_NORM, FUSED_KERNELS, KERNEL_NAMES, MAX_TOKENS, MetalKernel, add_norm
from lfm_mlx.kernels.choice import read_wish

needs_no_metal = pytest.mark.skipif(mx.metal.is_available(), reason="there is Metal here")


def rows(num_rows: int = 2, width: int = 8) -> tuple[mx.array, mx.array, mx.array, float]:
    residual, update = (mx.random.normal((num_rows, width), key=mx.random.key(seed)) for seed in (1, 2))
    return residual, update, mx.ones((width,)), 1e-5


@pytest.mark.parametrize(
    ("said", "names", "is_forced"),
    [
        (None, KERNEL_NAMES, False),
        ("on", KERNEL_NAMES, True),
        ("off", (), False),
        ("add_norm", ("add_norm",), True),
        ("qk_norm_rope,add_norm", ("add_norm", "qk_norm_rope"), True),
    ],
)
def test_the_environment_names_the_kernels(
    monkeypatch: pytest.MonkeyPatch, said: str | None, names: tuple[str, ...], is_forced: bool
) -> None:
    if said is None:
        monkeypatch.delenv("LFM_MLX_KERNELS", raising=False)
    else:
        monkeypatch.setenv("LFM_MLX_KERNELS", said)
    wish = read_wish()
    assert (sorted(wish.names), wish.is_forced) == (sorted(names), is_forced)


@pytest.mark.parametrize("said", ["", "yes", "add_norm,", "add_nrom", "add_norm expert_router", "ON"])
def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("LFM_MLX_KERNELS", said)
    with pytest.raises(OptionError, match=r"expected off, on, or some of add_norm,combine_norm.*nearest"):
        add_norm(*rows())


@needs_no_metal
@pytest.mark.parametrize("said", ["on", "add_norm"])
def test_kernels_asked_for_where_there_is_no_metal_are_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("LFM_MLX_KERNELS", said)
    with pytest.raises(OptionError, match=f"LFM_MLX_KERNELS is '{said}', but MLX does not compute on Metal here"):
        add_norm(*rows())


@needs_no_metal
def test_without_metal_and_without_a_wish_stock_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LFM_MLX_KERNELS", raising=False)
    assert not ADD_NORM.is_chosen(*rows())
    residual, update, weight, eps = rows()
    assert mx.array_equal(add_norm(residual, update, weight, eps)[1], mx.fast.rms_norm(residual + update, weight, eps))


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("said", "launched"), [("on", True), ("add_norm", True), ("expert_router", False), ("off", False)]
)
def test_a_kernel_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, said: str, launched: bool) -> None:
    monkeypatch.setenv("LFM_MLX_KERNELS", said)
    assert ADD_NORM.is_chosen(*rows()) == launched
    launch, seen = MetalKernel.launch, []
    monkeypatch.setattr(MetalKernel, "launch", lambda self, *a, **k: seen.append(self.name) or launch(self, *a, **k))
    found = add_norm(*rows())
    assert seen == ["add_norm"] * launched
    for a, b in zip(found, ADD_NORM.reference(*rows()), strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("num_rows", "width"), [(2, 6), (MAX_TOKENS + 1, 8), (1, 4100)])
def test_shapes_out_of_range_run_stock_operations_whatever_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, width: int
) -> None:
    monkeypatch.setenv("LFM_MLX_KERNELS", "on")
    arguments = rows(num_rows, width)
    assert not ADD_NORM.is_chosen(*arguments)
    for a, b in zip(add_norm(*arguments), ADD_NORM.reference(*arguments), strict=True):
        assert mx.array_equal(a, b)


def test_names_are_those_of_the_kernels() -> None:
    assert tuple(sorted(kernel.name for kernel in FUSED_KERNELS)) == KERNEL_NAMES
