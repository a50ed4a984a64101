"""The plot: well-formed, self-contained, and every point where its numbers say."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.reports.scatter import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Point, Reading, scatter_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(points, x=None, y=None) -> ElementTree.Element:
    return ElementTree.fromstring(scatter_svg(points, "a < b & c", x=Axis("kept", x), y=Axis("AUROC", y)))


def point(label: str, x: float, y: float, half: float = 0.01) -> Point:
    return Point(label, Reading(x, x - half, x + half), Reading(y, y - half, y + half))


def places(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in root.iter(f"{SVG}circle")]


def test_hand_values_of_a_plot_whose_scales_are_round():
    root = drawn([point("none", 0.0, 0.5, 0.0), point("0.5", 1.0, 1.0, 0.0)])
    assert places(root) == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"0.0", "0.2", "1.0", "0.5", "0.6", "none", "kept", "AUROC", "a < b & c"} <= set(words)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 2)), min_size=1, max_size=6))
def test_everything_lies_within_the_frame_and_in_order(values):
    root = drawn([point(str(i), *each) for i, each in enumerate(values)], x=0.25)
    for line in [*root.iter(f"{SVG}line")]:
        for name, low, high in (("x", LEFT, WIDTH - RIGHT), ("y", TOP, HEIGHT - BOTTOM)):
            for end in "12":
                assert low - 0.1 <= float(line.get(name + end, "nan")) <= high + 0.1
    found = sorted(zip((value[0] for value in values), (place[0] for place in places(root)), strict=True))
    assert [x for _, x in found] == sorted(x for _, x in found)


def test_a_screen_reader_is_told_the_numbers_and_a_limit_is_dashed():
    root = drawn([point("none", 0.5, 0.8), point("0.25", 0.4, 0.9)], x=0.45, y=0.83)
    assert root.find(f"{SVG}desc").text == "none: kept 0.500, AUROC 0.800; 0.25: kept 0.400, AUROC 0.900"
    assert sum(line.get("class") == "limit" for line in root.iter(f"{SVG}line")) == 2


def test_it_follows_the_scheme_of_the_reader_and_asks_for_nothing():
    text = scatter_svg([point("a", 0.1, 0.2)], "t", x=Axis("x"), y=Axis("y"))
    assert "prefers-color-scheme: dark" in text
    assert text.count("http") == 1, "the namespace alone"
    assert "<script" not in text


def test_only_points_that_are_joined_have_a_line():
    points = [point("none", 0.5, 0.8), point("a", 0.4, 0.9), point("b", 0.3, 0.7)]
    for joined in (True, False):
        text = scatter_svg(points, "t", x=Axis("x"), y=Axis("y"), joined=joined)
        assert ("<polyline" in text) == joined
        assert text.count("<circle") == 3


def test_a_label_that_would_cover_another_goes_below_its_point():
    given = (("far away", 0.0, 0.0), ("a long label at the edge", 1.0, 1.0), ("near", 0.8, 1.0))
    root = drawn([point(*each, half=0.0) for each in given])
    heights = {text.text: float(text.get("y", "nan")) for text in root.iter(f"{SVG}text") if text.get("y")}
    dots = {label: y for (label, *_), (_, y) in zip(given, places(root), strict=True)}
    assert heights["a long label at the edge"] < dots["a long label at the edge"]
    assert heights["near"] > dots["near"]
    assert heights["far away"] < dots["far away"]


def test_no_points_and_what_is_not_a_number_are_refused():
    with pytest.raises(SettingError, match="no points to draw"):
        drawn([])
    with pytest.raises(SettingError, match="not finite; leave it out"):
        drawn([point("a", float("nan"), 0.5)])
