"""Stop strings: nothing of one is ever shown, everything before it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinfer.engine.stop import StopStrings


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stop = StopStrings(stops)
    text = "".join(stop.push(piece) for piece in pieces) + stop.flush()
    return text, stop.stopped


def test_a_stop_string_over_several_pieces() -> None:
    assert shown(["The e", "nd", ". More"], ["end."]) == ("The ", True)


def test_the_first_of_several_wins() -> None:
    assert shown(["a###b</s>c"], ["</s>", "###"]) == ("a", True)


def test_a_false_start_is_shown_in_the_end() -> None:
    assert shown(["ab#", "#c", "#"], ["###"]) == ("ab##c#", False)


def test_without_stops_nothing_is_held_back() -> None:
    assert StopStrings([]).push("x") == "x"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_equals_searching_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    text, stopped = shown(pieces, stops)
    assert stopped == bool(found)
    if not found:
        assert text == whole
    else:
        assert not any(stop in text for stop in stops)
        assert whole.startswith(text)
