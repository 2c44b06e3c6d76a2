"""Stop strings are taken out of the text, and no part of one is ever shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fathom.engine.text import TextStream


class Letters:
    """A detokenizer over the alphabet: token 0 is 'a', token 1 is 'b', ..."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


@given(
    st.lists(st.integers(0, 2), max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_at_the_first_stop_string(tokens, stops):
    stream = TextStream(Letters(), stops)
    shown, text, hit = "", "", None
    for token in tokens:
        text += chr(ord("a") + token)
        hit = stream.push(token)
        shown += stream.take()
        first = min((text.find(s) for s in stops if s in text), default=None)
        assert (hit is not None) == (first is not None)
        if hit is not None:
            assert shown == text[:first] and text.startswith(hit, first)
            break
        # Held back is only what may still become a stop string.
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert not held or any(s.startswith(held) for s in stops)
    stream.end()
    shown += stream.take()
    if hit is None:
        assert shown == text


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, ("x",))
    assert stream.push(3) is None
    assert stream.end() is None
    assert stream.take() == ""
