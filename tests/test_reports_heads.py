"""The report on heads: it shows what was measured, says in words what was not, and no text can break it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.cli import main
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.heads import Card, DataCard, HeadCard, Measured, SourceCard, ThresholdCard
from pilotfish.models import Identity
from pilotfish.reports import Section, heads_markdown, render_heads_page
from pilotfish.reports.curves import curves_of
from pilotfish.reports.examples import NUM_AFTER, NUM_BEFORE, examples_of
from pilotfish.reports.section import read_sections
from pilotfish.scores import ScoredText, write_scored

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x> & {{data}} ``` | # \u2028 \u202e"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAN = math.nan
M = "insecure_code"


class Page(HTMLParser):
    """Element names with attributes, and the page's JSON."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


def scored(
    name: str,
    labels: list[float],
    scores: list[float] | None,
    *,
    score: float | None = None,
    label: float | None = None,
    pieces: tuple[str, ...] | None = None,
) -> ScoredText:
    """A text whose response is labelled and scored by its highest token, unless told otherwise."""
    return ScoredText(
        id=name,
        group=name,
        prompt="",
        label=float(any(value == 1 for value in labels)) if label is None else label,
        score=float(max(scores or [0])) if score is None else score,
        token_labels=torch.tensor(labels, dtype=torch.float64),
        token_scores=None if scores is None else torch.tensor(scores, dtype=torch.float64),
        pieces=tuple(f" w{at}" for at in range(len(labels))) if pieces is None else pieces,
    )


def four_texts() -> list[ScoredText]:
    """At a threshold of 0.5: a hit two tokens after onset, a miss, a false alarm, and a quiet negative."""
    return [
        scored("hit", [NAN, 0, 1, 1, 1], [0.9, 0.1, 0.2, 0.3, 0.8], score=0.8, pieces=("<s>", "a", " b", HOSTILE, "e")),
        scored("miss", [NAN, 1, 1, 0, 0], [0.1, 0.2, 0.3, 0.1, 0.1]),
        scored("alarm", [NAN, 0, 0, 0, 0], [0.1, 0.1, 0.7, 0.1, 0.1]),
        scored("quiet", [NAN, 0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1, 0.1]),
    ]


def card(metric: str = M) -> Card:
    def measured(value: float) -> Measured:
        return Measured(value=value, low=value - 0.1, high=value + 0.1, n=20)

    return Card(
        identity=Identity("tiny", "a", "b", 8, 2, 32),
        heads={metric: HeadCard(sites=("0.resid_post", "final"), kind="linear", width=2, window=16)},
        data=(DataCard(source=HOSTILE, license="MIT", num_rows=4, num_tokens=20, role="test"),),
        metrics={
            f"{metric}/auroc_token": measured(0.75),
            f"{metric}/auroc_token_minus_words": measured(0.25),
            f"{metric}/fpr_at_threshold": measured(0.5),
            f"{metric}/ece_token": measured(0.2),
            f"{metric}/elsewhere/other_set/new_figure": measured(0.125),
            f"{metric}/elsewhere/other_set/auroc_token": measured(0.625),
            f"{metric}/elsewhere/other_set/auroc_token_minus_words": measured(-0.125),
            "other/auroc_token": measured(0.99),
        },
        baselines={
            f"{metric}/auroc_token/words": measured(0.5),
            f"{metric}/ece_token/target": measured(0.1),
            f"{metric}/elsewhere/other_set/new_figure/words": measured(0.25),
            f"{metric}/elsewhere/other_set/auroc_token/words": measured(0.75),
        },
        thresholds={
            metric: ThresholdCard(
                threshold=0.5, budget=0.01, num_benign=600, num_flagged=1, fpr_upper=0.0079, benign_source="chats"
            )
        },
        better_than_words={metric: True},
        not_for=f"Not for {HOSTILE}",
    )


def bank(folder: Path, given: Card, texts: dict[str, list[ScoredText]] | None = None, metric: str = M) -> Path:
    given.save(folder / "card.json")
    if texts is not None:
        write_scored(folder / "scored.json", metric, texts)
    return folder


