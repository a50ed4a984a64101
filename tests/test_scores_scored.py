"""Scored texts survive their file, and a damaged one is refused with the place."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pilotfish.errors import ArtefactError
from pilotfish.scores import ScoredText, evaluate, read_scored, write_scored

NAN = math.nan


def text(name: str, *, score: float = 0.1, token_scores: torch.Tensor | None = None, **changes) -> ScoredText:
    given = {"group": name, "prompt": 'say "é"\n', "label": 1.0, "token_labels": torch.tensor([NAN, 1.0, 0.0])}
    return ScoredText(id=name, score=score, token_scores=token_scores, **given | changes)


TOKEN_SCORES = torch.tensor([NAN, 0.1, 1 / 3])
BY_SCORER = {
    "head": [text("a", token_scores=TOKEN_SCORES, pieces=("<s>", "é", "\n")), text("b", label=NAN, score=NAN)],
    "length": [text("a", score=-2.5)],
    "judge": [],
}


def damaged(path, change) -> str:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return str(path)


@pytest.fixture
def path(tmp_path):
    write_scored(tmp_path / "scored.json", "danger", BY_SCORER)
    return tmp_path / "scored.json"


def test_texts_come_back_as_they_were_written(path):
    found = read_scored(path)
    assert found.metric == "danger"
    assert list(found.by_scorer) == ["head", "length", "judge"]
    for name, texts in BY_SCORER.items():
        for before, after in zip(texts, found.by_scorer[name], strict=True):
            assert (after.id, after.group, after.prompt, after.pieces) == (
                before.id,
                before.group,
                before.prompt,
                before.pieces,
            )
            assert [after.label, after.score] == pytest.approx([before.label, before.score], abs=0, nan_ok=True)
            assert torch.equal(after.token_labels.nan_to_num(7.0), before.token_labels.double().nan_to_num(7.0))
            assert (after.token_scores is None) == (before.token_scores is None)
    kept = found.by_scorer["head"][0].token_scores
    assert torch.equal(kept.nan_to_num(7.0), TOKEN_SCORES.double().nan_to_num(7.0)), "not one bit is lost"


def test_the_file_is_json_without_nan(path):
    def refuse(word: str) -> None:
        raise AssertionError(word)

    raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert raw["scorers"]["head"][0]["token_labels"] == [None, 1.0, 0.0]
    assert raw["scorers"]["head"][1]["token_scores"] is None


def test_texts_from_a_file_have_the_figures_that_they_had(tmp_path):
    random = torch.Generator().manual_seed(0)
    texts = [
        text(
            str(i),
            label=float(i % 2),
            score=float(torch.rand((), generator=random)),
            token_labels=torch.tensor([0.0, 1.0, NAN, 0.0]),
            token_scores=torch.rand(4, generator=random),
        )
        for i in range(10)
    ]
    threshold = float(texts[3].token_scores[1])
    write_scored(tmp_path / "scored.json", "danger", {"head": texts})
    again = read_scored(tmp_path / "scored.json").by_scorer["head"]
    figures = [
        evaluate(given, threshold=threshold, generator=torch.Generator().manual_seed(1), num_resamples=10)
        for given in (texts, again)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda raw: raw.pop("metric"), r"scored\.json is not .* keys metric, scorers"),
        (lambda raw: raw.update(metric=3), "'metric' is a name"),
        (lambda raw: raw.update(scorers=[]), "'scorers' an object"),
        (lambda raw: raw["scorers"].update(head={}), "head is not .* a list of texts"),
        (lambda raw: raw["scorers"]["head"].append(3), r"head\[2\] is not .* an object has the keys"),
        (lambda raw: raw["scorers"]["head"][1].update(extra=1), r"head\[1\] is not .* an object has the keys"),
        (lambda raw: raw["scorers"]["head"][0].update(group=None), r"head\[0\] is not .* 'group' is text"),
        (lambda raw: raw["scorers"]["head"][0].update(pieces="abc"), r"head\[0\] is not .* 'pieces'"),
        (lambda raw: raw["scorers"]["head"][0].update(pieces=["a"]), r"head\[0\] is not .* as many"),
        (lambda raw: raw["scorers"]["head"][0].update(token_scores=[0.5]), r"head\[0\] is not .* as many"),
        (lambda raw: raw["scorers"]["head"][0].update(label="high"), r"head\[0\]: label and score .* numbers"),
        (lambda raw: raw["scorers"]["head"][0].update(token_labels=[True, 1, 0]), "token_labels is not .* numbers"),
        (lambda raw: raw["scorers"]["head"][0].update(token_labels=None), "token_labels is not .* numbers"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(change, place, path):
    damaged(path, change)
    with pytest.raises(ArtefactError, match=place):
        read_scored(path)


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_what_is_not_json_is_refused(content, path):
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"scored\.json is not JSON"):
        read_scored(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="No such file"):
        read_scored(tmp_path / "scored.json")
