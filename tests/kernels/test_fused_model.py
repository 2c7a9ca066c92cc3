"""The trained checkpoint end to end: fused kernels against stock operations, in prefill and in decoding."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal.drop_in import use_metal

from lfm_mlx import load
from lfm_mlx.convert import convert
from lfm_mlx.kernels import KERNEL_NAMES, MetalKernel
from lfm_mlx.model import Model
from lfm_mlx.step import Stepper

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
NUM_STEPS = 8
BFLOAT16_TOLERANCE = 0.05

pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="examples/tiny has no weights")

PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat's the weather like in Paris today? Answer in one word.<|im_end|>\n<|im_start|>assistant\n",
)

QK_NORM: MetalKernel = importlib.import_module("lfm_mlx.kernels.qk_norm_rope").KERNEL

Answer = tuple[np.ndarray, list[mx.array]]
"""Greedy tokens (B, steps), and the logits (B, V) that they were chosen by."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in 8 bits, which MLX can compute in bfloat16 on every backend."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-8bit"
    convert(TINY, folder, recipe="8bit")
    return folder


def prompts(number: int) -> tuple[mx.array, list[int]]:
    """Prompts of unequal length as tokens (B, L), and their lengths."""
    ids = [load(str(TINY)).tokenizer.encode(prompt) for prompt in PROMPTS[:number]]
    width = max(map(len, ids))
    return mx.array([row + [0] * (width - len(row)) for row in ids], dtype=mx.int32), [len(row) for row in ids]


def answer(model: Model, tokens: mx.array, lengths: list[int], forced: np.ndarray | None = None) -> Answer:
    """Prefill and greedy decoding; with `forced`, those tokens are taken instead of the chosen ones."""
    stepper, state = Stepper(model, is_compiled=False), model.new_state(len(lengths))
    logits = [stepper.prefill(state, tokens, lengths)]
    chosen = []
    for step in range(NUM_STEPS):
        chosen.append(np.array(mx.argmax(logits[-1], axis=-1)))
        latest = chosen[-1] if forced is None else forced[:, step]
        logits.append(stepper.decode(state, mx.array(latest.astype(np.int32))))
        mx.eval(logits[-1], state.arrays)
    return np.stack(chosen, axis=1), logits


@pytest.fixture
def with_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Model, mx.array, list[int], np.ndarray | None], tuple[Answer, dict[str, int]]]:
    """`answer` with fused kernels, and how often each was launched."""

    def run(
        model: Model, tokens: mx.array, lengths: list[int], forced: np.ndarray | None = None
    ) -> tuple[Answer, dict[str, int]]:
        launches = dict.fromkeys(KERNEL_NAMES, 0)
        with monkeypatch.context() as during:
            use_metal(during, tmp_path, orders=[2])
            during.setenv("LFM_MLX_KERNELS", "on")
            launch = MetalKernel.launch

            def counted(kernel: MetalKernel, *arguments: object, **call: object) -> list[mx.array]:
                launches[kernel.name] += 1
                return launch(kernel, *arguments, **call)

            answer(model, tokens[:, :1], [1] * len(lengths))  # tries the kernels out
            during.setattr(MetalKernel, "launch", counted)
            return answer(model, tokens, lengths, forced), launches

    return run


def expected_launches(model: Model) -> dict[str, int]:
    """What one prefill and all steps launch: a kernel a layer, another for the sum behind a dense layer."""
    config = model.config
    num_experts = config.num_layers - config.num_dense_layers
    each = {
        "add_norm": config.num_layers + config.num_dense_layers,
        "combine_norm": num_experts,
        "expert_router": num_experts,
        "qk_norm_rope": len(config.attention_layers),
    }
    return {name: number * (NUM_STEPS + 1) for name, number in each.items()}


def test_float32_gives_the_same_greedy_tokens_and_logits(with_kernels) -> None:
    model = load(str(TINY), dtype="float32").model
    tokens, lengths = prompts(3)
    wanted, wanted_logits = answer(model, tokens, lengths)
    (found, found_logits), launches = with_kernels(model, tokens, lengths)
    np.testing.assert_array_equal(found, wanted)
    for a, b in zip(found_logits, wanted_logits, strict=True):
        assert mx.abs(a - b).max().item() < 1e-4 * mx.abs(b).max().item()
    assert launches == expected_launches(model)
    assert len(set(map(tuple, wanted.tolist()))) == len(PROMPTS)


def test_bfloat16_gives_logits_that_differ_by_rounding(quantized: Path, with_kernels) -> None:
    """Both sides see the same tokens, and each is as far from float32 as the other."""
    # Two rows: MLX's CPU backend is slow in bfloat16.
    model, exact = (load(str(quantized), dtype=dtype).model for dtype in ("bfloat16", "float32"))
    tokens, lengths = prompts(2)
    forced, exact_logits = answer(exact, tokens, lengths)
    _, stock_logits = answer(model, tokens, lengths, forced)
    (_, found_logits), launches = with_kernels(model, tokens, lengths, forced)
    assert launches == expected_launches(model)
    found, stock = (rms_error(logits, exact_logits) for logits in (found_logits, stock_logits))
    assert found < BFLOAT16_TOLERANCE
    assert found < 1.1 * stock


def test_a_wrong_kernel_is_noticed_before_its_first_result_and_answers_stay_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = load(str(TINY), dtype="float32").model
    tokens, lengths = mx.array([[5, 9, 700, 31]], dtype=mx.int32), [4]
    wanted, _ = answer(model, tokens, lengths)
    use_metal(monkeypatch, tmp_path, orders=[0])
    monkeypatch.setenv("LFM_MLX_KERNELS", "expert_router,qk_norm_rope")
    wrong = QK_NORM.source.replace("b * c + a * s", "b * c - a * s")
    monkeypatch.setattr(QK_NORM, "source", wrong)
    with pytest.warns(RuntimeWarning, match=r"qk_norm_rope \(float32 .* is left out on .* off by") as warned:
        found, _ = answer(model, tokens, lengths)
    assert len(warned) == 1
    np.testing.assert_array_equal(found, wanted)


def rms_error(found: list[mx.array], expected: list[mx.array]) -> float:
    """Root mean square of the difference, relative to that of what was expected."""
    wide, wanted = (mx.stack(logits).astype(mx.float32) for logits in (found, expected))
    return float(mx.sqrt(mx.mean(mx.square(wide - wanted)) / mx.mean(mx.square(wanted))).item())