def whole_section(folder: Path) -> Section:
    return read_sections(bank(folder, card(), {"head": four_texts()}))[0]


def test_the_table_holds_the_cards_figures_with_the_best_marked_by_the_right_end(tmp_path: Path) -> None:
    section = whole_section(tmp_path)
    assert section.scorers == ("head", "words", "target")
    tokens, elsewhere, negatives, calibration, unknown = section.figures
    head, words, target = tokens.cells
    assert head is not None and words is not None and target is None
    assert (head.value, head.interval, head.is_best, head.difference) == ("0.750", "0.650 to 0.850", True, None)
    assert (words.value, words.is_best) == ("0.500", False)
    assert words.difference == ("+0.250", "+0.150 to +0.350")
    assert elsewhere.name == "AUROC of tokens, other set"
    head, words, _ = elsewhere.cells
    assert head is not None and words is not None and words.is_best and not head.is_best
    assert words.difference == ("\N{MINUS SIGN}0.125", "\N{MINUS SIGN}0.225 to \N{MINUS SIGN}0.025")
    assert negatives.better == "lower" and negatives.cells[0] is not None and not negatives.cells[0].is_best
    assert [cell and cell.is_best for cell in calibration.cells] == [False, None, True]
    assert unknown.name == "new figure, other set"
    assert [cell and cell.is_best for cell in unknown.cells] == [False, False, None], "nobody said which way is better"


def test_promise_and_verdict_say_what_the_card_says(tmp_path: Path) -> None:
    section = whole_section(tmp_path)
    assert "reaches 0.500. Of 1,000 benign responses like those of chats at most 7.9" in section.promise
    assert "from 1 flagged of 600; the budget was 10" in section.promise
    assert section.verdict == "Better than words at telling tokens apart (AUROC +0.250 over TF-IDF, +0.150 to +0.350)."
    plain = replace(card(), thresholds={}, better_than_words={M: False}, metrics={}, baselines={})
    (bare,) = read_sections(bank(tmp_path / "bare", plain))
    assert bare.promise.startswith("There is no threshold")
    assert bare.verdict == "Not shown to be better than words."
    by_responses = {f"{M}/auroc_response_minus_words": Measured(value=-0.125, low=-0.2, high=0.0, n=9)}
    (worse,) = read_sections(bank(tmp_path / "worse", replace(plain, metrics=by_responses)))
    minus = "\N{MINUS SIGN}"
    assert worse.verdict == (
        f"Not shown to be better than words at telling responses apart (AUROC {minus}0.125 over TF-IDF, {minus}0.200 "
        "to +0.000)."
    )
    prompts = {M: replace(card().thresholds[M], scope="prompt")}
    (asked,) = read_sections(bank(tmp_path / "asked", replace(card(), thresholds=prompts)))
    assert asked.promise.startswith("A prompt is flagged when its score reaches 0.500. Of 1,000 benign prompts")
    by_source = {
        name: SourceCard(num_benign=300, num_flagged=flagged, fpr_upper=bound)
        for name, flagged, bound in (("chats", 0, 0.0099), ("code", 1, 0.0157))
    }
    mixed = {M: replace(card().thresholds[M], benign_source="chats, code", by_source=by_source)}
    (apart,) = read_sections(bank(tmp_path / "apart", replace(card(), thresholds=mixed)))
    assert apart.promise.endswith(
        "The bound is for all of them together; flagged were 0 of 300 of chats (bound 9.9), 1 of 300 of code (bound "
        "15.7)."
    )
    (silent,) = read_sections(bank(tmp_path / "silent", replace(plain, better_than_words={})))
    assert silent.verdict == "Not compared with words."


