"""The kit of the HTML reports: escaping, data that cannot end its element, texts in two languages, charts."""

from __future__ import annotations

import json
import math
import re

import pytest

from minidiff.page.html import Html, document, embedded, flat, tag
from minidiff.page.languages import BETWEEN, Text, label, say
from minidiff.page.svg import Chart, Series, steps

HOSTILE = "</script><b onclick='x'>\"&\u2028"


def test_text_and_attributes_are_escaped() -> None:
    made = tag("p", HOSTILE, Html("<i>"), None, 3, [HOSTILE], title=HOSTILE, cls="a", data_x=1, hidden=True, open=False)
    assert "<b" not in made
    assert made.startswith('<p title="&lt;/script&gt;')
    assert 'class="a" data-x="1" hidden>' in made
    assert "<i>3" in made
    assert tag("br") == "<br>"


def test_control_characters_are_shown() -> None:
    """HTML cannot hold them: a reader would see nothing, or a replacement."""
    element = tag("p", "a\x00\x1b[31m\x7f\x85\udc80\tb\n", title="\x07")
    assert element == '<p title="\u2407">a\u2400\u241b[31m\u2421\ufffd\ufffd\tb\n</p>'
    element.encode()


def test_data_cannot_end_its_element() -> None:
    made = embedded({"a": [HOSTILE, 1.5]}, "x")
    inside = re.fullmatch(r'<script type="application/json" id="x">(.*)</script>', made)
    assert inside is not None
    assert not {"<", ">", "&", "\u2028"} & {*inside[1]}
    assert json.loads(inside[1]) == {"a": [HOSTILE, 1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(math.nan, "x")


def test_a_page_runs_one_known_script_or_none() -> None:
    plain = document("t", tag("p", "x"))
    assert "<script" not in plain
    assert "script-src &#x27;none&#x27;" in plain
    one = document(HOSTILE, "x", scripts=["let a = 1;"], data={"d": 1})
    assert one.count("<script>") == 1
    assert re.search(r"script-src &#x27;sha256-[\w+/]{43}=&#x27;", one)
    assert "<b onclick" not in one
    for bad in ({"styles": ["</style>"]}, {"scripts": ["</script>"]}):
        with pytest.raises(ValueError, match="would end its element"):
            document("t", "x", **bad)  # type: ignore[arg-type]


def test_a_text_is_there_in_both_languages() -> None:
    text = Text("`x` is *{name}*", "`x` 是 {name}")
    made = say(text, "p", {"cls": "a"}, name=HOSTILE)
    assert made.count("<p ") == 2
    assert '<p lang="en" class="a"><code>x</code> is <em>&lt;' in made
    assert "<b" not in made
    assert label(text, name=Text("one", "一")) == f"`x` is *one*{BETWEEN}`x` 是 一"
    assert flat([say(Text("2 * 3 * 4", "x"))]).count("<em>") == 0


def test_a_chart_draws_what_is_finite() -> None:
    name = Text("a<b", "甲")
    lines = Series(name, [(0, 1.0), (1, math.nan), (2, 100.0), (3, -1.0)])
    made = Chart(
        name, name, name, [lines, Series(name, [(1, 10.0)], 2, "points")], log=True, marks=[(1, HOSTILE)]
    ).svg()
    (points,) = re.findall(r'<polyline points="([^"]*)"', made)
    assert len(points.split()) == 2, "not a number, and negative on a logarithmic axis"
    assert made.count("<circle") == 1
    assert "<b " not in made
    assert ">1e0<" in made
    assert ">1e2<" in made
    assert Chart(name, name, name, [Series(name, [])]).svg() == ""


def test_steps_have_whole_numbers() -> None:
    name = Text("a", "甲")

    def written(points: list[tuple[float, float]]) -> list[str]:
        return re.findall(r'text-anchor="middle">([^<]*)<', Chart(name, name, name, [Series(name, points)]).svg())

    assert written([(k, k**2) for k in range(1, 6)]) == ["1", "2", "3", "4", "5"]
    assert "1.2" in written([(1, 0.0), (2.5, 1.0)])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 999), (0.00012, 0.00013), (5, 5.0001)])
def test_the_numbers_of_an_axis_are_round_and_inside(low: float, high: float) -> None:
    found = steps(low, high, 5)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= x <= high + 1e-9 for x in found)
