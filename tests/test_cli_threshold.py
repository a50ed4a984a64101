"""Thresholds from benign texts of the user's own: the bound is exact, and no figure of the old threshold stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import seeded_bank
from torch import Tensor

from pilotfish.cli import main
from pilotfish.core import Conversation, Message
from pilotfish.errors import SettingError
from pilotfish.heads import Card, DataCard, HeadBank, Measured, ThresholdCard
from pilotfish.models import LoadedModel, tiny_pair
from pilotfish.runs import generator
from pilotfish.scores import (
    Reading,
    ScoredText,
    clopper_pearson_upper,
    evaluate,
    score_tokens,
    with_limits,
    write_scored,
)
from pilotfish.scores.evaluation import AT_THRESHOLD
from pilotfish.scores.prepared import prepare
from pilotfish.texts import write_jsonl

PAIR = tiny_pair(seed=0)
OLD = ThresholdCard(threshold=0.999, budget=0.2, num_benign=9, num_flagged=0, fpr_upper=0.3, benign_source="made up")
NO_TOKENS = torch.zeros(0)
FIGURE = Measured(value=0.5, low=0.4, high=0.6, n=9)


def rows(count: int, *, answered: bool = True) -> list[Conversation]:
    answer = [Message("assistant", "fine")] if answered else []
    texts = [(Message("user", f"go {i} and {i * 7}"), *answer) for i in range(count)]
    return [Conversation(f"r{i}", f"g{i}", messages, source="ours") for i, messages in enumerate(texts)]


def scored(
    index: int, score: float, token_labels: Tensor = NO_TOKENS, token_scores: Tensor | None = None
) -> ScoredText:
    return ScoredText(
        id=f"t{index}",
        group=f"g{index}",
        prompt="",
        label=float(index % 2),
        score=score,
        token_labels=token_labels,
        token_scores=token_scores,
    )


@pytest.fixture(scope="module")
def reader() -> LoadedModel:
    assert PAIR.draft is not None and PAIR.draft_identity is not None
    return LoadedModel(PAIR.draft, PAIR.tokenizer, PAIR.draft_identity, "a test")


@pytest.fixture(scope="module")
def bank() -> HeadBank:
    made = seeded_bank(PAIR, reader="draft")
    names = ("auroc_response", "recall_at_threshold", "lag_median", "lexical_gap", "elsewhere/far/fpr_at_threshold")
    figures = {f"wide/{name}": FIGURE for name in names}
    data = tuple(
        DataCard(source="theirs", license="", num_rows=5, num_tokens=50, role=role, metric="wide")
        for role in ("train", "benign")
    )
    card = Card(identity=made.identity, thresholds={"wide": OLD}, metrics=figures, data=data)
    return HeadBank(made.heads, made.identity, card=card)


def test_each_head_flags_as_many_as_its_exact_bound_allows(bank, reader, tmp_path):
    benign = rows(60)
    made = with_limits(bank, benign, Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=64)
    assert set(made.card.thresholds) == set(bank.metrics)
    for index, metric in enumerate(made.metrics):
        scores = []
        for text in prepare(benign, reader, metric, 64, keeps_unlabelled=True):
            running = score_tokens(reader.model, bank, text.tokens.token_ids, boundary=text.boundary).running
            scores.append(float(running[text.is_response, index].max()))
        found = made.card.thresholds[metric]
        num_flagged = sum(score >= made.thresholds[metric] for score in scores)
        assert (found.num_flagged, found.num_benign, found.scope) == (num_flagged, 60, "answer")
        assert found.fpr_upper == clopper_pearson_upper(num_flagged, 60) <= 0.1
        assert clopper_pearson_upper(num_flagged + 1, 60) > 0.1, "one more would be too many"


def test_each_source_has_its_own_count_and_a_document_of_two_rows_is_one(bank, reader, tmp_path):
    benign = [replace(row, source="code" if i % 3 else "chat") for i, row in enumerate(rows(60))]
    benign += [replace(row, id=f"{row.id}-again") for row in benign[:9]]
    made = with_limits(bank, benign, Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=64)
    for found in made.card.thresholds.values():
        assert {name: of.num_benign for name, of in found.by_source.items()} == {"chat": 20, "code": 40}
        assert sum(of.num_flagged for of in found.by_source.values()) == found.num_flagged > 0
        for of in found.by_source.values():
            assert of.fpr_upper == clopper_pearson_upper(of.num_flagged, of.num_benign)


def test_figures_of_the_old_threshold_go_and_the_others_stay(bank, reader, tmp_path):
    made = with_limits(bank, rows(60), Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=64)
    assert made.card.metrics == {"wide/auroc_response": FIGURE}
    assert made.card.run["threshold"]["config"] == {"budget": 0.1, "max_tokens": 64, "dtype": "torch.float32"}
    assert {(row.role, row.source, row.num_rows, row.metric) for row in made.card.data} == {
        ("train", "theirs", 5, "wide"),
        ("benign", "ours", 60, "wide"),
        ("benign", "ours", 60, "narrow"),
    }


def test_prompts_set_the_threshold_of_a_head_that_judges_prompts_and_of_no_other(bank, reader, tmp_path):
    def made(bank: HeadBank, benign: list[Conversation]) -> HeadBank:
        return with_limits(bank, benign, Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=64)

    limits = {metric: replace(OLD, scope="prompt") for metric in bank.metrics}
    for_prompts = HeadBank(bank.heads, bank.identity, card=replace(bank.card, thresholds=limits))
    assert made(for_prompts, rows(60, answered=False)).card.thresholds["wide"].scope == "prompt"
    with pytest.raises(SettingError, match="is for prompts, and the benign texts are answers: leave the answers out"):
        made(for_prompts, rows(60))
    with pytest.raises(SettingError, match=r"'wide' is for answers, and .* are prompts: give each its answer"):
        made(bank, rows(60, answered=False))
    with pytest.raises(SettingError, match="60 of 61 benign texts have an answer, the others none"):
        made(bank, [*rows(60), rows(61, answered=False)[-1]])


def test_a_text_that_is_labelled_positive_is_not_benign(bank, reader, tmp_path):
    benign = [*rows(60), replace(rows(61)[-1], labels={"wide": 1.0})]
    with pytest.raises(SettingError, match="1 of the benign texts are labelled positive for 'wide', 'r60' first"):
        with_limits(bank, benign, Reading(reader, bank.sites, tmp_path), budget=0.1)


def test_what_is_cut_off_is_said(bank, reader, tmp_path, caplog):
    with_limits(bank, rows(60), Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=20)
    assert "58 of 60 texts go on after the 20 tokens that count" in caplog.text


def test_the_figures_of_a_threshold_are_all_known_by_name():
    texts = [
        scored(i, i / 20, token_labels=torch.tensor([0.0, i % 2]), token_scores=torch.tensor([0.1, i / 20]))
        for i in range(20)
    ]
    with_threshold, without = (
        evaluate(texts, threshold=limit, generator=generator(0, "test"), num_resamples=20) for limit in (0.5, None)
    )
    assert with_threshold.keys() - without.keys() == set(AT_THRESHOLD)


def test_the_verb_writes_a_bank_and_measures_again_what_hangs_on_the_threshold(bank, tmp_path, capsys):
    old, reader, benign, new = (tmp_path / name for name in ("old", "reader", "benign.jsonl", "new"))
    bank.save(old)
    PAIR.draft.save_pretrained(reader)
    PAIR.tokenizer.save_pretrained(reader)
    write_jsonl(benign, rows(60))
    texts = [scored(i, i / 40) for i in range(40)]
    write_scored(old / "scored.json", "wide", {"head": texts, "words": texts})
    new.mkdir()
    write_scored(new / "scored.json", "narrow", {})
    command = ["threshold", str(old), "--benign", str(benign), "--model", str(reader)]
    command += ["--work", str(tmp_path / "work"), "--budget", "0.1"]
    assert main([*command, "--out", str(new)]) == 0
    said = capsys.readouterr().out
    made = HeadBank.load(new)
    found = made.card.thresholds["wide"]
    recall = sum(text.score >= found.threshold for text in texts if text.label) / 20
    assert made.card.metrics["wide/recall_at_threshold"].value == pytest.approx(recall)
    assert (new / "scored.json").read_bytes() == (old / "scored.json").read_bytes()
    assert (new / "heads.safetensors").read_bytes() == (old / "heads.safetensors").read_bytes()
    assert "before: A response is flagged when its score reaches 0.999" in said
    assert f"now: A response is flagged when its score reaches {found.threshold:.3f}" in said
    assert made.card.metrics["wide/fpr_wordy_negatives"].value == float(texts[38].score >= found.threshold)
    assert "wide/lag_median" in said and "not measured" in said
    assert "What the threshold of 'narrow' finds is not measured" in said
    assert main([*command, "--out", str(old)]) == 1 and "is the bank itself" in capsys.readouterr().err
    assert main([*command[:-1], "0.01", "--out", str(new)]) == 1
    assert "give 299 documents or more, or a larger budget" in capsys.readouterr().err
    assert HeadBank.load(old).card.metrics == bank.card.metrics
    write_scored(old / "scored.json", "other", {"head": texts})
    assert main([*command, "--out", str(new)]) == 1
    assert "has the scores of head for 'other'; the bank beside it has heads for" in capsys.readouterr().err
    (old / "scored.json").unlink()
    assert main([*command, "--out", str(new)]) == 0
    assert not (new / "scored.json").exists(), "what another bank had scored"
