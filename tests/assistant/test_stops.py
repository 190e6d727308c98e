"""Stop strings: cut at the same place however the text comes, and never shown in part."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.assistant.stops import MAX_CHARACTERS, MAX_STOPS, StopStrings
from moec.compiler.errors import RunError

LETTERS = st.text("ab.", max_size=12)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read on letter by letter until the text ends in a stop string, take the longest."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=600, deadline=None)
@given(pieces=st.lists(LETTERS, max_size=6), stops=st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4))
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    found = StopStrings(stops)
    shown = ""
    wanted, hit = cut("".join(pieces), stops)
    for piece in pieces:
        shown += found.push(piece)
        assert wanted.startswith(shown)  # nothing of a stop string was ever shown
    assert (shown + found.finish(), found.found) == (wanted, hit)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, stops=st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    found = StopStrings(stops)
    shown = "".join(map(found.push, text))
    held = text[len(shown) :] if found.found is None else ""
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_after_the_stop_string_nothing_comes() -> None:
    found = StopStrings(["END"])
    assert [found.push(p) for p in ("one E", "N", "D two", "three")] == ["one ", "", "", ""]
    assert (found.finish(), found.found) == ("", "END")


@pytest.mark.parametrize(
    ("stops", "what"),
    [
        (["a", ""], "has no characters"),
        (["x" * (MAX_CHARACTERS + 1)], f"{MAX_CHARACTERS + 1} characters"),
        ([str(i) for i in range(10**6)], f"1000000 stop strings; give at most {MAX_STOPS}"),
    ],
)
def test_refused(stops: list[str], what: str) -> None:
    with pytest.raises(RunError, match=what):
        StopStrings(stops)


def test_many_are_quick() -> None:
    """A thousand of them over ten thousand pieces: without an index this would take minutes."""
    found = StopStrings([f"{'ab' * 20}{i}" for i in range(MAX_STOPS)])
    text = "ab" * 5000
    assert "".join(map(found.push, text)) + found.finish() == text
