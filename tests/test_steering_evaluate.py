"""What a vector does is measured beside a prompt, and one that loses is said to lose."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_steering_dose import MID, direction

from pilotfish.core import Message
from pilotfish.errors import SettingError, TextError
from pilotfish.models import LoadedModel, Pair, tiny_pair
from pilotfish.runs import generator
from pilotfish.steering import (
    Arm,
    Budget,
    Decoding,
    RecipeConfig,
    Steering,
    against_prompt,
    answer,
    compare,
    few_shot,
    letter_probability,
    margins,
    random_like,
    shuffled,
    steer,
    text_losses,
)
from pilotfish.steering.behaviours import FUNCTION_WORDS, french_share, is_number, last_number, repetition
from pilotfish.steering.recipe import MARGIN, PROBABILITY, divided
from pilotfish.taps import When
from pilotfish.texts import Contrast, encode, render

PLAIN = Arm(name="no steering")


def contrast(index: int, *, prompt: str = "Is it so?", positive: str = "(A)", negative: str = "(B)") -> Contrast:
    return Contrast(id=str(index), group=str(index), prompt=f"{prompt} {index}", positive=positive, negative=negative)


LETTERS = [contrast(i) for i in range(4)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    pair = tiny_pair(seed=0)
    return LoadedModel(pair.target, pair.tokenizer, pair.target_identity, "")


def vector_arm(pair: Pair, dose: float = 2.0) -> Arm:
    return Arm(name="vector", edits=Steering(directions=(direction(pair),)).edits(dose, pair.target))


# Measures


def log_probs(loaded: LoadedModel, prompt: list[int], answer: str) -> tuple[list[int], torch.Tensor]:
    ids = loaded.tokenizer(answer)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return ids, logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]


def test_the_probability_of_a_letter_is_its_share_of_the_two(loaded: LoadedModel) -> None:
    rendered = render([Message("user", LETTERS[0].prompt)], loaded.tokenizer, add_generation_prompt=True)
    prompt = encode(rendered, loaded.tokenizer).token_ids
    bracket = loaded.tokenizer("(")["input_ids"]
    with torch.no_grad():
        odds = loaded.model(torch.tensor([prompt + bracket])).logits[0, -1].double().softmax(-1)
    a, b = (odds[loaded.tokenizer(letter)["input_ids"][0]] for letter in "AB")
    assert float(letter_probability(loaded, PLAIN, LETTERS)[0]) == pytest.approx(float(a / (a + b)), abs=1e-5)


def test_a_margin_counts_the_tokens_that_differ_as_a_mean_over_each_side(loaded: LoadedModel) -> None:
    item = contrast(1, positive="yes indeed!", negative="yes, no!")
    rendered = render([Message("user", item.prompt)], loaded.tokenizer, add_generation_prompt=True)
    prompt = encode(rendered, loaded.tokenizer).token_ids
    means = []
    for text in (item.positive, item.negative):
        ids, found = log_probs(loaded, prompt, text)
        differing = list(range(3, len(ids) - 1))  # both begin with `yes` in letters and end with `!`
        means.append(found[differing].mean())
    assert float(margins(loaded, PLAIN, [item])[0]) == pytest.approx(float(means[0] - means[1]), abs=1e-4)


def test_swapped_answers_have_the_opposite_margin(loaded: LoadedModel) -> None:
    for item in (contrast(1), contrast(2, positive="a longer answer", negative="no")):
        swapped = Contrast(id="s", group="s", prompt=item.prompt, positive=item.negative, negative=item.positive)
        one, other = margins(loaded, PLAIN, [item, swapped])
        assert float(one) == pytest.approx(-float(other), abs=1e-6)


def test_margins_of_many_are_those_of_each_alone(loaded: LoadedModel, pair: Pair) -> None:
    """Prompts of several lengths, with and without long beginnings that all share, letters and longer answers."""
    items = [contrast(i, prompt="Is it so? " * (1 + i % 3)) for i in range(6)]
    items += [
        contrast(9, positive="yes indeed", negative="no, " * 5),
        contrast(7, prompt="", positive="of", negative="the"),
    ]
    scoped = Steering(directions=(direction(pair),), when=When(phase="generation", positions=(30, 70)))
    arms = [PLAIN, vector_arm(pair), Arm(name="scoped", edits=scoped.edits(3.0, pair.target)), few_shot(items[:3])]
    for arm in arms:
        together = margins(loaded, arm, items)
        each = torch.cat([margins(loaded, arm, [item]) for item in items])
        torch.testing.assert_close(together, each, rtol=0, atol=2e-5)


def test_losses_of_many_texts_are_those_of_each_alone(loaded: LoadedModel, pair: Pair) -> None:
    texts = ["def of the", "return x and the rest of it", "a of"]
    for arm in (PLAIN, vector_arm(pair), Arm(name="told", instruction="Say of the and return. " * 4)):
        each = torch.cat([text_losses(loaded, arm, [text]) for text in texts])
        torch.testing.assert_close(text_losses(loaded, arm, texts), each, rtol=0, atol=2e-5)


def test_an_answer_that_begins_the_other_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(TextError, match="contrast '1': one answer is the beginning of the other"):
        margins(loaded, PLAIN, [contrast(1, positive="yes", negative="yes!")])


def test_edits_instructions_and_examples_all_move_the_margin(loaded: LoadedModel, pair: Pair) -> None:
    plain = margins(loaded, PLAIN, LETTERS)
    for arm in (vector_arm(pair), Arm(name="told", instruction="Say A."), few_shot(LETTERS[:1])):
        assert (margins(loaded, arm, LETTERS[1:]) - plain[1:]).abs().min() > 1e-3
    assert torch.equal(margins(loaded, vector_arm(pair, 0.0), LETTERS), plain)


def test_the_loss_of_a_text_leaves_out_its_first_token_and_what_stands_before_it(loaded: LoadedModel) -> None:
    text = "def of the"
    ids = loaded.tokenizer(text)["input_ids"]
    for arm, prefix in ((PLAIN, []), (Arm(name="word", prefix=" x"), loaded.tokenizer(" x")["input_ids"])):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([prefix + ids])).logits[0].double().log_softmax(-1)
        expected = -logits[len(prefix) : -1].gather(-1, torch.tensor(ids[1:])[:, None]).mean()
        assert float(text_losses(loaded, arm, [text])[0]) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(TextError, match="fewer than two tokens"):
        text_losses(loaded, PLAIN, ["a"])


def test_answers_come_with_their_damage_and_an_instruction_has_one_too(loaded: LoadedModel, pair: Pair) -> None:
    def found(arm: Arm) -> Any:
        how = Decoding(max_new_tokens=5, temperature=0.0)
        return answer(loaded, arm, ["Hello", "What?"], decoding=how, generator=generator(0, "a"))

    plain = found(PLAIN)
    assert plain.kl_mean == 0.0 and len(plain.texts) == 2
    for arm in (vector_arm(pair), Arm(name="told", instruction="Be brief.")):
        assert found(arm).kl_p95 >= found(arm).kl_mean > 0.01
        assert found(arm).acceptance < 0.999


# The table


def test_every_row_but_the_first_has_its_change_on_the_same_items() -> None:
    values = {"no steering": [1.0, 2.0, 3.0, 4.0], "vector": [2.0, 3.0, 4.0, 5.0]}
    arms = [PLAIN, Arm(name="vector", instruction="x")]
    measure = {"m": lambda arm: torch.tensor(values[arm.name], dtype=torch.float64)}
    first, second = compare(arms, measure, generator=generator(0, "t"))
    assert first.change is None and first.value.value == 2.5
    assert second.change is not None
    assert second.change[:3] == (1.0, 1.0, 1.0)  # paired: the spread between items is not in it
    assert second.value.low < 3.0 and second.value.high > 4.0


def test_items_of_one_group_are_resampled_together() -> None:
    arms, measure = [PLAIN], {"m": lambda _: torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)}
    (row,) = compare(arms, measure, groups={"m": ["a", "a", "b", "b"]}, generator=generator(0, "t"))
    assert (row.value.low, row.value.high, row.value.n) == (0.0, 1.0, 2)


def test_a_table_that_begins_with_something_else_than_doing_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="first arm must do nothing"):
        compare([Arm(name="told", instruction="x")], {}, generator=generator(0, "t"))


@pytest.mark.parametrize(
    ("shift", "words", "wins"),
    [(1.0, "The few-shot prompt does better than the vector", True), (-1.0, "The vector does better", False)],
)
def test_the_verdict_says_which_is_better(shift: float, words: str, wins: bool) -> None:
    vector = torch.linspace(0, 1, 12, dtype=torch.float64)
    prompts = {"prompt": vector + 5.0, "few-shot prompt": vector + shift}
    groups = [str(i) for i in range(12)]
    found = against_prompt(vector, prompts, groups, best="few-shot prompt", generator=generator(0, "v"))
    assert words in found.sentence and found.prompt_wins is wins
    few = against_prompt(vector, prompts, ["a", "b", "c"] * 4, best="few-shot prompt", generator=generator(0, "v"))
    assert few.sentence.startswith("3 independent items are too few to tell")
    with pytest.raises(SettingError, match=r"no prompt 'poem' .* there are prompt, few-shot prompt"):
        against_prompt(vector, prompts, groups, best="poem", generator=generator(0, "v"))


def test_a_draw_is_called_one() -> None:
    vector = torch.zeros(12, dtype=torch.float64)
    prompts = {"prompt": torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)}
    found = against_prompt(vector, prompts, [str(i) for i in range(12)], best="prompt", generator=generator(0, "v"))
    assert found.sentence.startswith("Neither is shown to be better")


def test_an_instruction_and_examples_are_read_before_answers_without_a_prompt(loaded: LoadedModel) -> None:
    plain = [replace(item, prompt="") for item in LETTERS]
    told, shown = Arm(name="prompt", instruction="Say A."), few_shot(LETTERS[:2])
    none = margins(loaded, Arm(name="none"), plain)
    assert not torch.equal(margins(loaded, told, plain), none)
    assert not torch.equal(margins(loaded, shown, plain), none)
    assert not torch.equal(margins(loaded, few_shot(plain[:2]), LETTERS), margins(loaded, Arm(name="none"), LETTERS))


def test_what_the_model_cannot_read_is_refused_with_the_arm(loaded: LoadedModel) -> None:
    with pytest.raises(TextError, match=r"under 'few-shot prompt', where the model reads at most 512"):
        margins(loaded, few_shot(LETTERS * 40), LETTERS)


# Null directions


def test_a_random_direction_has_the_length_and_the_site_of_the_other_and_no_likeness(pair: Pair) -> None:
    one = direction(pair, scale=7.0)
    other = random_like(one, generator=generator(0, "r"))
    assert other.norm == pytest.approx(one.norm, rel=1e-5)
    assert other.site == one.site and abs(one.cosine(other)) < 0.6
    assert "random" in other.card.name


@pytest.mark.parametrize("count", [10, 11])
def test_shuffling_swaps_exactly_half_so_that_nothing_shared_is_left(count: int) -> None:
    mixed = shuffled([contrast(i) for i in range(count)], generator=generator(0, "s"))
    assert len(mixed) == 10
    assert sum(item.positive == "(B)" for item in mixed) == 5
    assert len({item.prompt for item in mixed}) == 10


# Behaviours


def test_no_function_word_is_of_both_languages() -> None:
    assert not FUNCTION_WORDS["english"] & FUNCTION_WORDS["french"]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("Le chat est sur la table et il dort.", 0.99, 1.0),
        ("The cat is on the table and it sleeps.", 0.0, 0.01),
        ("The cat dort sur le tapis.", 0.3, 0.7),
        ("", 0.0, 0.0),
        ("12 + 3", 0.0, 0.0),
    ],
)
def test_french_is_told_by_its_function_words(text: str, low: float, high: float) -> None:
    assert low <= french_share(text) <= high


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b c d", 0.0), ("a b c", 0.0), ("a b c d a b c d", 0.2), ("no " * 11, 0.875)],
)
def test_repetition_is_the_share_of_runs_seen_before(text: str, expected: float) -> None:
    assert repetition(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("so it is 1,234.", 1234.0), ("first 3, then -2.5 of them", -2.5), ("#### 18", 18.0), ("none", None)],
)
def test_the_last_number_is_the_answer(text: str, expected: float | None) -> None:
    assert last_number(text) == expected
    assert is_number(18.0)(text) == (expected == 18.0)


# The whole way


def test_contrasts_are_divided_by_group_and_too_few_are_refused() -> None:
    contrasts = [contrast(i // 2) for i in range(40)]
    parts = divided(contrasts, seed=0)
    groups = {name: {item.group for item in rows} for name, rows in parts.items()}
    assert sum(map(len, parts.values())) == 40
    assert not groups["train"] & groups["choose"] | groups["choose"] & groups["test"] | groups["train"] & groups["test"]
    assert {name: len(found) for name, found in groups.items()} == {"train": 12, "choose": 4, "test": 4}
    with pytest.raises(TextError, match="9 contrasts of 9 groups are too few"):
        divided(contrasts[:18:2], seed=0)


def test_a_direction_is_read_calibrated_placed_and_judged_in_one_call(loaded: LoadedModel) -> None:
    contrasts = [contrast(i, positive="return the", negative="of and") for i in range(15)]
    config = RecipeConfig(
        name="returns",
        instruction="Say return.",
        budget=Budget(meter="kl_mean", limit=0.3),
        num_sites=2,
        num_prompts=2,
        decoding=Decoding(max_new_tokens=3),
    )
    found = steer(contrasts, loaded, config=config)
    assert found.direction.card.dose == found.calibration.dose > 0
    assert found.direction.card.data.num_pairs == 9
    assert [row.arm for row in found.rows if row.measure == MARGIN] == [
        "no steering", "vector", "prompt", "few-shot prompt", "random direction", "shuffled labels",
    ]  # fmt: skip
    assert [row.change is None for row in found.rows] == [True] + [False] * 5, "two tokens each: no probability"
    assert found.candidates[0].effect >= found.candidates[-1].effect
    assert found.answers["no steering"].kl_mean == 0.0 and found.answers["vector"].kl_mean > 0
    assert all(one.behaviour is not None and math.isfinite(one.behaviour) for one in found.calibration.curve)
    assert found.verdict.sentence


def test_answers_of_one_token_have_a_probability(loaded: LoadedModel) -> None:
    config = RecipeConfig(name="a", sites=(MID,), num_prompts=1, num_shots=1, decoding=Decoding(max_new_tokens=3))
    found = steer([contrast(i) for i in range(10)], loaded, config=config)
    probabilities = [row.value.value for row in found.rows if row.measure == PROBABILITY]
    assert len(probabilities) == 5 and all(0 < value < 1 for value in probabilities)
    assert found.verdict.sentence.startswith("2 independent items are too few to tell")


def test_a_pair_that_cannot_be_measured_is_refused_before_anything_is_read(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.steering.recipe.extract", lambda *_, **__: pytest.fail("read"))
    contrasts = [*(contrast(i) for i in range(12)), contrast(12, positive="so it", negative="so it is")]
    with pytest.raises(TextError, match="contrast '12': one answer is the beginning of the other"):
        steer(contrasts, loaded, config=RecipeConfig(name="a"))


def test_a_vector_can_spend_what_the_stronger_prompt_does(loaded: LoadedModel) -> None:
    contrasts = [contrast(i, positive="return the", negative="of and") for i in range(10)]
    decoding = Decoding(max_new_tokens=3)
    shared = RecipeConfig(name="r", budget=None, sites=(MID,), num_prompts=1, num_shots=1, decoding=decoding)
    asked = [item.prompt for item in divided(contrasts, seed=0)["choose"][:1]]
    spent_like = set()
    for instruction in ("return the value of the list", "of and of and"):
        found = steer(contrasts, loaded, config=replace(shared, instruction=instruction))
        costs = {
            arm.name: answer(loaded, arm, asked, decoding=decoding, generator=generator(0, "budget")).kl_mean
            for arm in found.arms
            if arm.name in found.by_prompt
        }
        stronger = max(found.by_prompt, key=lambda name: found.by_prompt[name])
        spent_like.add(stronger)
        assert costs["prompt"] != costs["few-shot prompt"]
        assert found.calibration.budget == Budget(meter="kl_mean", limit=costs[stronger])
        assert found.calibration.meters.kl_mean <= costs[stronger]
    assert spent_like == {"prompt", "few-shot prompt"}
