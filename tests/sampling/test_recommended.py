"""Claims about the recommended sampling options."""

import re

import pytest

from lfm_mlx.errors import ConfigError
from lfm_mlx.sampling import recommended_sampling
from lfm_mlx.sampling.recommended import (
    GREEDY,
    LFM2_TEXT,
    LFM2_VISION,
    LFM25_INSTRUCT,
    LFM25_MOE,
    LFM25_THINKING,
    TABLE,
    normalised_name,
)
from lfm_mlx.types import SamplingParams

IDS_ONLY = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0, "transformers_version": "5.23.0"}


@pytest.mark.parametrize(
    ("model_type", "vocab_size", "name", "expected"),
    [
        ("lfm2_moe", 128000, "", LFM25_MOE),
        ("lfm2_moe", 128000, "LiquidAI/LFM2.5-8B-A1B-MLX-4bit", LFM25_MOE),
        ("lfm2_moe", 65536, "LFM2-8B-A1B", LFM2_TEXT),
        ("lfm2_moe", 65536, "", LFM2_TEXT),
        ("lfm2_moe", 65536, "LFM2-24B-A2B", LFM2_TEXT),
        ("lfm2_moe", 512, "examples/tiny", LFM2_TEXT),
        ("lfm2", 65536, "LiquidAI/LFM2-1.2B", LFM2_TEXT),
        ("lfm2", 65536, "LFM2-2.6B-Exp", LFM2_TEXT),
        ("lfm2", 65536, "LFM2.5-1.2B-Instruct", LFM25_INSTRUCT),
        ("lfm2", 65536, "mlx-community/lfm2.5-350m-8bit", LFM25_INSTRUCT),
        ("lfm2", 65536, "lfm2_5_1_2b_instruct", LFM25_INSTRUCT),
        ("lfm2", 128000, "", LFM25_INSTRUCT),
        ("lfm2", 128000, "LiquidAI/LFM2.5-2.6B-MLX/4bit", LFM25_INSTRUCT),
        ("lfm2", 65536, "LFM2.5-1.2B-Thinking", LFM25_THINKING),
        ("lfm2", 65536, "/models/LFM2.5-1.2B-thinking-mlx/", LFM25_THINKING),
        ("lfm2", 65536, "LFM2.5-1.2B-JP", LFM2_TEXT),
        ("lfm2", 65536, "LFM2.5-1.2B-JP-202606", LFM25_INSTRUCT),
        ("lfm2", 65536, "LFM2.5-1.2B-Base", LFM2_TEXT),
        ("lfm2", 65536, "LFM2-350M-Extract", GREEDY),
        ("lfm2", 65536, "lfm2-1.2b-rag-4bit", GREEDY),
        ("lfm2", 65536, "LFM2-1.2B-Tool", GREEDY),
        ("lfm2", 65536, "/srv/rag/tool/LFM2-1.2B", LFM2_TEXT),
        ("lfm2-vl", 65536, "LFM2-VL-1.6B", LFM2_VISION),
        ("lfm2_vl", 128000, "", LFM2_VISION),
        ("lfm2", 65536, "models--LiquidAI--LFM2.5-VL-450M/snapshots/0123abcd", LFM2_VISION),
        ("llama", 128000, "Llama-3", GREEDY),
    ],
)
def test_a_checkpoint_gets_the_values_of_its_card(model_type, vocab_size, name, expected):
    found = recommended_sampling(
        model_type=model_type, vocab_size=vocab_size, name=name, generation_config=dict(IDS_ONLY)
    )
    assert found == expected


def test_the_values_are_those_written_on_the_cards():
    assert SamplingParams(temperature=0.2, top_k=80, repetition_penalty=1.05) == LFM25_MOE
    assert SamplingParams(temperature=0.1, top_k=50, repetition_penalty=1.05) == LFM25_INSTRUCT
    assert SamplingParams(temperature=0.05, top_k=50, repetition_penalty=1.05) == LFM25_THINKING
    assert SamplingParams(temperature=0.3, min_p=0.15, repetition_penalty=1.05) == LFM2_TEXT
    assert SamplingParams(temperature=0.1, min_p=0.15, repetition_penalty=1.05) == LFM2_VISION
    assert SamplingParams(temperature=0.0) == GREEDY


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({"temperature": 0.7}, SamplingParams(temperature=0.7, top_k=80, repetition_penalty=1.05)),
        (
            {"top_k": 0, "top_p": 0.9, "min_p": None},
            SamplingParams(temperature=0.2, top_p=0.9, repetition_penalty=1.05),
        ),
        ({"do_sample": True}, LFM25_MOE),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, GREEDY),
        ({"do_sample": False, "repetition_penalty": 1.2}, SamplingParams(repetition_penalty=1.2)),
    ],
)
def test_what_the_checkpoint_says_wins_key_by_key(generation_config, expected):
    found = recommended_sampling(model_type="lfm2_moe", vocab_size=128000, generation_config=generation_config)
    assert found == expected


def test_a_greedy_model_whose_checkpoint_asks_for_sampling_samples_at_temperature_one():
    found = recommended_sampling(
        model_type="lfm2", vocab_size=65536, name="LFM2-1.2B-Tool", generation_config={"do_sample": True}
    )
    assert found.temperature == 1


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": -1}])
def test_an_unusable_value_is_reported_with_file_and_key(wrong):
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {next(iter(wrong))}"):
        recommended_sampling(model_type="lfm2", vocab_size=65536, generation_config=wrong)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ""),
        ("LiquidAI/LFM2.5-2.6B-MLX/4bit", "lfm2.5-2.6b-mlx"),
        (r"C:\models\LFM2_8B A1B", "lfm2-8b-a1b"),
        ("/models/tiny/", "tiny"),
    ],
)
def test_the_name_is_read_from_the_part_that_names_the_model(name, expected):
    assert normalised_name(name) == expected


def test_every_row_of_the_table_names_its_source_and_compiles():
    for row in TABLE:
        assert row.source
        re.compile(row.name or "")
