"""What counts as a gap, a duplicate, a mismatch and a failure."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.drills.events import DONE, Event, read_events
from fathom.drills.transcript import Transcript, Verdict, judge, span_moved


def chunk(text: str, *, index: int = 0, tokens: bool = True, end: str | None = None) -> str:
    choice: dict = {"index": index, "delta": {"content": text}, "finish_reason": end}
    if tokens:
        choice["logprobs"] = {"content": [{"token": text}] if text else []}
        choice["depths"] = [30] if text else []
    return json.dumps({"choices": [choice]})


def transcript(numbers: list[int], texts: str, *, tokens: bool = True) -> Transcript:
    """One event a character, then the end; ``numbers`` are the events' ids."""
    found = Transcript()
    data = [*(chunk(c, tokens=tokens) for c in texts), chunk("", end="stop"), DONE]
    for number, each in zip(numbers, data, strict=True):
        found.add(Event(each, str(number)))
    return found


WHOLE = transcript([1, 2, 3, 4, 5, 6], "abcd")


def test_equal_answers_have_no_fault_wherever_counting_starts() -> None:
    assert judge(WHOLE, WHOLE) == Verdict()
    assert judge(transcript([0, 1, 2, 3, 4, 5], "abcd"), WHOLE) == Verdict()


@pytest.mark.parametrize("tokens", [True, False])
def test_a_lost_event_is_one_gap_and_a_mismatch(tokens: bool) -> None:
    reference = transcript([1, 2, 3, 4, 5, 6], "abcd", tokens=tokens)
    got = transcript([1, 2, 4, 5, 6], "abd", tokens=tokens)
    assert judge(got, reference) == Verdict(gaps=1, mismatch=1)
    renumbered = transcript([1, 2, 3, 4, 5], "abd", tokens=tokens)
    assert judge(renumbered, reference) == Verdict(gaps=1, mismatch=1)


@pytest.mark.parametrize("numbers", [[1, 2, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]])
def test_an_event_given_twice_is_one_duplicate_and_a_mismatch(numbers: list[int]) -> None:
    assert judge(transcript(numbers, "abbcd"), WHOLE) == Verdict(duplicates=1, mismatch=1)


def test_a_stream_that_begins_in_the_middle_has_a_gap() -> None:
    assert judge(transcript([3, 4, 5, 6], "cd"), WHOLE) == Verdict(gaps=1, mismatch=1)


def test_other_words_are_a_mismatch_alone() -> None:
    assert judge(transcript([1, 2, 3, 4, 5, 6], "abXd"), WHOLE) == Verdict(mismatch=1)


def test_the_same_text_by_other_tokens_is_a_mismatch() -> None:
    got = Transcript()
    for number, data in enumerate([chunk("ab"), chunk("cd"), chunk("", end="stop"), DONE], 1):
        got.add(Event(data, str(number)))
    assert got.completions[0].text == WHOLE.completions[0].text
    assert judge(got, WHOLE) == Verdict(mismatch=1)


def test_a_missing_completion_is_a_gap() -> None:
    two = transcript([1, 2, 3, 4, 5, 6], "abcd")
    two.add(Event(chunk("x", index=1), "7"))
    assert judge(WHOLE, two) == Verdict(gaps=1, mismatch=1)


def test_an_error_in_a_stream_is_a_failure_whose_text_is_not_judged() -> None:
    found = Transcript()
    found.add(Event(chunk("a"), "1"))
    found.add(Event('{"error": {"message": "no deep stage is left"}}', "2"))
    found.add(Event(DONE, "3"))
    assert found.error == "no deep stage is left"
    assert judge(found, WHOLE) == Verdict(failed=1)


def test_a_stream_without_an_end_or_without_ids_has_failed() -> None:
    found = Transcript()
    found.add(Event(chunk("a"), "1"))
    assert judge(found, WHOLE).failed
    found.add(Event(DONE))
    assert "without a number" in found.error


texts = st.text("abc", min_size=1, max_size=20)


@given(text=texts, data=st.data())
def test_a_span_left_out_is_found(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    size = data.draw(st.integers(1, len(text) - start))
    assert span_moved(text, text[:start] + text[start + size :]) == size


@given(text=texts, data=st.data())
def test_a_span_given_again_is_found(text: str, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(text)))
    size = data.draw(st.integers(1, end))
    assert span_moved(text, text[:end] + text[end - size :]) == -size


@given(text=texts, data=st.data())
def test_another_character_is_no_moved_span(text: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text) - 1))
    assert span_moved(text, text[:place] + "z" + text[place + 1 :]) == 0
    assert span_moved(text, text) == 0


def test_events_are_read_as_the_standard_says() -> None:
    lines = [
        b": a comment\n", b"\n", b"id: 1\r\n", b"data: a\r\n", b"\r\n", b"data:b\n", b"data: c\n",
        b"retry: 5\n", b"\n", b"id: 2\n", b"\n", b"id: 3\n", b"data: torn",
    ]  # fmt: skip
    assert list(read_events(lines)) == [Event("a", "1"), Event("b\nc")]
