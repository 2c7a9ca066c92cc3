"""The quality report: what a conversion has cost, in what the model says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm_mlx.config import read_json_object
from lfm_mlx.errors import CheckpointError, ConversionError, OptionError
from lfm_mlx.names import expected_tensors
from lfm_mlx.terminal import format_bytes
from lfm_mlx.tokenizer import Tokenizer, load_tokenizer

from .agreement import Answer, CallAgreement, agreement_of, compare_answers
from .chart import layer_chart
from .divergence import Divergence, Prediction, Scored, measure_divergence
from .job import values_in
from .layerwise import Layerwise

MAX_TOKENS = 160
"""Longest answer in a conversation about tools."""

FILES = ("QUALITY.md", "quality.json", "quality.svg")

_SET = Path(__file__).with_name("evaluation_set.json")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a report holds.

    Args:
        source, converted: names of the two.
        num_bytes: bytes of the converted tensors.
        bits_per_weight: bits for each value of the model.
        text: predictions on prose.
        answers: predictions on the source's own answers to conversations about tools; None without a chat template.
        calls: how tool calls agree; None likewise.
        divergence: errors by layer.
    """

    source: str
    converted: str
    num_bytes: int
    bits_per_weight: float
    text: Prediction
    answers: Prediction | None
    calls: CallAgreement | None
    divergence: Divergence

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "source": self.source,
            "converted": self.converted,
            "num_bytes": self.num_bytes,
            "bits_per_weight": self.bits_per_weight,
            "text": asdict(self.text),
            "answers": None if self.answers is None else asdict(self.answers),
            "calls": None if self.calls is None else asdict(self.calls),
            "layers": [asdict(layer) for layer in self.divergence.layers],
        }


def read_set(file: Path | None = None) -> dict[str, Any]:
    """An evaluation set: ``texts`` with language and text, ``conversations`` with tools and messages.

    Args:
        file: JSON of that form; None takes the one that comes along: nine languages, written for this project.

    Raises:
        OptionError: the file holds something else.
    """
    try:
        raw = read_json_object(file or _SET)
    except CheckpointError as error:
        raise OptionError(str(error)) from error
    texts, conversations = (raw or {}).get("texts"), (raw or {}).get("conversations", [])
    is_good = isinstance(texts, list) and texts and all(isinstance(item, dict) and "text" in item for item in texts)
    is_good = is_good and all(isinstance(item, dict) and "messages" in item for item in conversations)
    if not is_good:
        raise OptionError(
            f'{file}: expected {{"texts": [{{"language": ..., "text": ...}}], "conversations": [{{"tools": [...], '
            '"messages": [...]}]}'
        )
    return {"texts": texts, "conversations": conversations}


def measure_quality(
    source: Path,
    out: Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    max_tokens: int = MAX_TOKENS,
    tell: Callable[[str], None] = lambda line: None,
) -> Quality:
    """Compare a converted model with its source.

    Args:
        source: the unquantised checkpoint; never more than one of its layers is in memory.
        out: the conversion; it is in memory as a whole while it answers.
        evaluation: from `read_set`.
        max_tokens: longest answer in a conversation.
        tell: called with a line at each stage.

    Raises:
        ConversionError: the two are not the same model.
        CheckpointError: one of them is damaged, or has no tokenizer.
    """
    given = evaluation or read_set()
    first, second = Layerwise(source), Layerwise(out)
    if expected_tensors(first.config) != expected_tensors(second.config):
        raise ConversionError(f"{out} and {source} have other shapes, expected a conversion of the same model")
    tokenizer = load_tokenizer(
        source, config_eos_ids=first.config.eos_token_ids, model_vocab_size=first.config.vocab_size
    )
    conversations = given["conversations"] if tokenizer.has_template else []
    tell(f"answers to {len(conversations)} conversations")
    answers = _answers(first, out, tokenizer, conversations, max_tokens)
    tell(f"predictions on {len(given['texts'])} texts and {len(answers)} answers")
    texts = [Scored(ids=tuple(tokenizer.encode(item["text"]))) for item in given["texts"]]
    own = [Scored(ids=(*a.prompt, *a.source), start=len(a.prompt)) for a in answers if a.is_known]
    divergence = measure_divergence(first, second, [texts, own] if own else [texts])
    num_bytes = second.checkpoint.num_bytes
    return Quality(
        source=source.name,
        converted=out.name,
        num_bytes=num_bytes,
        bits_per_weight=8 * num_bytes / values_in(first.config),
        text=divergence.predictions[0],
        answers=divergence.predictions[1] if own else None,
        calls=agreement_of(answers, tokenizer, [c.get("tools", []) for c in conversations]) if answers else None,
        divergence=divergence,
    )


