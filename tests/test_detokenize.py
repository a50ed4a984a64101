"""Streamed text is the decoded text, whatever the tokens split."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engines.detokenize import TextStream
from pilotfish.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    state = TextStream(TOKENIZER, stop)
    deltas = []
    for index, token in enumerate(ids):
        deltas.append(state.push(token, is_last=index == len(ids) - 1))
        if state.is_stopped:
            break
    return deltas, state


@given(text=st.text(min_size=1, max_size=30).filter(lambda text: "<|" not in text))
@settings(deadline=None)
def test_the_deltas_add_up_to_the_text(text):
    deltas, _ = stream(text)
    assert "".join(deltas) == text


def test_half_a_character_is_never_shown():
    deltas, _ = stream("né 💡!")
    assert "".join(deltas) == "né 💡!"
    assert not any("\ufffd" in delta for delta in deltas)
    assert "" in deltas


@given(
    text=st.text(alphabet="abc", min_size=1, max_size=20),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=1, max_size=2),
)
@settings(deadline=None)
def test_nothing_of_a_stop_string_is_ever_shown(text, stop):
    deltas, state = stream(text, tuple(stop))
    ends = [text.find(word) for word in stop if word in text]
    shown = "".join(deltas)
    if ends:
        # The stop string that is complete first ends the text, before an earlier but longer one could be.
        assert state.is_stopped
        assert text.startswith(shown)
        assert not any(word in shown for word in stop)
        assert any(text.startswith(shown + word) for word in stop)
    else:
        assert shown == text


def test_an_unfinished_character_at_the_end_is_shown_as_what_it_is():
    ids = TOKENIZER("💡", add_special_tokens=False)["input_ids"][:2]
    state = TextStream(TOKENIZER)
    assert state.push(ids[0]) == ""
    assert "\ufffd" in state.push(ids[1], is_last=True)
