"""The fused bank against its heads one by one, its files, and everything it refuses."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import seeded_bank, seeded_head
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, BankMismatch, SettingError
from pilotfish.heads import (
    CalibrationCard,
    Card,
    DataCard,
    Form,
    Head,
    HeadBank,
    HeadCard,
    Measured,
    ThresholdCard,
    joined,
    linear_head,
)
from pilotfish.models import Identity
from pilotfish.runs import generator

SITES = (Site(0, "resid_post"), Site(1, "resid_post"), Site(2, "mlp_out"), Site(-1, "final"))
IDENTITY = Identity(name="tiny", weights="w" * 64, tokenizer="t" * 64, hidden_size=8, num_layers=3, vocab_size=300)
FORMS = st.sampled_from(
    [
        Form(width=1, window=1),
        Form(width=1, window=3),
        Form(window=4),
        Form(kind="mlp", width=3, window=2),
        Form(kind="attention", width=2, window=3),
        Form(kind="multimax", width=1, window=9),
    ]
)
HEADS = st.lists(
    st.tuples(st.permutations(SITES).flatmap(lambda order: st.integers(1, 4).map(lambda n: order[:n])), FORMS),
    min_size=1,
    max_size=5,
)
"""Sites and form of each head of a bank."""


def head(metric, sites, random, form=Form(width=1, window=1)):  # noqa: B008  # frozen
    return seeded_head(metric, tuple(sites), 8, form, random)


def heads_of(given_heads, random):
    return [head(f"metric {i}", sites, random, form) for i, (sites, form) in enumerate(given_heads)]


def taps_of(sites, random, batch=2, tokens=5):
    return {site: torch.randn(batch, tokens, 8, generator=random) for site in sites}


def scores_of(bank, taps, row=0):
    """Of tokens, then running."""
    return torch.stack(bank.score_text(bank.features(taps, row)))


def alone(one, taps, row):
    """The head's probabilities from its own features."""
    features = torch.cat([taps[site][row] for site in one.sites], dim=-1)
    return torch.stack([one.logits(features, which).sigmoid() for which in ("token", "response")])


