"""Scores of the tiny checkpoint: free greedy generation on held-out words and on fixed prompts."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_batches import Renderer
from tiny_data import Conversations, Sample
from tiny_prompts import fixed_samples
from transformers import AutoTokenizer, Lfm2MoeForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "GREEDY",
    "evaluate",
    "evaluate_checkpoint",
    "evaluate_mlx",
    "generate_mlx",
    "generate_transformers",
    "held_out_samples",
    "is_well_formed",
]

END = "<|im_end|>"
Generate = Callable[[list[list[int]]], list[list[int]]]
# How many samples of each kind: (kind of the last turn, number of turns, samples).
GREEDY = (
    ("one_call", 1, 100), ("two_calls", 1, 60), ("tool_answer", 1, 60), ("missing", 1, 20), ("no_fit", 1, 30),
    ("no_tools", 1, 20),
    ("fact", 1, 60), ("sum", 1, 40), ("chat", 1, 20), ("unknown", 1, 30), ("notes", 1, 20), ("repeat", 1, 20),
    ("one_call", 2, 30), ("one_call", 3, 20), ("tool_answer", 2, 20), ("two_calls", 2, 10), ("fact", 2, 15),
    ("memory", 2, 15),
)  # fmt: skip
_CALLS = re.compile(r"<\|tool_call_start\|>(.*)<\|tool_call_end\|>$", re.DOTALL)


def held_out_samples(seed: int = 20261122, fraction: float = 1.0) -> list[Sample]:
    """Samples of every kind filled with words that training never used."""
    source = Conversations(seed, held_out=True)
    return [source.sample(kind, turns) for kind, turns, count in GREEDY for _ in range(max(1, round(count * fraction)))]


def generate_transformers(model: Any, batch_size: int = 32, max_new: int = 160) -> Generate:
    """Greedy generation by transformers, in left-padded batches sorted by length."""

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[index]) for index in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new, pad_token_id=0)
            for row, index in enumerate(chosen):
                answers[index] = output[row, width:].tolist()
        return answers

    return generate


def generate_mlx(path: Path, max_new: int = 160) -> Generate:
    """Greedy generation by mlx-lm from the converted checkpoint at `path`."""
    from mlx_lm import load  # optional: only the score of the 4-bit conversion needs mlx-lm
    from mlx_lm.generate import batch_generate

    model, tokenizer = load(str(path))[:2]

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        found = batch_generate(model, tokenizer, prompts, max_tokens=max_new, return_token_ids=True).token_ids or []
        # mlx-lm leaves the end token out; an answer that was cut off has no room for it.
        end = tokenizer.eos_token_id
        return [[*ids, end] if len(ids) < max_new else list(ids) for ids in found]

    return generate


def is_well_formed(text: str) -> bool:
    """True when `text` is reasoning, if any, then plain text or a list of Python calls with literal values."""
    answer = text.removesuffix(END).split("</think>")[-1]
    if "<|tool_call_start|>" not in answer:
        return "<|" not in answer and text.endswith(END)
    match = _CALLS.match(answer)
    if not match or not text.endswith(END):
        return False
    # A keyword such as `from` is no Python argument name, though the format allows it.
    source = re.sub(
        r'("(?:[^"\\]|\\.)*")|\b(from|in|is|if|for|class|import|as|or|and|not)=',
        lambda m: m[1] or f"{m[2]}_=",
        match[1],
    )
    try:
        tree = ast.parse(source.strip(), mode="eval").body
        return isinstance(tree, ast.List) and bool(tree.elts) and all(_is_literal_call(call) for call in tree.elts)
    except (SyntaxError, ValueError):
        return False


def _is_literal_call(call: ast.expr) -> bool:
    if not isinstance(call, ast.Call) or call.args:
        return False
    for keyword in call.keywords:
        ast.literal_eval(keyword.value)
    return True


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    ids = list(ids)
    end = tokenizer.convert_tokens_to_ids(END)
    if end in ids:
        ids = ids[: ids.index(end) + 1]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def evaluate(tokenizer: PreTrainedTokenizerFast, generate: Generate, fraction: float = 1.0) -> dict[str, Any]:
    """Scores per kind, in per cent, with the failures."""
    renderer = Renderer(str(tokenizer.chat_template), str(tokenizer.bos_token))
    held_out = held_out_samples(fraction=fraction)
    fixed = fixed_samples()
    samples = [*held_out, *fixed]
    prompts = [tokenizer.encode(renderer.prompt(sample), add_special_tokens=False) for sample in samples]
    answers = [_decoded(tokenizer, ids) for ids in generate(prompts)]
    pairs = list(zip(samples, answers, strict=True))
    held, known = pairs[: len(held_out)], pairs[len(held_out) :]
    scores: dict[str, Any] = {"held_out": _scores(held), "fixed": _scores(known)}
    groups: dict[str, list[tuple[Sample, str]]] = {}
    for sample, answer in held:
        groups.setdefault("multi_turn" if sample.kind.startswith("multi_") else sample.kind, []).append(
            (sample, answer)
        )
    scores["kinds"] = {kind: _scores(group) for kind, group in sorted(groups.items())}
    scores["failures"] = [
        {"kind": sample.kind, "user": sample.messages[-1]["content"], "expected": sample.target, "found": answer}
        for sample, answer in pairs
        if sample.target != answer
    ]
    return scores


def _share(values: list[bool]) -> float | None:
    return round(100 * sum(values) / len(values), 1) if values else None


def _scores(pairs: list[tuple[Sample, str]]) -> dict[str, Any]:
    calls = [answer for sample, answer in pairs if "<|tool_call_start|>" in sample.target]
    return {
        "samples": len(pairs),
        "exact": _share([sample.target == answer for sample, answer in pairs]),
        "exact_answer": _share(
            [sample.target.split("</think>")[-1] == answer.split("</think>")[-1] for sample, answer in pairs]
        ),
        "well_formed_calls": _share(["<|tool_call_start|>" in answer and is_well_formed(answer) for answer in calls]),
    }


def evaluate_checkpoint(path: Path, fraction: float = 1.0) -> dict[str, Any]:
    """Scores of the checkpoint at `path` in bf16 by transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = Lfm2MoeForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return evaluate(tokenizer, generate_transformers(model.eval()), fraction)


def evaluate_mlx(path: Path, fraction: float = 1.0) -> dict[str, Any]:
    """Scores of the MLX checkpoint at `path`, a conversion by mlx-lm."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    return evaluate(tokenizer, generate_mlx(path), fraction)
