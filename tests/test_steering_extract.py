"""Directions against what each text gives alone, one pass a text and nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import hooks_of
from tokenizers import processors
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError, TextError
from pilotfish.models import FAMILIES, LoadedModel, identify, tiny_model, tiny_tokenizer
from pilotfish.steering import ExtractConfig, activation_addition, extract
from pilotfish.steering.beginning import read_beginning
from pilotfish.steering.pairs import tokenized
from pilotfish.taps import When, edited, tapped
from pilotfish.texts import Contrast

SITES = (Site(0, "resid_pre"), Site(0, "resid_post"), Site(1, "attn_out"), Site(2, "mlp_out"), Site(-1, "final"))
CONTRASTS = [
    Contrast(id="a", group="a", prompt="Is it?\n (A) Yes\n (B) No", positive=" (A)", negative=" (B)"),
    Contrast(id="b", group="b", prompt="Is it the other one? " * 4, positive=" (A) Yes it is", negative=" (B)"),
    Contrast(id="c", group="c", prompt="Well", positive=" (A", negative=" (A) no"),
    Contrast(id="d", group="d", prompt="", positive="return x", negative="import y and more"),
    Contrast(
        id="e", group="e", prompt="Is it? (A) or (B)", positive=" (B)", negative=" no, (A)", source="s", license="l"
    ),
]
TOKENS = ("last", "letter", "answer")
PLAIN = ExtractConfig(chat=False)


def loaded(family: str = "llama", *, bos: bool = False, padding_side: str = "right") -> LoadedModel:
    model, tokenizer = tiny_model(family, seed=0), tiny_tokenizer()
    tokenizer.padding_side = padding_side
    if bos:
        template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos_id())])
        tokenizer.backend_tokenizer.post_processor = template
    return LoadedModel(model, tokenizer, identify(model, tokenizer, family), "")


def bos_id() -> int:
    return int(tiny_tokenizer().get_vocab()["<|im_start|>"])


def alone(model: LoadedModel, ids: list[int], site: Site) -> Tensor:
    with torch.no_grad(), tapped(model.model, [site]) as taps:
        model.model(torch.tensor([ids]), use_cache=False)
    return taps[site][0].double()


def plain_differences(model: LoadedModel, site: Site, tokens: str, *, chat: bool) -> Tensor:
    return plain_differences_at([site], model, tokens, chat=chat)[site]


def plain_differences_at(sites: Sequence[Site], model: LoadedModel, tokens: str, *, chat: bool) -> dict[Site, Tensor]:
    """Per contrast, positive less negative: the text by itself, cut by looking for the answer's tokens by hand."""
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for contrast in CONTRASTS:
        sides = []
        for answer in (contrast.positive, contrast.negative):
            if chat:
                turns = [{"role": "user", "content": contrast.prompt}] * bool(contrast.prompt)
                answer = answer.strip()
                text = model.tokenizer.apply_chat_template(
                    [*turns, {"role": "assistant", "content": answer}], tokenize=False
                )
            else:
                text = contrast.prompt + answer
            begin = text.rindex(answer)
            encoded = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not chat)
            ids, places = encoded["input_ids"], encoded["offset_mapping"]
            inside = [i for i, (start, end) in enumerate(places) if start < begin + len(answer) and end > begin]
            if tokens == "last":
                inside = inside[-1:]
            elif tokens == "letter":
                letter = begin + next(i for i, character in enumerate(answer) if character.isalnum())
                inside = [i for i in inside if places[i][0] <= letter < places[i][1]]
            with torch.no_grad(), tapped(model.model, sites) as taps:
                model.model(torch.tensor([ids]), use_cache=False)
            sides.append({site: taps[site][0, inside].double().mean(0) for site in sites})
        for site in sites:
            rows[site].append(sides[0][site] - sides[1][site])
    return {site: torch.stack(values) for site, values in rows.items()}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_difference_is_that_of_each_text_read_alone(family: str, tokens: str) -> None:
    model = loaded(family)
    config = ExtractConfig(tokens=tokens, batch_tokens=160, chat=tokens != "answer")
    found = extract(CONTRASTS, model, name="yes", sites=SITES, config=config)
    assert tuple(found) == SITES
    for site, expected in plain_differences_at(SITES, model, tokens, chat=config.chat).items():
        torch.testing.assert_close(found[site].vector.double(), expected.mean(0), atol=5e-6, rtol=1e-5)
    assert hooks_of(model.model) == []


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_neither_bos_nor_the_tokenizers_padding_side_changes_what_is_read(bos: bool, padding_side: str) -> None:
    model = loaded(bos=bos, padding_side=padding_side)
    side = tokenized(CONTRASTS[0], model.tokenizer, tokens="last", chat=False).positive
    assert (side.token_ids[0] == bos_id()) == bos
    found = extract(CONTRASTS, model, name="yes", sites=SITES[1:2], config=ExtractConfig(chat=False))
    expected = plain_differences(model, SITES[1], "last", chat=False).mean(0)
    torch.testing.assert_close(found[SITES[1]].vector.double(), expected, atol=5e-6, rtol=1e-5)


