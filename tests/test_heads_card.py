"""A card reads back what was written, and refuses what it does not know."""

from __future__ import annotations

import json

import pytest

from pilotfish.errors import ArtefactError
from pilotfish.heads import CalibrationCard, Card, DataCard, HeadCard, Measured, SourceCard, ThresholdCard
from pilotfish.models import Identity

CARD = Card(
    identity=Identity("m", "w" * 64, "t" * 64, 4, 3, 100),
    heads={
        "a": HeadCard(sites=("1.resid_post", "final"), kind="linear", width=2, window=16),
        "b": HeadCard(sites=("final",), kind="attention", width=1, window=10),
    },
    weights_sha256="0" * 64,
    data=(DataCard(source="SVEN", license="MIT", num_rows=2, num_tokens=30, role="train"),),
    metrics={
        "a/auroc_token": Measured(value=0.9, low=0.8, high=0.95, n=12),
        "b/auroc_token": Measured(value=0.7, low=0.6, high=0.8, n=12),
    },
    baselines={"a/auroc_token/words": Measured(value=0.8, low=0.7, high=0.9, n=12)},
    thresholds={
        "a": ThresholdCard(
            threshold=0.5,
            budget=0.01,
            num_benign=600,
            num_flagged=1,
            fpr_upper=0.008,
            benign_source="HaluEval",
            by_source={"HaluEval": SourceCard(num_benign=600, num_flagged=1, fpr_upper=0.008)},
        )
    },
    calibration={
        "a/token": CalibrationCard(
            scale=1.5, shift=-2.0, num_items=100, share_positive=0.1, held_out={"platt_log_loss": 0.2}
        )
    },
    better_than_words={"a": True, "b": False},
    not_for="naïve use",
    run={"seed": 0, "config": {"budget": 0.01}},
)


def test_a_card_survives_a_round_trip(tmp_path):
    CARD.save(tmp_path / "card.json")
    assert Card.load(tmp_path / "card.json") == CARD


def test_a_subset_keeps_only_what_is_said_of_its_metrics():
    part = CARD.subset(["b"])
    assert set(part.heads) == set(part.better_than_words) == {"b"}
    assert set(part.metrics) == {"b/auroc_token"}
    assert part.thresholds == part.calibration == part.baselines == {}
    assert (part.identity, part.data, part.not_for, part.run) == (CARD.identity, CARD.data, CARD.not_for, CARD.run)


PLACES = [
    (),
    ("identity",),
    ("data", 0),
    ("metrics", "a/auroc_token"),
    ("baselines", "a/auroc_token/words"),
    ("thresholds", "a"),
    ("thresholds", "a", "by_source", "HaluEval"),
    ("calibration", "a/token"),
    ("heads", "b"),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_unknown_key_is_refused_by_name_wherever_it_stands(place, tmp_path):
    raw = json.loads(json.dumps(written(tmp_path)))
    inner(raw, place)["colour"] = "red"
    with pytest.raises(ArtefactError, match=r"unknown or missing keys for .*: colour"):
        Card.load(rewritten(tmp_path, raw))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_missing_key_is_refused_by_name_wherever_it_stood(place, tmp_path):
    raw = written(tmp_path)
    at = inner(raw, place)
    gone = next(key for key in reversed(at) if key not in ("median_tokens", "by_source"))
    del at[gone]
    with pytest.raises(ArtefactError, match=f"unknown or missing keys for .*: {gone}"):
        Card.load(rewritten(tmp_path, raw))


def test_a_card_from_before_lengths_and_sources_were_kept_still_loads(tmp_path):
    raw = written(tmp_path)
    for key in ("median_tokens", "by_source"):
        del inner(raw, ("thresholds", "a"))[key]
    found = Card.load(rewritten(tmp_path, raw)).thresholds["a"]
    assert (found.median_tokens, found.by_source) == (None, {})


@pytest.mark.parametrize("value", [["x"], "text", 3, None], ids=str)
@pytest.mark.parametrize("key", ["identity", "heads", "data", "metrics", "thresholds"])
def test_a_part_of_another_kind_is_refused(key, value, tmp_path):
    with pytest.raises(ArtefactError, match="card"):
        Card.load(rewritten(tmp_path, written(tmp_path) | {key: value}))


def test_a_card_that_is_not_there_or_is_no_json_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ArtefactError, match=r"card.json cannot be read: No such file .*; a bank is heads.safetensors"):
        Card.load(tmp_path / "card.json")
    (tmp_path / "card.json").write_text('{"identity": ')
    with pytest.raises(ArtefactError, match=r"is not JSON: .*; copy the bank again"):
        Card.load(tmp_path / "card.json")
    (tmp_path / "card.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtefactError, match="is not JSON"):
        Card.load(tmp_path / "card.json")
    (tmp_path / "card.json").write_text("[1]")
    with pytest.raises(ArtefactError, match="a list where Card belongs"):
        Card.load(tmp_path / "card.json")


def written(folder):
    CARD.save(folder / "card.json")
    return json.loads((folder / "card.json").read_text())


def rewritten(folder, raw):
    (folder / "card.json").write_text(json.dumps(raw))
    return folder / "card.json"


def inner(raw, place):
    for key in place:
        raw = raw[key]
    return raw
