from pathlib import Path

import pytest
import small_tokenizers
from mask_timing import measure_masks, tools_like_a_server

from lfm_mlx.constrain import ToolCalls, grammar_tokenizer
from lfm_mlx.errors import OptionError


def test_masks_of_many_tools_take_a_small_part_of_a_step(tmp_path: Path) -> None:
    vocabulary = grammar_tokenizer(small_tokenizers.wide_tokenizer(tmp_path, 8_000))
    times = measure_masks(
        lambda seed: ToolCalls(tools_like_a_server(67, seed), tool_choice="required"),
        vocabulary,
        num_answers=4,
        num_starts=2,
    )
    # Loose: a shared machine may stop a thread in the middle. The bench measures in earnest.
    assert times.median_ms < 2
    assert times.num_masks > 100


def test_tools_that_differ_are_grammars_that_differ() -> None:
    assert tools_like_a_server(3, 0) != tools_like_a_server(3, 1)
    with pytest.raises(OptionError):
        ToolCalls([*tools_like_a_server(1), *tools_like_a_server(1)])