def test_a_bank_of_two_metrics_has_two_sections_each_with_its_own_data(tmp_path: Path) -> None:
    one, two = card(), card("toxicity")
    rows = tuple(replace(row, source=metric, metric=metric) for metric in (M, "toxicity") for row in one.data)
    both = replace(one, heads={**one.heads, **two.heads}, metrics={**one.metrics, **two.metrics}, data=rows)
    first, second = read_sections(bank(tmp_path, both, {"head": four_texts()}))
    assert (first.metric, second.metric) == (M, "toxicity")
    assert [row[1] for section in (first, second) for row in section.data] == [M, "toxicity"]
    assert first.plots and second.missing


def test_a_bank_without_scored_texts_says_why_there_are_no_curves(tmp_path: Path) -> None:
    (section,) = read_sections(bank(tmp_path, card()))
    assert not section.plots and not section.examples
    assert "There is no scored.json" in section.missing
    assert "There is no scored.json" in heads_markdown([section]).replace("\\", "")


def test_scored_texts_of_another_metric_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"is of metric 'toxicity'; the card beside it has insecure_code"):
        read_sections(bank(tmp_path, card(), {"head": four_texts()}, "toxicity"))


def test_a_report_on_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="give the folder of at least one bank"):
        render_heads_page([])


def test_detection_counts_from_the_onset_and_never_exceeds_the_share_found() -> None:
    *_, detection = curves_of({"head": four_texts()}, 0.5)
    shares = dict(detection.series[0].points)
    assert (shares[0], shares[1], shares[2], shares[16]) == (0, 0, 0.5, 0.5)  # the hit comes two tokens late


def test_a_baseline_is_read_where_it_flags_no_more_negative_texts_than_the_head() -> None:
    head = four_texts()
    words = [
        scored("hit", [NAN, 0, 1, 1, 1], [0.0, 0.0, 3.0, 0.0, 0.0]),
        scored("miss", [NAN, 1, 1, 0, 0], [0.0, 0.0, 6.0, 0.0, 0.0]),
        scored("alarm", [NAN, 0, 0, 0, 0], [0.0, 9.0, 0.0, 0.0, 0.0]),
        scored("quiet", [NAN, 0, 0, 0, 0], [0.0, 5.0, 0.0, 0.0, 0.0]),
    ]
    *_, detection = curves_of({"head": head, "words": words}, 0.5)
    shares = {series.scorer: series.points[-1][1] for series in detection.series}
    assert shares == {"head": 0.5, "words": 0.5}, "one false alarm allowed: just above 5, where only the miss is caught"


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: {label for _, label in rows} == {True, False}
    )
)
def test_a_roc_rises_to_one_within_its_axes(rows: list[tuple[float, bool]]) -> None:
    texts = [scored(f"{at}", [float(label)], [score]) for at, (score, label) in enumerate(rows)]
    for plot in curves_of({"head": texts}, 0.5)[:2]:
        points = plot.series[0].points
        assert points[-1] == (1.0, 1.0)
        assert all(x <= later and y <= higher for (x, y), (later, higher) in itertools.pairwise(points))
        assert all(plot.x.low <= x * (1 + 1e-5) and 0 <= y <= 1 for x, y in points)


def test_curves_that_the_texts_do_not_define_say_so() -> None:
    unlabelled = [scored("a", [NAN, NAN], [0.1, 0.2], label=1.0), scored("b", [NAN, NAN], [0.1, 0.1], label=0.0)]
    responses, tokens, reliability, detection = curves_of({"head": unlabelled}, 0.5)
    assert responses.series
    assert [len(plot.series) for plot in (tokens, reliability, detection)] == [0, 0, 0]
    assert tokens.note == "Nothing to draw: there are no tokens with both labels."
    assert detection.note == "Nothing to draw: no text has a labelled span with token scores."
    assert curves_of({"head": four_texts()}, None)[3].note == "Nothing to draw: there is no threshold."
    assert not any(plot.series for plot in curves_of({}, 0.5))


