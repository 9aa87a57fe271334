"""Reports of known differences: as text, and as an HTML page with a plot."""

from __future__ import annotations

import math
import re
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minidiff.parity.difference import Difference, difference
from minidiff.parity.engine import Judgement, Row
from minidiff.parity.page import page
from minidiff.parity.report import Report, judged, outcome, reasons, text, where

ONES = torch.ones(4, dtype=torch.float64)


def by(relative: float) -> Difference:
    """The difference of four ones from four ones of which the last is so much larger."""
    return difference(ONES, torch.cat([ONES[:3], ONES[3:] + relative]))


def against(other: Tensor) -> Difference:
    return difference(ONES, other)


CAUSE = Row("step.0/unet/b", by(0.5), by(0.25), Judgement(2.0, 3.0, 4.0))
ROWS = [
    Row("start/x", by(0), by(0)),
    Row("step.0/unet/a", by(0.5), by(0)),
    CAUSE,
    Row("step.0/unet/c", by(2.0**-20), by(2.0**-20)),
    Row("step.1/out", against(ONES[:2])),
    Row("step.1/x", against(ONES / 0)),
    Row("decode/pixels", against(ONES * math.nan), by(0)),
    Row("decode/rest", by(0)),
]
REPORT = Report("ours", "theirs", ROWS, 0.125)


def test_the_text_of_a_report() -> None:
    told = text(REPORT).split("\n")
    assert told[:2] == ["A         ours", "B         theirs"]
    assert [line.split() for line in told[3:8]] == [
        ["section", "equal", "max", "abs", "relative", "ULPs", "SNR", "on", "equal", "inputs", "nearer"],
        ["start", "1/1", "0", "0", "0", "-", "0"],
        ["step.0", "0/3", "5.00e-01", "5.00e-01", f"{2**51:,}", "12", "dB", "2.50e-01", "<-", "first", "difference"],
        ["step.1", "0/2", "inf", "inf", "-", "-", "-"],
        ["decode", "1/2", "NaN", "inf", "0", "-", "0"],
    ]
    assert [line.split() for line in told[9:18]] == [
        ["stage", "equal", "max", "abs", "relative", "ULPs", "SNR", "on", "equal", "inputs", "nearer"],
        ["start/x", "yes", "0", "0", "0", "-", "0"],
        ["step.0/unet/a", "no", "5.00e-01", "5.00e-01", f"{2**51:,}", "12", "dB", "0"],
        [
            "step.0/unet/b",
            "no",
            "5.00e-01",
            "5.00e-01",
            f"{2**51:,}",
            "12",
            "dB",
            "2.50e-01",
            "neither",
            "<-",
            "first",
            "difference",
        ],
        ["step.0/unet/c", "no", "9.54e-07", "9.54e-07", f"{2**32:,}", "126", "dB", "9.54e-07"],
        ["step.1/out", "no", "shape", "inf", "-", "-", "-"],
        ["step.1/x", "no", "inf", "inf", "-", "-", "-"],
        ["decode/pixels", "no", "NaN", "inf", "-", "-", "0"],
        ["decode/rest", "yes", "0", "0", "0", "-", "-"],
    ]
    assert told[19] == "first difference at step.0/unet/b"
    assert told[20] == f"  how far   max abs 0.25, relative 0.25, {2**50:,} ULPs; 1 of 4 values"
    assert len({line.index("equal") + 5 for line in told[3:4]} | {re.search(r"\d/\d", t).end() for t in told[4:8]}) == 1  # type: ignore[union-attr]


def test_around_the_first_place_and_no_farther() -> None:
    many = [Row(f"step.0/{k}", by(0.5 if k >= 50 else 0)) for k in range(100)]
    shown = [line.split()[0] for line in text(Report("a", "b", many)).split("\n") if line.startswith("step.0/")]
    assert shown == [f"step.0/{k}" for k in range(46, 58)]
    assert sum(line.startswith("step.0/") for line in text(Report("a", "b", many), every=True).split("\n")) == 100
    begun = [Row(f"step.0/{k}", by(0.5)) for k in range(20)]
    shown = [line.split()[0] for line in text(Report("a", "b", begun)).split("\n") if line.startswith("step.0/")]
    assert shown == [f"step.0/{k}" for k in range(8)]


def test_what_only_one_side_has() -> None:
    told = text(Report("a", "b", ROWS[:1], only_a=list("pqrst"), only_b=list("xyz")))
    assert "\nonly in A: p, q, r, s and 1 more\n" in told
    assert "\nonly in B: x, y, z\n" in told
    assert told.endswith("\nequal: every value is equal at all 1 stages")
    shown = page(Report("a", "b", ROWS[:1], only_b=["x", "y"]))
    assert 'only in B <span class="n">2 stages</span></summary><p class="mono">x, y</p>' in shown
    assert "only in A" not in shown