def _answers(
    source: Layerwise, out: Path, tokenizer: Tokenizer, conversations: Sequence[Mapping[str, Any]], max_tokens: int
) -> list[Answer]:
    prompts = [
        tokenizer.apply_template(conversation["messages"], tools=conversation.get("tools"))
        for conversation in conversations
    ]
    return compare_answers(source, out, prompts, tokenizer.stop_ids, max_tokens=max_tokens) if prompts else []


def write_report(quality: Quality, folder: Path) -> None:
    """Write QUALITY.md, quality.json and quality.svg into `folder`."""
    (folder / "quality.json").write_text(json.dumps(quality.as_json(), indent=1) + "\n", encoding="utf-8")
    title = f"{quality.converted}: {quality.bits_per_weight:.3f} bits per weight"
    (folder / "quality.svg").write_text(layer_chart(quality.divergence.layers, title), encoding="utf-8")
    (folder / "QUALITY.md").write_text(as_markdown(quality), encoding="utf-8")


def as_markdown(quality: Quality) -> str:
    """The report for people."""
    lines = [
        f"# Quality of {quality.converted}",
        "",
        f"Compared with {quality.source}, unquantised, by `python -m lfm_mlx.convert report`. "
        f"{format_bytes(quality.num_bytes)}, {quality.bits_per_weight:.3f} bits per weight.",
        "",
        "| | text | answers with tools |",
        "|---|---|---|",
    ]
    rows: list[tuple[str, Callable[[Prediction], str]]] = [
        ("tokens predicted", lambda p: f"{p.num_tokens:,}"),
        ("perplexity of the source", lambda p: f"{p.perplexity_source:.4g}"),
        ("perplexity", lambda p: f"{p.perplexity:.4g}"),
        ("KL divergence, mean (nats)", lambda p: f"{p.kl_mean:.5f}"),
        ("KL divergence, 99th percentile", lambda p: f"{p.kl_p99:.4f}"),
        ("same likeliest token", lambda p: f"{p.top1_agreement:.2%}"),
    ]
    for name, shown in rows:
        lines.append(f"| {name} | {shown(quality.text)} | {shown(quality.answers) if quality.answers else '-'} |")
    lines += ["", *_call_lines(quality.calls), "", "![error by layer](quality.svg)", ""]
    lines += ["| layer | relative error | tokens with other experts |", "|---|---|---|"]
    for i, layer in enumerate(quality.divergence.layers):
        changed = "-" if layer.changed_experts is None else f"{layer.changed_experts:.2%}"
        lines.append(f"| {i} | {layer.error:.3%} | {changed} |")
    lines += [
        "",
        "Text: prose in the nine languages of the model card. Answers: the source's own greedy ones to conversations "
        "with tools; both models are compared on these tokens. Relative error: root mean square of the difference of "
        "a layer's output, over that of the source's.",
        "",
    ]
    return "\n".join(lines)


def _call_lines(calls: CallAgreement | None) -> list[str]:
    if calls is None:
        return ["Tool calls were not compared: the source has no chat template."]
    return [
        f"**Tool calls:** of {calls.num_conversations} conversations, the source calls tools in {calls.num_calling}; "
        f"in {calls.num_alike} of these the conversion makes the same calls with the same arguments. "
        f"{calls.num_same_text} answers are the same word for word."
    ]