def test_scores_that_are_no_probabilities_have_a_roc_but_no_reliability() -> None:
    logits = [
        replace(text, token_scores=text.token_scores * 9) for text in four_texts() if text.token_scores is not None
    ]
    _, tokens, reliability, _ = curves_of({"head": four_texts(), "words": logits}, 0.5)
    assert [series.scorer for series in tokens.series] == ["head", "words"]
    assert [series.scorer for series in reliability.series] == ["head"]


def test_examples_are_sorted_into_hits_misses_and_false_alarms_with_their_marks() -> None:
    hits, misses, alarms = examples_of(four_texts(), 0.5)
    assert [[example.id for example in group.examples] for group in (hits, misses, alarms)] == [
        ["hit"],
        ["miss"],
        ["alarm"],
    ]
    (hit,), (miss,) = hits.examples, misses.examples
    assert hit.crossing == 4, "an unlabelled token of the prompt is no crossing, whatever its score"
    assert [token.is_over for token in hit.tokens] == [False, False, False, False, True]
    assert [token.is_labelled for token in hit.tokens] == [False, False, True, True, True]
    assert miss.crossing is None
    assert hits.note == "Flagged: 1 of 2 positive texts; shown are those with the highest scores."


def test_a_threshold_is_held_against_the_text_so_far_where_a_head_keeps_a_running_score() -> None:
    running = [torch.tensor([0.9, 0.1, 0.1, 0.6, 0.7]), torch.full((5,), 0.4), torch.full((5,), 0.1)]
    texts = [
        replace(text, running=so_far.double(), score=float(so_far[1:].max()))
        for text, so_far in zip(four_texts()[:3], running, strict=True)
    ]
    hits, misses, alarms = examples_of(texts, 0.5)
    assert [len(group.examples) for group in (hits, misses, alarms)] == [1, 1, 0], "its own 0.7 does not make an alarm"
    assert hits.examples[0].crossing == 3
    assert hits.examples[0].tokens[3].running == pytest.approx(0.6)
    *_, detection = curves_of({"head": texts}, 0.5)
    assert dict(detection.series[0].points)[1] == 0.5, "one token after onset"


def test_groups_without_examples_say_why() -> None:
    quiet = [text for text in four_texts() if text.id in {"hit", "quiet"}]
    hits, misses, alarms = examples_of(quiet, 0.5)
    assert hits.examples
    assert misses.note == "Not flagged: none of 1 positive texts."
    assert alarms.note == "Flagged: none of 1 negative texts."
    wordless = [replace(text, pieces=()) for text in quiet]
    assert [group.note for group in examples_of(wordless, 0.5)] == [
        "No positive text is here with its words and token scores.",
        "No positive text is here with its words and token scores.",
        "No negative text is here with its words and token scores.",
    ]
    assert "There is no threshold" in examples_of(quiet, None)[0].note


@given(st.integers(1, 400), st.data())
def test_a_long_text_is_cut_around_its_crossing_and_every_cut_token_is_counted(
    length: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, length - 1))
    text = scored("long", [float(at == place) for at in range(length)], [float(at == place) for at in range(length)])
    (example,) = examples_of([text], 0.5)[0].examples
    assert example.num_before + len(example.tokens) + example.num_after == length
    assert len(example.tokens) <= NUM_BEFORE + NUM_AFTER
    assert example.crossing == place - example.num_before
    assert example.tokens[example.crossing].is_labelled


@settings(max_examples=40)
@given(st.one_of(st.just(HOSTILE), st.text(st.characters(), min_size=1, max_size=30)))
def test_whatever_a_text_holds_stays_text(words: str) -> None:
    def rendered(pieces: tuple[str, ...]) -> str:
        text = scored("t", [NAN, 1], [0.1, 0.9], pieces=pieces)
        return render_heads_page([replace(EMPTY, caveats=pieces[1], examples=examples_of([text], 0.5))])

    page, harmless = Page(rendered(("a", words))), Page(rendered(("a", "b")))
    assert page.tags == harmless.tags
    assert not set(page.data) & set("<>&")
    section = json.loads(page.data)["sections"][0]
    assert section["examples"][0]["examples"][0]["tokens"][1]["text"] == section["caveats"] == words


