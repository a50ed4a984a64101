"""Thresholds from benign texts of the user's own: the bound is exact, and no figure of the old threshold stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import seeded_bank

from pilotfish.cli import main
from pilotfish.core import Conversation, Message
from pilotfish.heads import Card, HeadBank, Measured, ThresholdCard, load_bank
from pilotfish.models import LoadedModel, tiny_pair
from pilotfish.scores import Reading, ScoredText, clopper_pearson_upper, score_tokens, with_limits, write_scored
from pilotfish.scores.prepared import prepare
from pilotfish.texts import write_jsonl

PAIR = tiny_pair(seed=0)
OLD = ThresholdCard(threshold=0.999, budget=0.2, num_benign=9, num_flagged=0, fpr_upper=0.3, benign_source="made up")
FIGURE = Measured(value=0.5, low=0.4, high=0.6, n=9)


def rows(count: int, *, answered: bool = True) -> list[Conversation]:
    answer = [Message("assistant", "fine")] if answered else []
    texts = [(Message("user", f"go {i} and {i * 7}"), *answer) for i in range(count)]
    return [Conversation(f"r{i}", f"g{i}", messages, source="ours") for i, messages in enumerate(texts)]


@pytest.fixture(scope="module")
def reader() -> LoadedModel:
    assert PAIR.draft is not None and PAIR.draft_identity is not None
    return LoadedModel(PAIR.draft, PAIR.tokenizer, PAIR.draft_identity, "a test")


@pytest.fixture(scope="module")
def bank() -> HeadBank:
    made = seeded_bank(PAIR, reader="draft")
    names = ("auroc_response", "recall_at_threshold", "lag_median", "lexical_gap", "elsewhere/far/fpr_at_threshold")
    figures = {f"wide/{name}": FIGURE for name in names}
    card = Card(identity=made.identity, thresholds={"wide": OLD}, metrics=figures)
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


def test_figures_of_the_old_threshold_go_and_the_others_stay(bank, reader, tmp_path):
    made = with_limits(bank, rows(60), Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=64)
    assert made.card.metrics == {"wide/auroc_response": FIGURE}
    assert made.card.run["threshold"]["config"] == {"budget": 0.1, "max_tokens": 64}


def test_prompts_alone_set_a_threshold_for_prompts(bank, reader, tmp_path):
    made = with_limits(bank, rows(60, answered=False), Reading(reader, bank.sites, tmp_path), budget=0.1, max_tokens=64)
    assert made.card.thresholds["wide"].scope == "prompt"


def test_the_verb_writes_a_bank_and_measures_again_what_hangs_on_the_threshold(bank, tmp_path, capsys):
    old, reader, benign, new = (tmp_path / name for name in ("old", "reader", "benign.jsonl", "new"))
    bank.save(old)
    PAIR.draft.save_pretrained(reader)
    PAIR.tokenizer.save_pretrained(reader)
    write_jsonl(benign, rows(60))
    texts = [
        ScoredText(
            id=f"t{i}",
            group=f"g{i}",
            prompt="",
            label=float(i % 2),
            score=i / 40,
            token_labels=torch.zeros(0),
            token_scores=None,
        )
        for i in range(40)
    ]
    write_scored(old / "scored.json", "wide", {"head": texts})
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
    assert "wide/lag_median" in said and "not measured" in said
    assert main([*command, "--out", str(old)]) == 1 and "is the bank itself" in capsys.readouterr().err
    assert main([*command[:-1], "0.01", "--out", str(new)]) == 1
    assert "give 299 documents or more, or a larger budget" in capsys.readouterr().err
    assert HeadBank.load(old).card.metrics == bank.card.metrics


def test_a_bank_that_ships_is_found_by_its_name_unless_a_folder_has_it(bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("smollm2-135m-refusal")
    assert load_bank(name).metrics == ("refusal",)
    bank.save(name)
    assert load_bank(name).metrics == bank.metrics
