"""The sampling options that the model cards recommend; the checkpoints' own generation_config.json rarely has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lfm_mlx.errors import ConfigError, OptionError
from lfm_mlx.types import SamplingParams

GREEDY = SamplingParams()
LFM2_TEXT = SamplingParams(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
LFM2_VISION = SamplingParams(temperature=0.1, min_p=0.15, repetition_penalty=1.05)
LFM25_INSTRUCT = SamplingParams(temperature=0.1, top_k=50, repetition_penalty=1.05)
LFM25_THINKING = SamplingParams(temperature=0.05, top_k=50, repetition_penalty=1.05)
LFM25_MOE = SamplingParams(temperature=0.2, top_k=80, repetition_penalty=1.05)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One row of the table: it applies where all conditions that it names hold.

    Args:
        name: regular expression to be found in the normalised name, or None for any name.
        model_type: regular expression for the whole of config.json's model_type, or None for any.
        vocab_size: config.json's, or None for any.
        values: what is recommended.
        source: where that is written.
    """

    name: str | None = None
    model_type: str | None = None
    vocab_size: int | None = None
    values: SamplingParams
    source: str

    def applies(self, name: str, model_type: str, vocab_size: int) -> bool:
        """Whether a checkpoint of this normalised name and config is meant."""
        return (
            (self.name is None or re.search(self.name, name) is not None)
            and (self.model_type is None or re.fullmatch(self.model_type, model_type) is not None)
            and (self.vocab_size is None or self.vocab_size == vocab_size)
        )


LFM25 = r"lfm2[.-]5-"

TABLE = (
    Recommendation(
        name=r"lfm2\b.*-(extract|rag|tool)\b",
        values=GREEDY,
        source="cards of LFM2-350M-Extract, LFM2-1.2B-Extract, LFM2-1.2B-RAG, LFM2-1.2B-Tool",
    ),
    Recommendation(model_type=r"lfm2[_-]vl", values=LFM2_VISION, source="cards of LFM2-VL and LFM2.5-VL"),
    Recommendation(name=r"lfm2\b.*-vl\b", values=LFM2_VISION, source="cards of LFM2-VL and LFM2.5-VL"),
    Recommendation(name=LFM25 + r".*thinking\b", values=LFM25_THINKING, source="card of LFM2.5-1.2B-Thinking"),
    Recommendation(name=LFM25 + r".*jp-202606\b", values=LFM25_INSTRUCT, source="card of LFM2.5-1.2B-JP-202606"),
    Recommendation(name=LFM25 + r".*(jp|base)\b", values=LFM2_TEXT, source="cards of LFM2.5-1.2B-JP and -Base"),
    Recommendation(
        model_type="lfm2_moe",
        vocab_size=128000,
        values=LFM25_MOE,
        source="card of LFM2.5-8B-A1B, told by its vocabulary",
    ),
    Recommendation(name=LFM25 + r".*a1b\b", values=LFM25_MOE, source="card of LFM2.5-8B-A1B"),
    Recommendation(name=LFM25, values=LFM25_INSTRUCT, source="cards of LFM2.5-1.2B-Instruct, -350M and -230M"),
    Recommendation(
        model_type="lfm2",
        vocab_size=128000,
        values=LFM25_INSTRUCT,
        source="no card known; LFM2.5-2.6B by its vocabulary",
    ),
    Recommendation(model_type=r"lfm2.*", values=LFM2_TEXT, source="cards of LFM2-350M to LFM2-8B-A1B"),
    Recommendation(name=r"lfm2\b", values=LFM2_TEXT, source="cards of LFM2-350M to LFM2-8B-A1B"),
)
"""First match wins."""

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recommended_sampling(
    *,
    model_type: str,
    vocab_size: int,
    name: str = "",
    generation_config: Mapping[str, object] | None = None,
) -> SamplingParams:
    """The sampling options to use for a checkpoint when its user names none.

    What the checkpoint's generation_config.json says about sampling wins, key by key, over the table of model cards;
    `do_sample` false makes it greedy. A checkpoint of the family that the table does not know gets the values of the
    LFM2 text models, any other greedy decoding.

    Args:
        model_type: of config.json.
        vocab_size: of config.json; it tells LFM2.5-8B-A1B from LFM2-8B-A1B.
        name: repository id, folder or `_name_or_path`, in any case; empty if unknown.
        generation_config: contents of generation_config.json; None if there is none.

    Raises:
        ConfigError: generation_config.json holds a value that cannot be used.
    """
    values = find_recommendation(model_type, vocab_size, name)
    return with_generation_config(values, generation_config or {})


def find_recommendation(model_type: str, vocab_size: int, name: str) -> SamplingParams:
    """The values of the first row of the table that applies; greedy if none does."""
    name = normalised_name(name)
    for row in TABLE:
        if row.applies(name, model_type, vocab_size):
            return row.values
    return GREEDY


def normalised_name(name: str) -> str:
    """The part of a path or repository id that names an LFM2 model, in lower case with hyphens; the last part if none.

    Only that part is read: a folder called "rag" further up says nothing about the model.
    """
    parts = [re.sub(r"[\s_-]+", "-", part.lower()) for part in re.split(r"[/\\]", name) if part]
    named = [part for part in parts if re.search(r"lfm2\b", part)]
    return (named or parts or [""])[-1]


def with_generation_config(values: SamplingParams, generation_config: Mapping[str, object]) -> SamplingParams:
    """`values` with what a generation_config.json says about sampling; null counts as not said."""
    changes = {key: generation_config[key] for key in SAMPLING_KEYS if generation_config.get(key) is not None}
    do_sample = generation_config.get("do_sample")
    if do_sample is False:
        changes = {"temperature": 0.0} | {k: v for k, v in changes.items() if k == "repetition_penalty"}
        values = GREEDY
    elif do_sample is True and values.temperature == 0:
        changes.setdefault("temperature", 1.0)
    return checked_replace(values, changes)


def checked_replace(values: SamplingParams, changes: Mapping[str, object]) -> SamplingParams:
    """`values` with `changes`, an unusable one reported as a fault of the checkpoint."""
    fields = {name: getattr(values, name) for name in SamplingParams.names()} | dict(changes)
    try:
        return SamplingParams(**fields)
    except OptionError as error:
        raise ConfigError(f"generation_config.json: {error}; correct the file or remove the key") from error