@given(st.one_of(st.just(HOSTILE), st.just("````\n```"), st.text(st.characters(), max_size=30)))
def test_no_text_ends_its_fence_or_breaks_a_table_in_markdown(words: str) -> None:
    text = scored("t", [NAN, 1], [0.1, 0.9], pieces=("a", words))
    section = replace(EMPTY, data=((words, words, words, "1", "2"),), examples=examples_of([text], 0.5))
    source = heads_markdown([section])
    source.encode("utf-8")
    (row,) = [line for line in source.splitlines() if line.endswith("| 1 | 2 |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert not re.search(r"(?<!\\)[<>]", row)
    fence = next(line for line in source.split("\n") if line.endswith("text") and line.startswith("```")).removesuffix(
        "text"
    )
    assert [line.strip() for line in source.split("\n")].count(fence) == 1


EMPTY = Section(
    metric=M,
    model="tiny",
    reader="",
    promise="",
    verdict="",
    is_better=None,
    caveats="",
    data=(),
    scorers=("head",),
    scorer_labels=("head",),
    figures=(),
    plots=(),
    examples=(),
    missing="",
)


def test_markdown_brackets_the_span_and_points_at_the_crossing(tmp_path: Path) -> None:
    source = heads_markdown([whole_section(tmp_path)])
    assert "⟦ b" in source and "▼e⟧" in source
    assert "**0.750** (0.650 to 0.850)" in source
    assert "head +0.250 (+0.150 to +0.350)" in source


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = render_heads_page([whole_section(tmp_path)])
    source = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xhtml", "")
    assert not re.search(r"""https?:|//[a-z]+\.|url\(|@import|\shref=|fetch\(|XMLHttpRequest|WebSocket""", source)
    policy = next(attrs["content"] or "" for _, attrs in Page(page).tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_curve_stands_out_from_the_paper(theme: str) -> None:
    paper = {"light": "#fcfbf8", "dark": "#17181b"}[theme]
    folder = resources.files("pilotfish.reports")
    assert f"--paper: {paper}" in folder.joinpath("page.css").read_text(encoding="utf-8")
    css = folder.joinpath("heads_page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root[^{]*\{(.*?)\}", css, re.S)
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[theme == "dark"]))
    assert len(colours) == 7
    for name, colour in colours.items():
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_verb_writes_both_files_and_names_a_folder_that_is_no_bank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(bank(tmp_path / "bank", card(), {"head": four_texts()}))
    page, markdown = tmp_path / "r.html", tmp_path / "r.md"
    assert main(["report", folder, folder, "--out", str(page), "--markdown", str(markdown)]) == 0
    assert len(json.loads(Page(page.read_text(encoding="utf-8")).data)["sections"]) == 2
    assert markdown.read_text(encoding="utf-8").count("\n## insecure code") == 2
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(page)]) == 1
    assert "a bank is heads.safetensors with card.json" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_figures_curves_and_marked_tokens(tmp_path: Path) -> None:
    sections = [whole_section(tmp_path / "whole"), *read_sections(bank(tmp_path / "bare", card()))]
    path = tmp_path / "report.html"
    path.write_text(render_heads_page(sections), encoding="utf-8")
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *flags, "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    classes = [(attrs.get("class") or "").split() for _, attrs in Page(shown).tags]
    assert sum("metric-section" in names for names in classes) == 2
    assert sum("curve" in names for names in classes) == 4 + 4, "four plots of one curve, and a sample in each legend"
    assert sum({"token", "labelled"} <= set(names) for names in classes) == 1 + 3 + 2, "one in the key"
    assert sum("crossing" in names for names in classes) == 1 + 2
    drawings = [attrs for tag, attrs in Page(shown).tags if tag == "svg" and attrs.get("role") == "img"]
    assert all("-title" in (attrs["aria-labelledby"] or "") for attrs in drawings) and len(drawings) == 4
    assert "There is no scored.json of this metric" in shown