def test_the_outcome_and_its_reasons() -> None:
    assert outcome(Report("a", "b", ROWS[:1], 0.5)) == "equal: every stage is within 0.5 at all 1 stages"
    assert reasons(Report("a", "b", ROWS[:1])) == {}
    alone = Row("step.0/unet/a", by(0.5))
    report = Report("a", "b", [ROWS[0], alone], 0.125)
    assert "and every stage before it is within the tolerance: weights, bias" in where(report, alone)
    report = Report("a", "b", [ROWS[0], alone])
    assert "and every stage before it is equal: weights, bias" in where(report, alone)
    report = Report("a", "b", [alone])
    assert where(report, alone) == "this module computes something else: weights, bias, epsilon, dtype"
    grown = Row("step.0/unet/a", by(0.5), by(0.125))
    assert "have added up" in where(Report("a", "b", [grown], 0.125), grown)
    assert "on equal inputs" in where(Report("a", "b", [grown], 0.1), grown)
    several = Report("a", "b", [Row(f"step.0/unet/{k}", by(0.5), by(0.5)) for k in range(7)])
    assert reasons(several)["also"] == (
        "on equal inputs these differ too: step.0/unet/1, step.0/unet/2, step.0/unet/3, step.0/unet/4 and 2 more"
    )
    repeated = [Row(f"step.{k}/unet/a", by(0.5), by(0.5)) for k in range(3)]
    assert "also" not in reasons(Report("a", "b", repeated)), "the same place of later steps"


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["step.0/out"], "the guidance: u + scale"),
        (["step.0/out#2"], "the guidance: u + scale"),
        (["negative/context"], "the encoded prompts given to the UNet"),
        (["text.2/ids"], "the tokenizer"),
        (["text_encoder/layers.0.attn.out"], "this module computes something else"),
        (["control.0/mid.attn.out"], "this module computes something else"),
        (["decode/vae/out"], "this module computes something else"),
        (["unet/unet.conv_out", "unet/output out"], "the whole module's output, behind unet/unet.conv_out"),
        (["unet/output out"], "the whole network's output; no layer of it is compared"),
        (
            ["unet/output out", "vae_encoder/output mean"],
            "the whole network's output, and every stage before it is equal",
        ),
        (["a", "output"], "the whole module's output, behind a"),
    ],
)
def test_the_kind_of_a_stage(stages: list[str], words: str) -> None:
    rows = [Row(stage, by(0.5 if stage == stages[-1] else 0.0)) for stage in stages]
    assert where(Report("a", "b", rows), rows[-1]).startswith(words)


@pytest.mark.parametrize(
    ("judgement", "words"),
    [
        (Judgement(1.0, 2.0, 3.0), "not rounding: in float64 the two still differ, by 3, "),
        (
            Judgement(1.0, 2.0, 1e-14),
            "rounding: in float64 the two agree; A is 1 from the truth (root mean square), B 2: A",
        ),
        (Judgement(2.0, 1.0, 1e-14), ": B is nearer"),
        (Judgement(2.0, 2.0, 1e-14), ": both are equally near"),
        (Judgement(2.0, 2.0, None), "only one side can run in it; "),
    ],
)
def test_what_float64_says(judgement: Judgement, words: str) -> None:
    told = judged(Row("x", by(0.5), by(0.5), judgement))
    assert words in told
    assert told.startswith(words) or words.startswith(":")


# --- the page ---------------------------------------------------------------------------------------------------------


def rows_of(shown: str) -> dict[str, tuple[bool, str]]:
    """The rows of the tables by their first cell: is it the anchor, and its class."""
    found = re.findall(r'<tr( id="first")?(?: class="([^"]*)")?><td>([^<]*)</td>', shown)
    return {name: (anchor != "", kind) for anchor, kind, name in found}


def test_the_rows_of_the_page() -> None:
    shown = page(REPORT)
    assert rows_of(shown) == {
        "start": (False, ""),
        "step.0": (False, "apart"),
        "step.1": (False, "apart"),
        "decode": (False, "apart"),
        "start/x": (False, ""),
        "step.0/unet/a": (False, "apart"),
        "step.0/unet/b": (True, "apart cause first"),
        "step.0/unet/c": (False, ""),
        "step.1/out": (False, "apart"),
        "step.1/x": (False, "apart"),
        "decode/pixels": (False, "apart"),
        "decode/rest": (False, ""),
    }
    heads = re.findall(r'<details( open)?><summary><code>([^<]*)</code> <span class="n">(.*?)</span></summary>', shown)
    assert heads == [
        ("", "start", "1 within the tolerance"),
        (" open", "step.0", '<span class="bad">2 of 3 differ</span>'),
        ("", "step.1", '<span class="bad">2 of 2 differ</span>'),
        ("", "decode", '<span class="bad">1 of 2 differ</span>'),
    ]
    assert '<div class="outcome bad"><b><a href="#first">first difference at step.0/unet/b</a></b>' in shown
    assert "<dt>tolerance</dt><dd>0.125 of a stage&#x27;s largest value</dd>" in shown
    cells = ["step.0/unet/b", "no", "5.00e-01", "5.00e-01", f"{2**51:,}", "12 dB", "2.50e-01", "neither"]
    assert f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in shown, "without the arrow of the text"
    cells = ["step.0", "0/3", "5.00e-01", "5.00e-01", f"{2**51:,}", "12 dB", "2.50e-01"]
    assert f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in shown
    same = page(Report("a", "b", ROWS[:1]))
    assert rows_of(same) == {"start": (False, ""), "start/x": (False, "")}
    assert '<span class="n">1 equal</span>' in same
    assert '<div class="outcome"><b>equal: every value is equal at all 1 stages</b></div>' in same
    assert "<dt>tolerance</dt><dd>equal values</dd>" in same