def test_a_chat_template_writes_its_own_bos_and_no_second_one_is_added() -> None:
    side = tokenized(CONTRASTS[0], loaded(bos=True).tokenizer, tokens="last", chat=True).positive
    assert side.token_ids[0] == bos_id()
    assert side.token_ids[1] != bos_id()


@pytest.mark.parametrize("num_words", [1, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_prompts_begin_with_is_run_once_and_changes_nothing(family: str, num_words: int) -> None:
    """Once it is long enough to be worth a pass, and also where a prompt is nothing else."""
    model, said = loaded(family), "return the value of " * num_words
    contrasts = [replace(one, prompt=said + one.prompt) for one in CONTRASTS]
    read = read_beginning(
        model.model,
        [tokenized(one, model.tokenizer, tokens="last", chat=False).positive.token_ids for one in contrasts],
    )
    assert (read.num_tokens > 0) == (num_words == 12)
    found = extract(contrasts, model, name="yes", sites=SITES, config=ExtractConfig(chat=False, batch_tokens=200))
    for site in SITES:
        each = [extract([one], model, name="yes", sites=[site], config=PLAIN)[site].vector for one in contrasts]
        torch.testing.assert_close(found[site].vector, torch.stack(each).mean(0), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 100_000])
def test_the_size_of_a_batch_changes_nothing(batch_tokens: int) -> None:
    model = loaded()
    config = ExtractConfig(batch_tokens=batch_tokens)
    found, usual = (extract(CONTRASTS, model, name="yes", config=given) for given in (config, None))
    for site, direction in usual.items():
        torch.testing.assert_close(found[site].vector, direction.vector, atol=5e-6, rtol=1e-5)


def test_the_letter_of_an_answer_in_brackets_is_read_and_nothing_after_it_is_run() -> None:
    tokenizer = tiny_tokenizer()
    pair = tokenized(CONTRASTS[0], tokenizer, tokens="letter", chat=False)
    assert [tokenizer.decode(side.token_ids[side.start :]) for side in pair] == ["A", "B"]
    assert tokenizer.decode(pair.positive.token_ids) == "Is it?\n (A) Yes\n (B) No (A"
    assert pair.num_shared == pair.positive.start
    answer = tokenized(CONTRASTS[0], tokenizer, tokens="answer", chat=False)
    assert tokenizer.decode(answer.positive.token_ids[answer.positive.start :]) == " (A)"
    assert answer.num_shared == answer.positive.start, "a token that is read is not among those run once for both sides"


def test_two_pairs_by_hand_make_the_vector_and_the_card() -> None:
    model, site = loaded(), Site(1, "resid_post")
    texts = [["ab", "xy"], ["cdef", "u"]]
    contrasts = [
        Contrast(id=str(i), group="g", prompt="", positive=one, negative=two, source="mine", license="CC0-1.0")
        for i, (one, two) in enumerate(texts)
    ]
    found = extract(contrasts, model, name="love", config=ExtractConfig(chat=False))[site]
    states = [[alone(model, model.tokenizer(text)["input_ids"], site)[-1] for text in pair] for pair in texts]
    expected = (states[0][0] - states[0][1] + states[1][0] - states[1][1]) / 2
    torch.testing.assert_close(found.vector.double(), expected, atol=5e-6, rtol=1e-5)
    assert found.vector.dtype == torch.float32
    card = found.card
    assert (card.name, card.method, card.identity, card.dose) == ("love", "mean_difference", model.identity, None)
    assert (card.data.num_pairs, card.data.source, card.data.license) == (2, "mine", "CC0-1.0")
    assert card.data.tokens == "last"


def test_pca_center_is_the_main_axis_of_the_differences_mean_included_and_points_from_negative_to_positive() -> None:
    model, site = loaded(), Site(1, "resid_post")
    found = extract(CONTRASTS, model, name="yes", sites=[site], config=ExtractConfig(method="pca_center"))[site]
    differences = plain_differences(model, site, "last", chat=True)
    _, spread, axes = torch.linalg.svd(differences, full_matrices=False)
    axis = found.vector.double() / found.norm
    assert abs(float(axis @ axes[0])) == pytest.approx(1.0, abs=1e-6)
    assert found.norm == pytest.approx(float(spread[0]) / len(CONTRASTS) ** 0.5, rel=1e-5)
    assert (differences @ axis > 0).sum() > (differences @ axis < 0).sum()


def test_logistic_parts_the_sides_and_is_as_long_as_the_mean_difference_is_along_it() -> None:
    model, site = loaded(), Site(1, "resid_post")
    config = ExtractConfig(method="logistic", tokens="letter", penalty=1e-3)
    found = extract(CONTRASTS, model, name="yes", sites=[site], config=config)[site]
    differences = plain_differences(model, site, "letter", chat=True)
    along = differences @ (found.vector.double() / found.norm)
    assert found.norm == pytest.approx(abs(float(along.mean())), rel=1e-5)
    strong = extract(
        CONTRASTS,
        model,
        name="yes",
        sites=[site],
        config=ExtractConfig(method="logistic", tokens="letter", penalty=1e6),
    )[site]
    mean = differences.mean(0)
    cosine = float(strong.vector.double() @ mean / strong.norm / mean.norm())
    assert cosine == pytest.approx(1.0, abs=1e-4), "held back to nothing, the normal is the mean difference"


def test_activation_addition_has_the_difference_at_each_position_and_fills_up_with_spaces() -> None:
    model, site = loaded(bos=True), Site(1, "resid_pre")
    found = activation_addition("Love", "Hat", model, name="love", site=site)
    ids = [model.tokenizer(text)["input_ids"] for text in ("Love", "Hat ")]
    assert len(found) == len(ids[0]) == len(ids[1])
    expected = alone(model, ids[0], site) - alone(model, ids[1], site)
    for direction, row in zip(found, expected, strict=True):
        torch.testing.assert_close(direction.vector.double(), row, atol=5e-6, rtol=1e-5)
    assert found[0].norm == 0, "both begin with the same BOS"
    assert found[1].card.method == "actadd"


def test_an_activation_addition_is_added_position_by_position() -> None:
    model, site = loaded(), Site(1, "resid_pre")
    found = activation_addition("Love", "Hat", model, name="love", site=site)
    ids = torch.tensor([model.tokenizer("Once upon a time")["input_ids"]])
    edits = [
        direction.to_edit(2.0, when=When(phase="prompt", positions=(place, place + 1)), model=model.model)
        for place, direction in enumerate(found)
    ]
    with (
        torch.no_grad(),
        tapped(model.model, [site]) as before,
        edited(model.model, edits),
        tapped(model.model, [site]) as after,
    ):
        model.model(ids)
    moved = after[site][0] - before[site][0]
    expected = torch.zeros_like(moved)
    expected[: len(found)] = 2 * torch.stack([direction.vector for direction in found])
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("contrast", "tokens", "words"),
    [
        (
            Contrast(id="x", group="x", prompt="p", positive=" !!", negative=" A"),
            "letter",
            "no letter or digit to read",
        ),
        (Contrast(id="x", group="x", prompt="p" * 600, positive="a", negative="b"), "last", "601 tokens; .* up to 512"),
    ],
)
def test_an_answer_that_cannot_be_read_is_refused(contrast: Contrast, tokens: str, words: str) -> None:
    with pytest.raises(TextError, match=words):
        extract([contrast], loaded(), name="yes", config=ExtractConfig(tokens=tokens, chat=False))


def test_what_cannot_be_extracted_is_refused_with_what_to_do() -> None:
    model = loaded()
    with pytest.raises(TextError, match="no contrasts to read; give at least one"):
        extract([], model, name="yes")
    with pytest.raises(SettingError, match="it has 3 layers, 0 to 2"):
        extract(CONTRASTS, model, name="yes", sites=[Site(3, "resid_post")])
    with pytest.raises(SettingError, match="a direction needs a name"):
        extract(CONTRASTS, model, name="")
    with pytest.raises(SettingError, match="batch_tokens 0"):
        ExtractConfig(batch_tokens=0)
    with pytest.raises(TextError, match="two prompts, both with text"):
        activation_addition("Love", "", model, name="love", site=Site(1, "resid_pre"))
    model.model.train()
    with pytest.raises(SettingError, match="in training mode"):
        extract(CONTRASTS, model, name="yes")
