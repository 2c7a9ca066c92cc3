import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.errors import OptionError
from lfm_mlx.parsing import StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=8), STOPS)
def test_text_ends_before_the_stop_that_is_complete_first_however_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    stopper = StopStrings(stops)
    shown = "".join(map(stopper.add, pieces)) + stopper.finish()
    _, first = min(
        ((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=(0, None)
    )
    assert shown == text[:first]
    assert stopper.is_found == any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    stopper = StopStrings(["END"])
    assert [stopper.add(sign) for sign in "xEyEN"] == ["x", "", "Ey", "", ""]
    assert stopper.finish() == "EN"


@pytest.mark.parametrize("stops", [[""], [1]])
def test_stop_that_is_no_text_is_refused(stops: list[str]) -> None:
    with pytest.raises(OptionError, match="stop"):
        StopStrings(stops)
