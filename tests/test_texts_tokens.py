"""Where contents and spans come to stand among the tokens of real tokenizers and awkward templates."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import SettingError, TextError
from pilotfish.models.tiny import tiny_tokenizer
from pilotfish.texts import TokenizedText, encode, render, tokenize
from pilotfish.texts.tokens import TEMPLATE

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRIMMING = CHAT.replace("m.content", "m.content | trim")
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHAT
SHOUTING = CHAT.replace("m.content", "m.content | upper")
FORGETFUL = CHAT.replace("messages", "messages[1:]")
PARROT = CHAT.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")
BACKWARDS = CHAT.replace("messages", "messages | reverse")
PICKY = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
LAST_WORDS = CHAT + "{% if 'bye' in messages[0].content %}Farewell.{% endif %}"
FIRST_WORDS = "{% if 'hello' in messages[0].content %}Welcome.{% endif %}" + CHAT


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def greedy_tokenizer() -> PreTrainedTokenizerFast:
    """Merges over every edge, since nothing splits words; composes characters; hides spaces from ranges; has a BOS."""
    merges = [(")", ";"), (");", "Ċ"), ("x", ")"), (":", "Ġ"), ("Ã", "©"), ("Ġ", "Ġ")]
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "tiny": tiny_tokenizer(),
    "default_system": with_template(DEFAULT_SYSTEM),
    "trimming": with_template(TRIMMING),
    "base": with_template(None),
    "greedy": greedy_tokenizer(),
}
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

PIECES = [
    "user",
    "assistant",
    "system",
    "User: ",
    "\n\n",
    "x);\n",
    "é",
    "e\u0301",
    "🦈",
    "한",
    " ",
    "  ",
    "<|im_end|>\n",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), min_size=1, max_size=8).map("".join)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `Conversation`; tests build it, since type checks draw random numbers and strategies may not."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=4))
    messages = tuple(Message(role, "<" + draw(TEXTS) + ">") for role in roles)
    spans = []
    for index in draw(st.lists(st.integers(0, len(messages) - 1), max_size=4)):
        start = draw(st.integers(0, len(messages[index].content) - 1))
        end = draw(st.integers(start + 1, len(messages[index].content)))
        spans.append(
            Span(index, start, end, draw(st.sampled_from(["a", "b"])), draw(st.sampled_from([0.0, 0.25, 1.0])))
        )
    labels = draw(st.dictionaries(st.sampled_from(["a", "c"]), st.sampled_from([0.0, 1.0])))
    return {"id": "row", "group": "group", "messages": messages, "spans": tuple(spans), "labels": labels}


def exchange(response: str, *spans: tuple[int, int], prompt: str = "go", **labels: float) -> Conversation:
    messages = (Message("user", prompt), Message("assistant", response))
    return Conversation("row", "group", messages, tuple(Span(1, *span, "m", 1.0) for span in spans), labels)


def labelled_text(tokens: TokenizedText, metric: str = "m", value: float = 1.0) -> str:
    hits = [i for i, label in enumerate(tokens.labels[metric]) if label == value]
    return tokens.text[tokens.offsets[hits[0]][0] : tokens.offsets[hits[-1]][1]] if hits else ""


# Rendering


def test_contents_are_found_behind_a_role_header_that_spells_the_same_word() -> None:
    rendered = render([Message("user", "user"), Message("assistant", "user")], tiny_tokenizer())
    assert rendered.text == "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\nuser<|im_end|>\n"
    assert rendered.starts == (17, 54)
    assert rendered.lengths == (4, 4)
    assert rendered.templated


def test_a_default_system_message_of_the_template_moves_the_contents_and_belongs_to_no_message() -> None:
    conversation = exchange("Be kind.", prompt="Be kind.")
    tokens = tokenize(conversation, with_template(DEFAULT_SYSTEM))
    starts = render(conversation, with_template(DEFAULT_SYSTEM)).starts
    assert [tokens.text[start : start + 8] for start in starts] == ["Be kind."] * 2
    inside = [tokens.text.index("Be kind.") <= first < tokens.text.index("<|im_end|>") for first, _ in tokens.offsets]
    assert any(inside)
    assert {tokens.messages[i] for i, is_inside in enumerate(inside) if is_inside} == {TEMPLATE}


def test_a_tokenizer_without_a_template_gets_plain_paragraphs_and_says_so() -> None:
    rendered = render(exchange("yes", prompt="is it?"), with_template(None))
    assert rendered.text == "User: is it?\n\nAssistant: yes"
    assert not rendered.templated
    prompt = render([Message("user", "is it?")], with_template(None), add_generation_prompt=True)
    assert prompt.text == "User: is it?\n\nAssistant:"


@pytest.mark.parametrize("template", [tiny_tokenizer().chat_template, None], ids=["chat", "base"])
def test_the_prompt_of_a_generation_is_how_the_whole_conversation_begins(template: str | None) -> None:
    conversation = exchange("four", prompt="two and two?")
    prompt = render(conversation.messages[:1], with_template(template), add_generation_prompt=True)
    whole = render(conversation, with_template(template))
    assert whole.text.startswith(prompt.text)
    assert len(prompt.text) > prompt.starts[0] + prompt.lengths[0]


def test_a_template_that_trims_contents_moves_spans_along_with_the_text() -> None:
    tokens = tokenize(exchange("  \n bad code \n", (4, 7)), with_template(TRIMMING))
    assert "\nbad code<|im_end|>" in tokens.text
    assert labelled_text(tokens) == "bad"


def test_a_span_of_nothing_but_trimmed_white_space_is_counted_as_lost() -> None:
    tokens = tokenize(exchange("  ok  ", (0, 2), (4, 6), (1, 3)), with_template(TRIMMING))
    assert tokens.num_spans_lost == 2
    assert labelled_text(tokens) == "o"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (SHOUTING, "changes message 0 .user. by more than trimming its ends"),
        (FORGETFUL, "drops, repeats or moves message 0"),
        (PARROT, "drops, repeats or moves message 0"),
        (BACKWARDS, "drops, repeats or moves message 1"),
        (PICKY, "refuses the roles system, assistant: no system role; change the roles"),
        (LAST_WORDS, "changes message 1 .assistant. by more"),
        (FIRST_WORDS, "changes message 0 .system. by more"),
    ],
)
def test_a_template_that_does_more_than_wrap_contents_is_refused(template: str, words: str) -> None:
    first = Message("system" if template in (PICKY, FIRST_WORDS) else "user", "hello and bye")
    with pytest.raises(TextError, match=f"conversation 'row': .*{words}"):
        render(Conversation("row", "row", (first, Message("assistant", "so long"))), with_template(template))


def test_no_messages_and_half_a_character_are_refused() -> None:
    with pytest.raises(TextError, match="no messages to render; give at least one"):
        render([], tiny_tokenizer())
    with pytest.raises(TextError, match="these messages, message 0: character 2 is half a surrogate pair"):
        render([Message("user", "ab\ud83d")], tiny_tokenizer())


# Ranges of tokens


@any_tokenizer
@given(row=parts())
def test_every_content_stands_where_it_is_said_to(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    conversation = Conversation(**row)
    rendered = render(conversation, tokenizer)
    for index, message in enumerate(conversation.messages):
        start, size, skipped = rendered.starts[index], rendered.lengths[index], rendered.skipped[index]
        assert rendered.text[start : start + size] == message.content[skipped : skipped + size]
        assert message.content.strip() == message.content[skipped : skipped + size].strip()


@any_tokenizer
@given(row=parts())
def test_the_ranges_of_tokens_leave_no_character_of_the_text_out(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    conversation = Conversation(**row)
    rendered = render(conversation, tokenizer)
    covered = set()
    for start, end in encode(rendered, tokenizer).offsets:
        covered |= set(range(start, end))
    assert covered == set(range(len(rendered.text)))


@given(row=parts())
def test_token_ids_decode_to_the_rendered_text(row: dict[str, Any]) -> None:
    conversation = Conversation(**row)
    tokens = tokenize(conversation, tiny_tokenizer())
    assert tiny_tokenizer().decode(tokens.token_ids) == tokens.text


def test_bos_and_eos_have_no_characters_no_message_and_no_label() -> None:
    tokenizer = greedy_tokenizer()
    tokens = tokenize(exchange("x", (0, 1)), tokenizer)
    assert (tokens.token_ids[0], tokens.token_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for end in (0, -1):
        assert tokens.offsets[end] == (0, 0)
        assert tokens.messages[end] == TEMPLATE
        assert math.isnan(tokens.labels["m"][end])


def test_a_template_writes_its_own_bos_and_no_second_one_is_added() -> None:
    tokenizer = greedy_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    assert tokenize(exchange("x"), tokenizer).token_ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_character_ranges_is_refused() -> None:
    with pytest.raises(TextError, match="ByT5Tokenizer gives no character offsets; load the fast one"):
        tokenize(exchange("x"), ByT5Tokenizer())


# Labels


def test_all_bytes_of_a_split_character_take_its_label() -> None:
    tokens = tokenize(exchange("a🦈b", (1, 2)), tiny_tokenizer())
    assert tokens.labels["m"].count(1.0) == 4
    assert labelled_text(tokens) == "🦈"


def test_a_token_that_reaches_over_the_edge_of_a_span_is_labelled() -> None:
    tokens = tokenize(exchange("f(x)y", (2, 3)), greedy_tokenizer())
    assert labelled_text(tokens) == "x)"
    tokens = tokenize(exchange("f(z);\ny", (3, 4)), greedy_tokenizer())
    assert labelled_text(tokens) == ");\n"


def test_a_token_of_two_contents_belongs_to_the_first_and_takes_the_labels_of_both() -> None:
    tokenizer = greedy_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokens = tokenize(exchange(";y", (0, 1), prompt="z)"), tokenizer)
    assert [tokens.text[start:end] for start, end in tokens.offsets] == ["z", ");", "y"]
    assert tokens.messages == [0, 0, 1]
    assert tokens.labels["m"][1:] == [1.0, 0.0]


def test_a_span_over_composed_characters_covers_both_of_their_code_points() -> None:
    for end in ("b", " b", ""):
        tokens = tokenize(exchange("ae\u0301" + end, (2, 3)), greedy_tokenizer())
        assert labelled_text(tokens) == "e\u0301"
        assert tokens.labels["m"].count(1.0) == 1


def test_a_span_of_spaces_that_the_tokenizer_hides_still_has_its_tokens() -> None:
    tokens = tokenize(exchange("a    b", (1, 5)), greedy_tokenizer())
    assert labelled_text(tokens) == "    "
    assert tokens.num_spans_lost == 0


def test_outside_spans_a_metric_is_0_on_assistant_messages_and_on_messages_with_its_spans_alone() -> None:
    messages = tuple(Message(role, "ab") for role in ("user", "tool", "assistant", "user", "assistant"))
    tokens = tokenize(Conversation("row", "row", messages, (Span(1, 0, 1, "m", 1.0),)), tiny_tokenizer())
    by_message = {
        index: [label for label, message in zip(tokens.labels["m"], tokens.messages, strict=True) if message == index]
        for index in range(TEMPLATE, 5)
    }
    assert (by_message[1], by_message[2], by_message[4]) == ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    assert all(math.isnan(label) for index in (TEMPLATE, 0, 3) for label in by_message[index])


def test_a_response_label_of_0_labels_every_assistant_token_and_a_positive_one_labels_none() -> None:
    tokens = tokenize(exchange("abc", clean=0.0, foul=1.0, both=1.0), tiny_tokenizer())
    clean = [label for label, message in zip(tokens.labels["clean"], tokens.messages, strict=True) if message == 1]
    assert clean == [0.0] * 3
    assert sum(math.isnan(label) for label in tokens.labels["clean"]) == len(tokens.token_ids) - 3
    assert all(math.isnan(label) for label in tokens.labels["foul"])
    assert tokens.response_labels == {"clean": 0.0, "foul": 1.0, "both": 1.0}


def test_where_spans_overlap_the_largest_value_counts_whatever_their_order() -> None:
    messages = (Message("assistant", "abcd"),)
    spans = (Span(0, 0, 3, "m", 0.75), Span(0, 1, 4, "m", 0.25))
    for order in (spans, spans[::-1]):
        tokens = tokenize(Conversation("row", "row", messages, order), tiny_tokenizer())
        assert [label for label in tokens.labels["m"] if not math.isnan(label)] == [0.75, 0.75, 0.75, 0.25]
        assert tokens.response_labels == {"m": 0.75}


def test_a_given_response_label_stands_over_what_spans_say() -> None:
    assert tokenize(exchange("abc", (0, 1), m=0.0), tiny_tokenizer()).response_labels == {"m": 0.0}


def expected_label(
    conversation: Conversation, metric: str, rendered_starts: tuple[int, ...], token: tuple[int, int]
) -> float:
    """The rule said a second way: one value a character, the largest that a token touches."""
    has_spans = any(span.metric == metric for span in conversation.spans)
    values = []
    for index, (message, start) in enumerate(zip(conversation.messages, rendered_starts, strict=True)):
        spans = [span for span in conversation.spans if (span.metric, span.message) == (metric, index)]
        is_known = bool(spans) or (
            message.role == "assistant" and (has_spans or conversation.labels.get(metric) == 0.0)
        )
        for character in range(len(message.content)):
            inside = [span.value for span in spans if span.start <= character < span.end]
            if token[0] <= start + character < token[1] and is_known:
                values.append(max(inside, default=0.0))
    return max(values, default=math.nan)


@any_tokenizer
@given(row=parts())
def test_labels_are_those_of_the_characters_that_a_token_touches(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    conversation = Conversation(**row)
    tokens = tokenize(conversation, tokenizer)
    starts = render(conversation, tokenizer).starts
    assert set(tokens.labels) == {*conversation.labels, *(span.metric for span in conversation.spans)}
    for metric, labels in tokens.labels.items():
        expected = [expected_label(conversation, metric, starts, token) for token in tokens.offsets]
        assert str(labels) == str(expected)  # as text, where NaN equals NaN
    assert tokens.num_spans_lost == 0


# Truncation


@any_tokenizer
@given(row=parts(), max_tokens=st.integers(1, 60))
def test_truncation_keeps_the_beginning_and_counts_what_fell_out(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], max_tokens: int
) -> None:
    conversation = Conversation(**row)
    whole, cut = tokenize(conversation, tokenizer), tokenize(conversation, tokenizer, max_tokens=max_tokens)
    size = len(cut.token_ids)
    assert size == min(max_tokens, len(whole.token_ids))
    assert cut.num_truncated == len(whole.token_ids) - size
    assert (cut.token_ids, cut.offsets, cut.messages) == (
        whole.token_ids[:size],
        whole.offsets[:size],
        whole.messages[:size],
    )
    assert str(cut.labels) == str({metric: labels[:size] for metric, labels in whole.labels.items()})
    starts = render(conversation, tokenizer).starts
    kept = {character for start, end in cut.offsets for character in range(start, end)}
    lost = [
        s for s in conversation.spans if not kept & set(range(starts[s.message] + s.start, starts[s.message] + s.end))
    ]
    assert cut.num_spans_lost == len(lost)
    assert (cut.text, cut.response_labels) == (whole.text, whole.response_labels)


def test_a_text_longer_than_the_context_of_the_model_passes_without_a_warning() -> None:
    assert len(tokenize(exchange("é" * 600), tiny_tokenizer()).token_ids) > 1200


def test_a_limit_of_no_tokens_is_refused() -> None:
    with pytest.raises(SettingError, match="max_tokens is 0; give 1 or more, or None"):
        tokenize(exchange("x"), tiny_tokenizer(), max_tokens=0)