def test_hostile_names_stay_text() -> None:
    """Names of tensors, of both programs, and what their recordings say of themselves come from strangers."""
    hostile = "</script></td><script>alert(1)</script><img src=x onerror=alert(1)>"
    stage = f"step.0/unet/{hostile}"
    report = Report(
        hostile, hostile, [Row(stage, by(0.5))], only_a=[hostile], only_b=[hostile], about={hostile: hostile}
    )
    shown = page(report)
    assert shown.count("alert(1)") > 10
    assert "<img" not in shown
    assert "<script" not in shown


def points(shown: str) -> list[tuple[str, float, float]]:
    """The points of the picture: what they are, and where."""
    found = re.findall(r'<circle class="(\w+)" cx="([^"]*)" cy="([^"]*)"', shown)
    return [(kind, float(x), float(y)) for kind, x, y in found]


def test_the_picture() -> None:
    """Points go from left to right in equal steps, as high as their logarithm; hollow ones where inputs were equal."""
    powers = [0, -12, -9, -8, -4, 0, 1, 3]
    rows = [Row(f"step.{k // 4}/{k}", by(10.0**p if k else 0)) for k, p in enumerate(powers)]
    rows[4] = Row("step.1/4", by(1e-4), by(1e-8))
    shown = page(Report("a", "b", rows, 1.0))
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', shown)[0])
    own = [(x, y) for kind, x, y in points(shown) if kind == "own"]
    ((_, ring_x, ring_y),) = [p for p in points(shown) if p[0] == "local"]
    steps = [b[0] - a[0] for a, b in pairwise(own)]
    assert len(own) == len(rows)
    assert max(steps) - min(steps) < 0.2
    assert min(steps) > width / 10
    assert all(0 < x < width and 0 < y < height for x, y in own)
    ys = [y for _, y in own]
    assert ys[0] == ys[1] == ys[2] > ys[3] > ys[4] > ys[5] > ys[6] == ys[7], "from equal at the bottom to 10 at the top"
    assert (ring_x, ring_y) == (own[4][0], ys[3])
    assert ys[4] == pytest.approx((ys[2] + ys[6]) / 2, abs=0.11), "1e-4 lies between 1e-9 and 10"
    lines = {int(p): float(y) - 4 for y, p in re.findall(r'y="([\d.]+)" text-anchor="end">1e(-?\d+)<', shown)}
    assert lines.keys() == {-8, -6, -4, -2, 0}
    assert [lines[p] for p in (-8, -4, 0)] == pytest.approx([ys[3], ys[4], ys[5]], abs=0.11)
    assert float(re.findall(r'y="([\d.]+)" text-anchor="end">equal<', shown)[0]) - 4 == pytest.approx(ys[0])
    assert float(re.findall(r'class="mark" x1="([\d.]+)"', shown)[0]) == own[6][0], "the first that is beyond 1"
    borders = [float(x) for x in re.findall(r'class="grid" x1="([\d.]+)" x2="\1"', shown)]
    assert borders == [own[0][0], own[4][0]]
    assert 'class="mark"' not in page(Report("a", "b", rows[:1]))
    assert points(page(Report("a", "b", rows[:1])))[0][1:] == own[0], "a single one is the first"


def test_a_name_stands_in_the_picture_where_there_is_room() -> None:
    def named(name: str) -> bool:
        rows = [Row(f"{name}/{k}" if k < 10 else f"rest/{k}", by(0)) for k in range(100)]
        return f">{name}</text>" in page(Report("a", "b", rows))

    assert named("a" * 12)
    assert not named("a" * 13), "a tenth of the width has room for 12 letters and a margin"


def test_of_a_long_run_some_points_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["minidiff.parity.page"], "MOST_POINTS", 10)
    rows = [Row(f"step.0/{k}", by(0.5 if k == 7 else 0)) for k in range(25)]
    assert len(points(page(Report("a", "b", rows)))) == 9 + 1, "every third, and the first that differs"
    assert len(points(page(Report("a", "b", rows[:10])))) == 10
    assert len(points(page(Report("a", "b", rows[:7])))) == 7