@given(given_heads=HEADS, seed=st.integers(0, 1000), row=st.integers(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_fused_bank_says_what_each_head_says_alone(given_heads, seed, row):
    random = generator(seed, "bank")
    heads = heads_of(given_heads, random)
    bank, taps = HeadBank(heads, IDENTITY), taps_of(SITES, random)
    expected = torch.stack([alone(one, taps, row) for one in heads], dim=-1)
    torch.testing.assert_close(scores_of(bank, taps, row), expected, atol=2e-6, rtol=0)
    assert bank.num_channels == sum(one.form.num_channels for one in heads)
    assert bank.window == max(one.form.window for one in heads)


@given(given_heads=HEADS, seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_heads_on_other_sites_never_change_a_head(given_heads, seed):
    random = generator(seed, "bank")
    first, *others = heads_of(given_heads, random)
    small, large, taps = HeadBank([first], IDENTITY), HeadBank([first, *others], IDENTITY), taps_of(SITES, random)
    before, after = (scores_of(bank, taps)[..., 0] for bank in (small, large))
    torch.testing.assert_close(after, before, atol=2e-6, rtol=0)


@given(given_heads=HEADS, seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_subset_says_the_same_in_the_order_asked_for(given_heads, seed, data):
    random = generator(seed, "bank")
    bank = HeadBank(heads_of(given_heads, random), IDENTITY)
    chosen = data.draw(st.permutations(bank.metrics))[: data.draw(st.integers(1, len(bank.metrics)))]
    subset, taps = bank.subset(chosen), taps_of(SITES, random)
    expected = scores_of(bank, taps)[..., [bank.metrics.index(metric) for metric in chosen]]
    assert subset.metrics == tuple(chosen)
    torch.testing.assert_close(scores_of(subset, taps), expected, atol=2e-6, rtol=0)


def test_a_probability_by_hand():
    identity = replace(IDENTITY, hidden_size=2)
    one = linear_head("one", (SITES[0],), torch.tensor([1.0, -1.0]), 0.5)
    weight = torch.tensor([[2.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    two = Head("two", (SITES[1], SITES[0]), weight, torch.zeros(2), Form(window=2), torch.tensor([-3.0]))
    bank = HeadBank([one, two], identity)
    taps = {SITES[0]: torch.tensor([[[1.0, 2.0], [2.0, 0.0]]]), SITES[1]: torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])}
    channels = bank.channels(bank.features(taps))
    assert channels.tolist() == [[1 - 2 + 0.5, 2 * 3 + 2, 4.0], [2.5, 0.0, 1.0]]
    found = bank.score(channels, 2)
    assert found.tokens[0, 0] == found.running[0, 0] == pytest.approx(1 / (1 + math.exp(0.5)))
    assert found.running[:, 1].tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.5))])
    assert bank.score(channels, 1).running.tolist() == found.running[1:].tolist(), "the past is given, but not scored"


def test_features_of_bfloat16_states_are_float32():
    bank = HeadBank([head("one", SITES[:2], generator(0, "bank"))], IDENTITY)
    taps = {site: values.bfloat16() for site, values in taps_of(SITES, generator(0, "taps")).items()}
    assert bank.features(taps, 1).dtype == scores_of(bank, taps, 1).dtype == torch.float32


def full_card(metrics):
    measured = Measured(value=0.9, low=0.85, high=0.95, n=40)
    limit = ThresholdCard(threshold=0.7, budget=0.01, num_benign=500, num_flagged=1, fpr_upper=0.009, benign_source="b")
    return Card(
        identity=IDENTITY,
        data=(DataCard(source="s", license="MIT", num_rows=3, num_tokens=90, role="train"),),
        metrics={f"{metric}/auroc_token": measured for metric in metrics},
        baselines={f"{metrics[0]}/auroc_token/words": measured},
        thresholds={metrics[0]: limit},
        calibration={f"{metrics[0]}/token": CalibrationCard(scale=0.5, shift=-1.0, num_items=90, share_positive=0.1)},
        better_than_words={metrics[0]: True},
        not_for="proofs",
        run={"command": "fit", "seed": 0},
    )


ATTENTION = Form(kind="attention", width=1, window=3)
MLP = Form(kind="mlp", width=2, window=2)


def bank_to_save():
    random = generator(0, "bank")
    heads = [head("wide", SITES, random), head("narrow", SITES[3:], random, ATTENTION)]
    heads.append(head("deep", SITES[1:], random, MLP))
    return HeadBank(heads, IDENTITY, card=full_card(["wide", "narrow", "deep"]))


@pytest.fixture
def saved(tmp_path):
    return bank_to_save().save(tmp_path / "bank")


def test_a_loaded_bank_is_bit_identical_and_so_is_its_copy(saved, tmp_path):
    bank, loaded = bank_to_save(), HeadBank.load(saved)
    taps = taps_of(SITES, generator(1, "taps"))
    assert (loaded.metrics, loaded.sites, loaded.identity) == (bank.metrics, bank.sites, bank.identity)
    assert loaded.thresholds == bank.thresholds == {"wide": 0.7}
    for one, other in zip(loaded.heads, bank.heads, strict=True):
        assert (one.form, one.sites) == (other.form, other.sites)
        for name in ("weight", "bias", "outputs"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(scores_of(loaded, taps), scores_of(bank, taps))
    loaded.save(tmp_path / "copy")
    for name in ("heads.safetensors", "card.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (saved / name).read_bytes()


def test_a_card_comes_back_as_it_was_but_for_what_saving_adds(saved):
    loaded = HeadBank.load(saved).card
    digest = hashlib.sha256((saved / "heads.safetensors").read_bytes()).hexdigest()
    assert loaded.weights_sha256 == digest
    assert loaded.heads == {
        "wide": HeadCard(sites=tuple(map(str, SITES)), kind="linear", width=1, window=1),
        "narrow": HeadCard(sites=("final",), kind="attention", width=1, window=3),
        "deep": HeadCard(sites=tuple(map(str, SITES[1:])), kind="mlp", width=2, window=2),
    }
    assert replace(loaded, heads={}, weights_sha256="") == full_card(["wide", "narrow", "deep"])


def test_a_subset_keeps_what_the_card_says_of_its_metrics(saved):
    card = HeadBank.load(saved).subset(["narrow"]).card
    assert set(card.metrics) == {"narrow/auroc_token"}
    assert set(card.heads) == {"narrow"}
    assert not card.thresholds
    assert not card.baselines
    assert not card.better_than_words


def test_a_subset_with_an_unknown_metric_is_refused(bank):
    with pytest.raises(SettingError, match=r"'other' has no head; there are wide, narrow"):
        bank.subset(["wide", "other"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.zeros(8)
    weight[3] = value
    with pytest.raises(ArtefactError, match="'one' has weights that are not finite"):
        linear_head("one", SITES[:1], weight, 0.0)
    with pytest.raises(ArtefactError, match="'one' has weights that are not finite"):
        linear_head("one", SITES[:1], torch.zeros(8), value)


@pytest.mark.parametrize("count", [0, 7, 9])
def test_weights_that_do_not_fill_their_sites_are_refused(count):
    with pytest.raises(ArtefactError, match="2 sites"):
        linear_head("one", SITES[:2], torch.zeros(count), 0.0)


@pytest.mark.parametrize("sites", [(), (SITES[0], SITES[0])])
def test_a_head_without_sites_or_with_one_twice_is_refused(sites):
    with pytest.raises(ArtefactError, match="name one or more, once"):
        linear_head("one", sites, torch.zeros(16), 0.0)


def test_a_head_for_another_hidden_size_or_a_deeper_model_is_refused():
    with pytest.raises(BankMismatch, match="reads 4 hidden units a site, tiny has 8"):
        HeadBank([linear_head("one", SITES[:2], torch.zeros(8), 0.0)], IDENTITY)
    with pytest.raises(BankMismatch, match="reads layer 3, tiny has 3 layers"):
        HeadBank([linear_head("one", (Site(3, "resid_post"),), torch.zeros(8), 0.0)], IDENTITY)


def test_a_bank_needs_heads_and_one_a_metric():
    one = head("one", SITES, generator(0, "bank"))
    for heads in ([], [one, one]):
        with pytest.raises(SettingError, match="at least one head and one a metric"):
            HeadBank(heads, IDENTITY)


def test_another_name_of_the_same_model_is_accepted():
    bank = HeadBank([head("one", SITES, generator(0, "bank"))], IDENTITY)
    bank.check(replace(IDENTITY, name="a local copy"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights", "x" * 64), ("tokenizer", "x" * 64), ("hidden_size", 16), ("num_layers", 4), ("vocab_size", 301)],
)
def test_another_model_or_tokenizer_is_refused_by_what_differs(field, value):
    bank = HeadBank([head("one", SITES, generator(0, "bank"))], IDENTITY)
    with pytest.raises(BankMismatch, match=rf"not for other: other {field.replace('_', ' ')}\."):
        bank.check(replace(IDENTITY, name="other", **{field: value}))


def test_a_bank_of_the_draft_is_refused_on_the_target(pair, bank):
    bank.check(pair.draft_identity)
    with pytest.raises(BankMismatch, match="weights"):
        bank.check(pair.target_identity)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_cut_weights_are_refused(saved, keep):
    path = saved / "heads.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ArtefactError, match="another SHA-256"):
        HeadBank.load(saved)


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(deadline=None)
def test_any_changed_byte_of_the_weights_is_refused(tmp_path_factory, position, flip):
    folder = tmp_path_factory.mktemp("changed")
    HeadBank([head("one", SITES, generator(0, "bank"))], IDENTITY).save(folder)
    data = bytearray((folder / "heads.safetensors").read_bytes())
    data[int(position * len(data))] ^= flip
    (folder / "heads.safetensors").write_bytes(data)
    with pytest.raises(ArtefactError, match="another SHA-256"):
        HeadBank.load(folder)


def rehash(folder):
    """Makes the card vouch for whatever stands beside it."""
    digest = hashlib.sha256((folder / "heads.safetensors").read_bytes()).hexdigest()
    edit_card(folder, lambda card: card | {"weights_sha256": digest})


def edit_card(folder, change):
    path = folder / "card.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_cut_file_is_refused_even_when_its_card_vouches_for_it(saved):
    path = saved / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    rehash(saved)
    with pytest.raises(ArtefactError, match="not a safetensors file"):
        HeadBank.load(saved)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("wide.weight", torch.full((1, 32), math.nan), "not finite"),
        ("wide.weight", torch.zeros(1, 31), "4 sites"),
        ("wide.weight", torch.zeros(1, 64), "16 hidden units"),
        ("wide.bias", torch.zeros(2), r"weights of shape \(1, 32\) and biases of shape \(2,\); a row of weights"),
        ("wide.bias", torch.tensor(0.0), r"biases of shape \(\); a row of weights"),
        ("wide.weight", torch.zeros(2, 32), r"weights of shape \(2, 32\) and biases of shape \(1,\)"),
        ("wide.weight", torch.zeros(32), r"weights of shape \(32,\) and biases of shape \(1,\)"),
        ("deep.outputs", torch.zeros(5), r"\(5,\) for 3 sites and 2 channels"),
        ("deep.outputs", torch.full((7,), math.nan), "not finite"),
        ("wide.outputs", torch.zeros(0), r"\(1, 32\), \(1,\), \(0,\) for 4 sites and 1 channels"),
        ("narrow.outputs", None, "lacks the weights of head 'narrow'"),
        ("wide.bias", torch.tensor([math.inf]), "not finite"),
        ("wide.weight", None, "lacks the weights of head 'wide'"),
        ("narrow.bias", None, "lacks the weights of head 'narrow'"),
    ],
)
def test_tensors_that_do_not_fit_the_card_are_refused(saved, name, tensor, message):
    tensors = load_file(saved / "heads.safetensors")
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, saved / "heads.safetensors")
    rehash(saved)
    with pytest.raises(ArtefactError, match=message):
        HeadBank.load(saved)


@pytest.mark.parametrize("name", ["heads.safetensors", "card.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ArtefactError, match=rf"{name} cannot be read: No such file"):
        HeadBank.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card | {"mood": "good"}, "unknown or missing keys for Card: mood"),
        (lambda card: {k: v for k, v in card.items() if k != "heads"}, "unknown or missing keys for Card: heads"),
        (lambda card: card | {"identity": {"name": "x"}}, "keys for Identity: hidden_size, num_layers, tokenizer"),
        (lambda card: card | {"thresholds": {"wide": {"threshold": 0.5}}}, "keys for ThresholdCard: benign_source"),
        (lambda card: card | {"heads": ["final"]}, "not the card of a bank"),
        (lambda card: card | {"heads": {"wide": {"sites": ["final"]}}}, "keys for HeadCard: kind, width, window"),
        (lambda card: [card], "a list where Card belongs"),
        (lambda card: None, "a NoneType where Card belongs"),
    ],
)
def test_a_card_with_other_keys_is_refused(saved, change, message):
    edit_card(saved, change)
    with pytest.raises(ArtefactError, match=message):
        HeadBank.load(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe"])
def test_a_card_that_is_no_json_is_refused(saved, text):
    (saved / "card.json").write_bytes(text)
    with pytest.raises(ArtefactError, match="not JSON"):
        HeadBank.load(saved)


def edit_head(folder, change):
    edit_card(folder, lambda card: card | {"heads": card["heads"] | {"narrow": card["heads"]["narrow"] | change}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "head 'narrow': window 0 is too small"),
        ({"width": 0}, "head 'narrow': a head of form attention cannot have width 0"),
        ({"width": 2}, r"shape \(3, 8\), \(3,\), \(0,\) for 1 sites and 5 channels"),
        ({"kind": "tree"}, "card"),
        ({"window": "3"}, "card"),
    ],
    ids=str,
)
def test_a_card_with_a_form_that_is_none_or_not_the_weights_own_is_refused(saved, change, message):
    edit_head(saved, change)
    with pytest.raises(ArtefactError, match=message):
        HeadBank.load(saved)


@pytest.mark.parametrize("site", ["final.0", "7", "0.mlp", "-1.final"])
def test_a_card_with_a_site_that_no_model_has_is_refused(saved, site):
    edit_head(saved, {"sites": [site]})
    with pytest.raises(ArtefactError, match=r"card.json, head 'narrow': site .*; copy the bank again"):
        HeadBank.load(saved)


def test_a_bank_without_heads_in_its_card_is_refused(saved):
    edit_card(saved, lambda card: card | {"heads": {}})
    with pytest.raises(SettingError, match="at least one head"):
        HeadBank.load(saved)


def test_joined_banks_keep_their_heads_thresholds_and_what_their_cards_say(saved):
    whole = HeadBank.load(saved)
    first, second = whole.subset(["narrow", "wide"]), whole.subset(["deep"])
    both, taps = joined([first, second]), taps_of(SITES, generator(1, "taps"))
    assert both.metrics == ("narrow", "wide", "deep")
    assert both.thresholds == {"wide": 0.7}
    assert both.card.heads == whole.card.heads
    assert both.card.metrics == whole.card.metrics
    expected = torch.cat([scores_of(first, taps), scores_of(second, taps)], dim=-1)
    torch.testing.assert_close(scores_of(both, taps), expected, atol=2e-6, rtol=0)
    assert joined([first]) is first


def test_banks_that_do_not_go_together_are_refused(pair, bank):
    with pytest.raises(SettingError, match="no banks to join"):
        joined([])
    with pytest.raises(SettingError, match="one a metric"):
        joined([bank, bank])
    with pytest.raises(BankMismatch, match="other weights"):
        joined([bank, seeded_bank(pair, reader="target")])
