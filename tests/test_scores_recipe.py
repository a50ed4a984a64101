"""The whole recipe on a tiny model: from conversations to a bank with its card."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from pilotfish.core import Conversation, Message, Site, Span
from pilotfish.errors import LeakError, PairMismatch, SettingError, TextError
from pilotfish.heads import FitConfig, Form, HeadBank
from pilotfish.models import LoadedModel, Pair, tiny_tokenizer
from pilotfish.runs import generator
from pilotfish.scores import RecipeConfig, RivalConfig, build_bank, score_tokens
from pilotfish.scores.prepared import prepare
from pilotfish.texts import tokenize

METRIC = "shouting"
CONFIG = RecipeConfig(
    num_sites=2,
    budget=0.2,
    num_resamples=50,
    rivals=RivalConfig(names=()),
    fit=FitConfig(form=Form(window=1), epochs=20, batch_tokens=64, learning_rate=0.01, weight_decays=(0.1, 1.0)),
)


@pytest.fixture(scope="module")
def reader(pair: Pair) -> LoadedModel:
    assert pair.draft is not None and pair.draft_identity is not None
    return LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "tiny")


def conversation(name: str, index: int, *, loud: bool, labelled: bool = True) -> Conversation:
    """Two answers to each prompt: one with a word in capitals, which the span marks, and one without."""
    quiet, word = f"the {index} is ", "ZQXJ" if loud else "zqxj"
    messages = (Message("user", f"say {name} {index}"), Message("assistant", f"{quiet}{word} and return {name}{index}"))
    spans = (Span(1, len(quiet), len(quiet) + 4, METRIC, 1.0),) if loud and labelled else ()
    return Conversation(
        f"{name}-{index}-{'loud' if loud else 'quiet'}",
        f"{name}-{index}",
        messages,
        spans=spans,
        labels={} if loud or not labelled else {METRIC: 0.0},
        source="ours",
        license="CC0",
    )


def rows(name: str, count: int) -> list[Conversation]:
    return [conversation(name, index, loud=loud) for index in range(count) for loud in (True, False)]


SPLITS = {"train": rows("train", 12), "validation": rows("validation", 8), "test": rows("test", 8)}
BENIGN = [conversation("benign", index, loud=False, labelled=False) for index in range(20)]


@pytest.fixture(scope="module")
def built(reader, tmp_path_factory) -> HeadBank:
    work = tmp_path_factory.mktemp("work")
    return build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=work, seed=0).bank


def test_the_recipe_learns_what_the_spans_mark_and_measures_it_on_the_test_rows(built):
    figures = {name.removeprefix(f"{METRIC}/"): figure for name, figure in built.card.metrics.items()}
    assert figures["auroc_token"].value > 0.95
    assert figures["auroc_token"].low <= figures["auroc_token"].value <= figures["auroc_token"].high
    assert figures["auroc_token"].n == 8
    assert figures["pairwise_accuracy"].value == 1.0
    assert figures["recall_at_threshold"].value >= 0.75, "the benign texts have a word that training never saw"


def test_the_card_says_where_everything_came_from(built, reader):
    card = built.card
    assert card.identity == reader.identity
    assert {(data.role, data.source, data.license, data.num_rows) for data in card.data} == {
        ("train", "ours", "CC0", 24),
        ("validation", "ours", "CC0", 16),
        ("test", "ours", "CC0", 16),
        ("benign", "ours", "CC0", 20),
    }
    limit = card.thresholds[METRIC]
    assert limit.fpr_upper <= limit.budget == CONFIG.budget
    assert (limit.num_benign, limit.benign_source) == (20, "ours")
    assert card.better_than_words == {}, "without baselines the card claims nothing"
    assert card.run["config"]["metric"] == METRIC and card.run["seed"] == 0


def test_the_threshold_flags_no_more_benign_responses_online_than_the_card_says(built, reader):
    flagged = 0
    for row in BENIGN:
        text = prepare([row], reader, METRIC, 512, keeps_unlabelled=True)[0]
        found = score_tokens(reader.model, built, text.tokens.token_ids, boundary=text.boundary)
        running = found.running[:, 0]
        flagged += float(running[text.is_response].max()) >= built.thresholds[METRIC] + 1e-6
    assert flagged <= built.card.thresholds[METRIC].num_flagged


def test_scores_of_held_out_text_are_probabilities_that_point_at_the_span(built, reader):
    text = tokenize(SPLITS["test"][0], reader.tokenizer)
    scores = score_tokens(reader.model, built, text.token_ids).tokens[:, 0]
    labels = torch.tensor(text.labels[METRIC])
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert scores[labels == 1].mean() > 0.5 > scores[labels == 0].mean()


def test_a_second_run_goes_on_from_the_recordings_and_gives_the_same_bank(reader, tmp_path):
    def build() -> HeadBank:
        work = tmp_path / "work"
        return build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=work, seed=0).bank

    first = build()
    shards = sorted((tmp_path / "work").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in shards]
    second = build()
    assert times == [path.stat().st_mtime_ns for path in shards]
    assert torch.equal(first.heads[0].weight, second.heads[0].weight)
    assert torch.equal(first.heads[0].bias, second.heads[0].bias)
    assert dataclasses.replace(first.card, run={}) == dataclasses.replace(second.card, run={})


def test_the_bank_of_a_recipe_survives_saving_and_scores_the_same(built, reader, tmp_path):
    loaded = HeadBank.load(built.save(tmp_path / "bank"))
    ids = tokenize(SPLITS["test"][1], reader.tokenizer).token_ids
    for before, after in zip(
        score_tokens(reader.model, built, ids), score_tokens(reader.model, loaded, ids), strict=True
    ):
        assert torch.equal(before, after)
    assert loaded.thresholds == built.thresholds
    assert json.loads((tmp_path / "bank" / "card.json").read_text())["data"][0]["license"] == "CC0"


def test_what_engines_generate_counts_as_response_with_its_end_of_turn(reader):
    text = prepare([SPLITS["train"][0]], reader, METRIC, 512)[0]
    tokens = [text.tokens.token_ids[i] for i in text.is_response.nonzero()[:, 0].tolist()]
    assert reader.tokenizer.decode(tokens) == SPLITS["train"][0].messages[1].content + "<|im_end|>"


def test_a_positive_response_whose_spans_were_cut_off_has_no_label(reader):
    long = conversation("long", 0, loud=True)
    first = next(i for i, label in enumerate(tokenize(long, reader.tokenizer).labels[METRIC]) if label == 1)
    whole, cut = (prepare([long], reader, METRIC, limit)[0] for limit in (512, first))
    assert whole.label == 1.0 and math.isnan(cut.label)
    assert not bool((cut.labels > 0).any())


def test_too_few_benign_responses_are_refused_before_anything_is_recorded(reader, tmp_path):
    config = dataclasses.replace(CONFIG, budget=0.01)
    with pytest.raises(SettingError, match=r"20 benign responses of 20 documents .* give 299 documents or more"):
        build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path / "work", seed=0)
    copies = [dataclasses.replace(row, group="one") for row in BENIGN]
    with pytest.raises(SettingError, match=r"20 benign responses of 1 documents .* give 14 documents or more"):
        build_bank(SPLITS, copies, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path / "work", seed=0)
    assert not (tmp_path / "work").exists()


def test_an_empty_split_is_refused_by_name(reader, tmp_path):
    with pytest.raises(TextError, match=r"\(tokens: test; responses: test\)"):
        build_bank(SPLITS | {"test": []}, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0)


def test_the_classifier_reads_as_far_as_the_head_and_is_left_out_where_its_draw_has_one_label(
    reader, tmp_path, monkeypatch, caplog
):
    read = []

    def scores(reader, train, *, test, config, **others):
        read.append(config.max_tokens)
        return torch.full((len(test),), 0.5)

    monkeypatch.setattr("pilotfish.scores.rivals.fine_tuned_scores", scores)
    for num_train, made in ((100, True), (1, False)):
        rivals = RivalConfig(names=("classifier",), num_train=num_train)
        config = dataclasses.replace(CONFIG, rivals=rivals, max_tokens=300)
        found = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
        assert ("classifier" in found.scored) == made
    assert read == [300] and "the baseline classifier is left out" in caplog.text


def test_the_classifier_finds_what_the_head_had_read(reader, tmp_path):
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("classifier",)))
    build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
    recorded = [row for index in tmp_path.rglob("index.json") for row in json.loads(index.read_text())["rows"]]
    assert len(recorded) == len(set(recorded)) > 0


def test_a_test_of_one_document_still_makes_a_bank(reader, tmp_path):
    one = [dataclasses.replace(row, group="one") for row in SPLITS["test"]]
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("judge",), question="Is it loud?"))
    found = build_bank(
        SPLITS | {"test": one}, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0
    )
    assert found.bank.thresholds and not found.bank.card.metrics


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_split_without_positive_tokens_is_refused_by_name(name, reader, tmp_path):
    splits = SPLITS | {name: [row for row in SPLITS[name] if not row.spans]}
    with pytest.raises(
        TextError, match=rf"lack positive or negative labels for 'shouting' \(tokens: {name}; responses: {name}\)"
    ):
        build_bank(splits, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0)


def test_benign_rows_that_the_head_was_made_with_are_refused(reader, tmp_path):
    quiet = [row for row in SPLITS["train"] if not row.spans]
    with pytest.raises(LeakError, match="'benign'"):
        build_bank(SPLITS, [*BENIGN, *quiet], reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0)


def test_splits_of_which_one_is_missing_are_refused(reader, tmp_path):
    with pytest.raises(SettingError, match="splits are train; give train, validation, test"):
        build_bank({"train": []}, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0)


def test_other_splits_of_the_same_texts_and_fewer_sites_are_read_from_the_same_recording(reader, tmp_path):
    def folders(splits=SPLITS, config=CONFIG) -> set[str]:
        build_bank(splits, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
        return {path.name for path in tmp_path.iterdir()}

    first = folders()
    swapped = {"train": SPLITS["train"], "validation": SPLITS["test"], "test": SPLITS["validation"]}
    assert folders(swapped) == first
    assert folders(config=dataclasses.replace(CONFIG, num_sites=1)) == first


def as_responses(splits, change=lambda index, label: label):
    """The same texts with a label of the whole response each, and no spans."""
    return {
        name: [
            dataclasses.replace(row, spans=(), labels={METRIC: change(index, float(bool(row.spans)))})
            for index, row in enumerate(part)
        ]
        for name, part in splits.items()
    }


def test_labels_of_whole_responses_alone_are_enough(reader, tmp_path):
    bank, _ = build_bank(
        as_responses(SPLITS), BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0
    )
    assert bank.heads[0].form.width == 1
    assert bank.card.metrics[f"{METRIC}/auroc_response"].value > 0.95
    assert f"{METRIC}/auroc_token" not in bank.card.metrics


def test_shuffled_labels_give_chance_within_three_deviations(reader, tmp_path):
    large = {"train": rows("train", 20), "validation": rows("validation", 20), "test": rows("test", 40)}
    drawn = torch.randint(2, (80,), generator=generator(0, "labels")).double().tolist()
    shuffled = as_responses(large, lambda index, label: drawn[index])
    bank, _ = build_bank(shuffled, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0)
    num_positive = sum(row.labels[METRIC] for row in shuffled["test"])
    deviation = math.sqrt(81 / (12 * num_positive * (80 - num_positive)))
    assert abs(bank.card.metrics[f"{METRIC}/auroc_response"].value - 0.5) < 3 * deviation


def test_every_rival_scores_the_test_texts_and_stands_on_the_card(reader, tmp_path):
    pytest.importorskip("sklearn")
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(question="Is a word in capitals?", num_judged=10))
    bank, scored = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
    assert {name: len(texts) for name, texts in scored.items()} == {
        "head": 16,
        "words": 16,
        "length": 16,
        "judge": 10,
        "classifier": 10,
    }
    assert 0 < bank.card.metrics[f"{METRIC}/tokens_over_judge"].value < 1, "the judge reads a question besides"
    assert bank.card.metrics[f"{METRIC}/cost_over_judge"].value < 0.1
    for name in ("words", "length", "judge", "classifier"):
        assert f"{METRIC}/auroc_response/{name}" in bank.card.baselines
        assert f"{METRIC}/auroc_response_minus_{name}" in bank.card.metrics


@pytest.fixture(scope="module")
def target(pair: Pair, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("target")
    pair.target.save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_same_head_on_the_target_is_a_rival_on_the_same_texts(reader, target, tmp_path):
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("target",), target=target))
    bank, scored = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
    alone = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path / "a", seed=0).bank
    assert torch.equal(bank.heads[0].weight, alone.heads[0].weight), "the rival changes nothing about the head"
    assert [text.id for text in scored["target"]] == [text.id for text in scored["head"]]
    for figure in ("auroc_token", "auroc_response", "pairwise_accuracy", "character_f1"):
        ours, theirs = bank.card.metrics[f"{METRIC}/{figure}"], bank.card.baselines[f"{METRIC}/{figure}/target"]
        difference = bank.card.metrics[f"{METRIC}/{figure}_minus_target"]
        assert difference.value == pytest.approx(ours.value - theirs.value)
    assert bank.card.baselines[f"{METRIC}/auroc_token/target"].value > 0.9, "the target reads capitals too"
    assert "bigger model" not in bank.card.not_for
    assert "Not compared with the same head on a bigger model." in alone.card.not_for


def test_a_head_on_its_own_reader_as_target_is_the_same_head(reader, pair, tmp_path):
    pair.draft.save_pretrained(tmp_path / "draft")
    pair.tokenizer.save_pretrained(tmp_path / "draft")
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("target",), target=str(tmp_path / "draft")))
    bank, scored = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
    for ours, theirs in zip(scored["head"], scored["target"], strict=True):
        assert torch.equal(ours.token_scores, theirs.token_scores) and ours.score == theirs.score
    assert bank.card.metrics[f"{METRIC}/auroc_token_minus_target"].high == 0.0


def test_a_target_of_another_vocabulary_is_refused(reader, pair, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["brandnew"])
    pair.target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("target",), target=str(tmp_path / "target")))
    with pytest.raises(PairMismatch, match="brandnew"):
        build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path / "w", seed=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"names": ("words", "wrods")}, "rival 'wrods' is unknown; use words, length, judge, classifier, target"),
        ({"names": ("words", "target")}, "rivals are words, target and the target is None; .* needs the name of a"),
        ({"names": (), "target": "big"}, "rivals are none and the target is big"),
    ],
)
def test_rivals_that_cannot_be_made_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        RivalConfig(**settings)


def test_a_large_validation_says_how_good_both_maps_to_probabilities_are_on_other_documents(reader, tmp_path):
    large = SPLITS | {"validation": rows("validation", 30)}
    bank, _ = build_bank(large, BENIGN, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path, seed=0)
    token, response = (bank.card.calibration[f"{METRIC}/{which}"] for which in ("token", "response"))
    assert set(token.held_out) == {"platt_log_loss", "platt_error", "isotonic_log_loss", "isotonic_error"}
    assert 0 < token.held_out["platt_log_loss"] < math.log(2) and 0 <= token.held_out["platt_error"] < 0.2
    assert response.held_out == {}, "sixty responses are too few to choose by"
    assert HeadBank.load(bank.save(tmp_path / "bank")).card.calibration == bank.card.calibration


def test_the_card_says_how_the_marks_of_the_character_figure_were_made(reader, tmp_path):
    pytest.importorskip("sklearn")
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("words", "length")))
    card = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0).bank.card
    figure, words = card.metrics[f"{METRIC}/character_f1"], card.baselines[f"{METRIC}/character_f1/words"]
    assert figure.value > 0.9 and figure.n == 8
    difference = card.metrics[f"{METRIC}/character_f1_minus_words"]
    assert difference.value == pytest.approx(figure.value - words.value)
    assert set(card.run["config"]["markings"]) == {"head", "words"}
    assert set(card.run["config"]["markings"]["head"]) == {"threshold", "whole_words", "gap"}
    json.dumps(card.run, allow_nan=False)


def test_the_head_reads_evenly_spaced_sites_with_the_final_norm_last(built):
    assert built.sites == (Site(1, "resid_post"), Site(-1, "final"))


def test_words_that_tell_everything_are_not_beaten_and_the_card_says_so(reader, tmp_path):
    pytest.importorskip("sklearn")
    config = dataclasses.replace(CONFIG, rivals=RivalConfig(names=("words", "length")))
    bank, _ = build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)
    assert {name.removeprefix(f"{METRIC}/") for name in bank.card.baselines} >= {
        "auroc_token/words",
        "auroc_response/words",
        "auroc_response/length",
        "pairwise_accuracy/words",
    }
    assert bank.card.baselines[f"{METRIC}/auroc_response/words"].value == 1.0, "capitals give the label away"
    assert bank.card.baselines[f"{METRIC}/auroc_response/length"].value == 0.5, "both answers are equally long"
    difference = bank.card.metrics[f"{METRIC}/auroc_token_minus_words"]
    assert bank.card.better_than_words == {METRIC: difference.low > 0}
    assert bank.card.better_than_words == {METRIC: False}
    for what in ("single tokens", "whole responses"):
        assert f"Not shown to be better than TF-IDF at telling {what} apart." in bank.card.not_for


def test_of_several_forms_the_one_that_validation_prefers_is_kept(reader, tmp_path):
    forms = (Form(width=1, window=1), Form(width=1))
    configs = [dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, form=form)) for form in forms]
    configs.append(dataclasses.replace(configs[0], forms=forms))
    alone, other, both = (
        build_bank(SPLITS, BENIGN, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0).bank
        for config in configs
    )
    qualities = [sum(part["quality"] for part in bank.card.run["config"]["chosen"].values()) for bank in (alone, other)]
    best = alone if qualities[0] >= qualities[1] else other
    assert both.heads[0].form == best.heads[0].form and torch.equal(both.heads[0].weight, best.heads[0].weight)
