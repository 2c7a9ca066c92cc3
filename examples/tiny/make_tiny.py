"""Make the tiny checkpoint: generate its data, train it, score it and put it in place.

    python examples/tiny/make_tiny.py --out examples/tiny

takes about an hour on two CPU cores; `--steps 200` is a quick trial. Needs torch and transformers, and mlx-lm for
`--quantized`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_batches import BatchStream, Renderer, stream_batches
from tiny_data import Conversations
from tiny_evaluation import evaluate_checkpoint, evaluate_mlx
from tiny_tokenizer import VOCAB_SIZE, train_tokenizer
from tiny_training import Schedule, train
from transformers import AutoTokenizer, GenerationConfig, Lfm2MoeConfig, Lfm2MoeForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "chat_template.jinja"
SEED = 1
NUM_STEPS = 4500
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def make_config() -> Lfm2MoeConfig:
    """A Lfm2MoeConfig of two million parameters; every input width is a multiple of 64."""
    conv, attention = "conv", "full_attention"
    return Lfm2MoeConfig(
        architectures=["Lfm2MoeForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_dense_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        use_expert_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        conv_L_cache=3,
        conv_bias=False,
        norm_eps=1e-5,
        layer_types=[conv, conv, attention, conv, attention, attention, conv, attention],
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=7,
        pad_token_id=0,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, trained on 4,000 generated conversations."""
    renderer = Renderer(TEMPLATE.read_text(), "<|startoftext|>")
    source = Conversations(SEED + 4)
    samples = (source.sample() for _ in range(4000))
    return train_tokenizer((renderer.prompt(sample) + sample.target for sample in samples), TEMPLATE)


def make_model(schedule: Schedule, tokenizer: PreTrainedTokenizerFast, start: Path | None) -> Lfm2MoeForCausalLM:
    """The trained model, in float32; training goes on from the checkpoint `start` where it is given."""
    torch.manual_seed(SEED - 1)
    model: Any = Lfm2MoeForCausalLM(make_config())
    if start:
        model = Lfm2MoeForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.float()
    seed, num_short = (SEED + 10, 1) if start else (SEED, max(1, int(0.6 * schedule.num_steps) * schedule.num_threads))
    stream = BatchStream(tokenizer, seed, num_tokens=2048, short_steps=num_short)
    train(model, stream_batches(stream), schedule, report=lambda line: print(line, flush=True))
    model.eval()
    return model  # type: ignore[no-any-return]


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write the checkpoint to `path`: bf16, the expert biases in float32."""
    biases = [layer.feed_forward.expert_bias.clone() for layer in model.model.layers[model.config.num_dense_layers :]]
    model = model.to(torch.bfloat16)
    for layer, bias in zip(model.model.layers[model.config.num_dense_layers :], biases, strict=True):
        layer.feed_forward.expert_bias = bias
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=1, eos_token_id=7, pad_token_id=0, do_sample=False
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def put_in_place(source: Path, out: Path) -> None:
    """Move the files of a finished checkpoint into `out`, each by one rename."""
    out.mkdir(parents=True, exist_ok=True)
    for name in [*FILES, "evaluation.json"]:
        if (source / name).exists():
            beside = out / f".{name}.new"
            shutil.copyfile(source / name, beside)
            os.replace(beside, out / name)


def score(path: Path, quantized: Path | None, fraction: float) -> dict[str, Any]:
    """The scores of the checkpoint and, where it is given, of its 4-bit conversion."""
    scores = {"bf16 (transformers)": evaluate_checkpoint(path, fraction)}
    if quantized:
        scores["4-bit (mlx-lm)"] = evaluate_mlx(quantized, fraction)
    return scores


def convert(path: Path, to: Path) -> Path:
    """Convert the checkpoint at `path` to 4 bits by mlx-lm."""
    from mlx_lm import convert as mlx_convert  # optional: only --quantized needs mlx-lm

    shutil.rmtree(to, ignore_errors=True)
    mlx_convert(str(path), str(to), quantize=True, q_bits=4, q_group_size=64)
    return to


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"training steps (default {NUM_STEPS})")
    parser.add_argument("--minutes", type=float, default=0.0, help="end by the clock instead of by --steps")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint instead of from random weights")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the evaluation to run (default 1)")
    parser.add_argument("--quantized", action="store_true", help="also score the 4-bit conversion by mlx-lm")
    parser.add_argument("--only-score", action="store_true", help="score the checkpoint in --out, train nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tiny-") as scratch:
        folder = Path(scratch) / "checkpoint"
        if options.only_score:
            shutil.copytree(options.out, folder, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            tokenizer = AutoTokenizer.from_pretrained(options.start) if options.start else make_tokenizer()
            schedule = Schedule(num_steps=options.steps, minutes=options.minutes)
            if options.start:  # a trained model needs no search: lower rates, falling early
                schedule = replace(schedule, hold=0.2, muon=0.012, adam=1.8e-3, embedding=3.6e-3)
            save_checkpoint(make_model(schedule, tokenizer, options.start), tokenizer, folder)
        quantized = convert(folder, Path(scratch) / "q4") if options.quantized else None
        scores = score(folder, quantized, options.fraction)
        (folder / "evaluation.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
        put_in_place(folder, options.out)
    for name, result in scores.items():
        print(name, json.dumps({key: value for key, value in result.items() if key != "failures"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
