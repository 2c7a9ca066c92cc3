"""Where tokens stand in their rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.cache import Span
from lfm_mlx.errors import OptionError


def test_rows_that_start_alike_share_one_offset_and_need_no_mask_array():
    span = Span.make((5, 5), 3)
    assert span.is_even
    assert not span.is_padded
    assert span.mask == "causal"
    assert span.offsets.shape == ()
    assert span.columns.tolist() == [[5, 6, 7]]
    assert (span.end, span.ends) == (8, (8, 8))


def test_one_token_a_row_sees_everything_when_rows_are_even():
    assert Span.make((5, 5), 1).mask is None


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_uneven_rows_see_their_own_past_and_nothing_behind_themselves(num_tokens):
    starts = (2, 6)
    span = Span.make(starts, num_tokens)
    assert not span.is_even
    assert span.columns.tolist() == [[start + i for i in range(num_tokens)] for start in starts]
    mask = np.array(span.mask)
    assert mask.shape == (2, 1, num_tokens, 6 + num_tokens)
    for row, start in enumerate(starts):
        for i in range(num_tokens):
            assert mask[row, 0, i].tolist() == [column <= start + i for column in range(6 + num_tokens)]


def test_padding_is_written_and_not_counted():
    span = Span.make((0, 4), 3, [3, 1])
    assert span.is_padded
    assert span.end == 7
    assert span.ends == (3, 5)


@pytest.mark.parametrize("counts", [[4, 1], [-1, 1], [1], [1, 1, 1]], ids=str)
def test_lengths_that_do_not_fit_are_refused(counts):
    with pytest.raises(OptionError, match=r"lengths is \[.*\], expected 2 whole numbers \(one a row\) from 0 to 3"):
        Span.make((0, 0), 3, counts)


def test_offsets_are_int32():
    assert Span.make((1, 2), 1).offsets.dtype == mx.int32
