"""The prompted judge: its probability is the model's own of yes against no, and its cost is what the model read."""

import pytest
import torch
from tokenizers import normalizers

from pilotfish.core import Conversation, Message
from pilotfish.errors import ModelError, SettingError
from pilotfish.models import FAMILIES, LoadedModel, identify, tiny_model, tiny_tokenizer
from pilotfish.scores.judge import CUT_MARK, PROMPT, QUESTIONS, _answer_ids, judge_question, judge_responses
from pilotfish.texts import encode, render

TOKENIZER = tiny_tokenizer()
QUESTION = "Is it bad?"


def loaded(family="llama", dtype=torch.float32):
    model = tiny_model(family, seed=0).to(dtype)
    return LoadedModel(model, TOKENIZER, identify(model, TOKENIZER, "tiny"), "a test")


def text_of(answer, name="a"):
    return Conversation(name, name, (Message("user", "Say it."), Message("assistant", answer)))


def prompt_of(exchange, question=QUESTION):
    message = Message("user", PROMPT.format(exchange=exchange, question=question))
    return encode(render([message], TOKENIZER, add_generation_prompt=True), TOKENIZER).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_the_models_own_probability_of_yes_among_yes_and_no(family):
    reader = loaded(family)
    judged = judge_responses(reader, [text_of("return x")], QUESTION)
    ids = prompt_of("User: Say it.\n\nAssistant: return x")
    with torch.inference_mode():
        odds = reader.model(torch.tensor([ids])).logits[0, -1].softmax(0)
    yes, no = (float(sum(odds[TOKENIZER.convert_tokens_to_ids(token)] for token in pair)) for pair in ("Yy", "Nn"))
    assert judged.scores.tolist() == pytest.approx([yes / (yes + no)], rel=1e-4)
    assert judged.num_tokens.tolist() == [len(ids)]
    assert judged.num_truncated == 0


def test_texts_are_judged_one_by_one_in_their_order():
    reader = loaded()
    texts = [text_of(word * count) for word, count in (("import ", 9), ("no", 1), ("return the ", 5))]
    together = judge_responses(reader, texts, QUESTION)
    alone = [judge_responses(reader, [text], QUESTION) for text in texts]
    assert together.scores.tolist() == [float(each.scores) for each in alone]
    assert together.num_tokens.tolist() == [int(each.num_tokens) for each in alone]
    assert len(set(together.scores.tolist())) == 3


def test_logits_of_a_bfloat16_model_are_not_rounded():
    reader = loaded(dtype=torch.bfloat16)
    ids = torch.tensor([prompt_of("User: Say it.\n\nAssistant: return x")])
    with torch.inference_mode():
        state = reader.model.model(ids).last_hidden_state[0, -1].float()
        fine = reader.model.lm_head.weight.float() @ state
        coarse = reader.model(ids).logits[0, -1].float()
    rows = [TOKENIZER.convert_tokens_to_ids(list(pair)) for pair in ("Yy", "Nn")]
    expected, rounded = (
        float(torch.sigmoid(logits[rows[0]].logsumexp(0) - logits[rows[1]].logsumexp(0))) for logits in (fine, coarse)
    )
    score = judge_responses(reader, [text_of("return x")], QUESTION).scores
    assert score.dtype == torch.float64
    assert float(score) == pytest.approx(expected, rel=1e-5)
    assert float(score) != pytest.approx(rounded, rel=1e-5)


def test_a_long_text_is_cut_at_its_end_marked_and_counted():
    reader = loaded()
    long, short = text_of("0123456789" * 9), text_of("01")
    judged = judge_responses(reader, [long, short], QUESTION, max_tokens=60)
    assert judged.num_truncated == 1
    assert judged.num_tokens[0] == 60 + len(prompt_of("")) + len(TOKENIZER(CUT_MARK)["input_ids"])
    other_end = judge_responses(reader, [text_of("0123456789" * 8 + "import")], QUESTION, max_tokens=60)
    assert other_end.scores[0] == judged.scores[0]
    other_start = judge_responses(reader, [text_of("import" + "0123456789" * 8)], QUESTION, max_tokens=60)
    assert other_start.scores[0] != judged.scores[0]


def test_the_question_moves_the_score():
    scores = {float(judge_responses(loaded(), [text_of("x")], question).scores) for question in QUESTIONS.values()}
    assert len(scores) == len(QUESTIONS) == 6


def test_every_spelling_counts_once_and_none_counts_for_both_answers():
    yes, no = _answer_ids(TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens(yes) == ["Y", "y"]  # the space, which both share, is out
    assert TOKENIZER.convert_ids_to_tokens(no) == ["N", "n"]


def test_a_vocabulary_that_cannot_tell_yes_from_no_is_refused():
    folded = tiny_tokenizer()
    folded.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(letter, "?") for letter in "YyNn"])
    with pytest.raises(ModelError, match="use another model as the judge"):
        _answer_ids(folded)


def test_no_texts_give_no_scores():
    judged = judge_responses(loaded(), [], QUESTION)
    assert len(judged.scores) == len(judged.num_tokens) == judged.num_truncated == 0


def test_a_metric_without_a_question_is_refused_with_what_to_do():
    assert judge_question("refusal").endswith("?")
    with pytest.raises(SettingError, match=r"'scheming' has no question .* Give a sentence of your own"):
        judge_question("scheming")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": " \n"}, "question is empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"question": "Is it? " * 200}, "smaller max_tokens"),
    ],
)
def test_a_question_or_a_length_that_cannot_be_used_is_refused(changes, words):
    with pytest.raises(SettingError, match=words):
        judge_responses(loaded(), [text_of("x")], **({"question": QUESTION} | changes))
