"""``minidiff plan``: the table of a sampler's steps, of minidiff's own and of other programs."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from minidiff.config import ScheduleConfig
from minidiff.page.svg import Chart, Series
from minidiff.samplers import SAMPLERS
from minidiff.schedule import NoiseSchedule
from tests.support.command import Run, one_error

SVG = "{http://www.w3.org/2000/svg}"


def test_plan(run: Run) -> None:
    ended = run("plan", "--sampler", "ddim", "--steps", "50", "--set", "steps_offset=0", "--set", "spacing=leading")
    assert (ended.status, ended.err) == (0, [])
    assert [line.split()[:2] for line in ended.out[2:]] == [[str(i), str(980 - 20 * i)] for i in range(50)]
    assert "x starts as noise * 14.6146" in run("plan", "--sampler", "euler", "--steps", "3").out[0]
    assert run("plan", "--model", "text", "--steps", "2").out[0].startswith("PNDM: 3 model calls")
    one_error(run("plan", "--sampler", "ddim", "--set", "foo=1"), "ddim has no option 'foo'")
    one_error(run("plan", "--set", "spacing"), "'spacing' should be OPTION=VALUE")
    one_error(run("plan", "--sampler", "ddim", "--steps", "5000"), "steps=5000")
    one_error(run("plan", "--model", "missing.safetensors"), "missing.safetensors", "no such file")


def test_plans_of_several_programs(run: Run) -> None:
    ended = run("plan", "--sampler", "euler", "--steps", 5, "--like", "a1111,diffusers")
    assert ended.status == 0
    assert ended.out[0] == "a1111: 5 model calls, x starts as noise * 14.6146"
    assert len(ended.out) == 2 + 1 + 5
    own = run("plan", "--sampler", "euler", "--steps", 5, "--like", "a1111", "--set", "spacing=leading")
    assert own.out[2].split()[1] == "800"
    one_error(
        run("plan", "--like", "a1111,webui"), "no program is called 'webui'; known are minidiff, diffusers, ldm, k"
    )


def drawn(path: Path) -> tuple[list[ElementTree.Element], list[str], list[list[float]]]:
    """The curves of a picture, its words, and for each row of its ruler the places of the marks."""
    root = ElementTree.parse(path).getroot()
    rows = [[float(mark.attrib["x1"]) for mark in row] for row in root.iter(f"{SVG}g") if "data-row" in row.attrib]
    words = [text.text or "" for text in root.iter(f"{SVG}text")]
    return list(root.iter(f"{SVG}polyline")), words, rows


def test_plot_shows_every_sampler(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    ended = run("plan", "--sampler", "euler,ddim", "--steps", 10, "--plot", file)
    assert (ended.status, ended.out, ended.err) == (0, [str(file)], [])
    curves, words, rows = drawn(file)
    assert [len(curve.attrib["points"].split()) for curve in curves] == [10, 10]
    assert {"euler", "ddim", "euler: 10 model calls, x starts as noise * 14.6146"} <= set(words)
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    for marks, name in zip(rows, ("euler", "ddim"), strict=True):
        times = SAMPLERS[name]().plan(schedule, 10).timesteps.tolist()
        assert [round((x - marks[-1]) / (marks[0] - marks[-1]), 2) for x in marks] == [
            round((t - times[-1]) / (times[0] - times[-1]), 2) for t in times
        ]
    text = file.read_text("utf-8")
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"(href|url\(|script|@import)", text)


def test_plot_shows_every_program(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    assert run("plan", "--sampler", "ddim", "--like", "ldm,comfyui", "--steps", 5, "--plot", file).status == 0
    curves, words, rows = drawn(file)
    assert len(curves) == len(rows) == 2
    assert {"ddim as ldm", "ddim as comfyui"} <= set(words)
    again = run("plan", "--sampler", "edm_euler", "--plot", file)
    assert again.out == [str(tmp_path / "plan-2.svg")]
    curves, _, rows = drawn(tmp_path / "plan-2.svg")
    assert (len(curves), rows) == (1, [])  # its timesteps are not those of training
    assert run("plan", "--model", "text", "--plot", file, "--force").out == [str(file)]
    assert "pndm" in drawn(file)[1]


def test_plot_of_what_cannot_be_drawn(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    one_error(run("plan", "--sampler", "euler,ddim"), "several samplers go into --plot")
    one_error(run("plan", "--plot", file, "--json"), "--json and --plot")
    one_error(run("plan", "--force"), "--plot is not given")
    one_error(run("plan", "--sampler", "euler,", "--plot", file), "no sampler is called ''")
    one_error(run("plan", "--sampler", "euler,dim", "--plot", file), "no sampler is called 'dim'")
    one_error(run("plan", "--sampler", "ddim", "--like", "k-diffusion", "--plot", file), "k-diffusion has no sampler")
    many = "ddpm,ddim,pndm,euler,heun,lms,unipc"
    one_error(run("plan", "--sampler", many, "--plot", file), "6 plans at most, got 7")
    one_error(run("plan", "--plot", tmp_path / "nowhere" / "plan.svg"), "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_a_chart_stays_text() -> None:
    shown = Chart("<b>{x}", "x", "y", [Series("</text><script>", [(0, 1), (1, 2)]), Series("b", [(0, 2)])]).svg()
    assert "<script" not in shown
    assert "&lt;b&gt;{x}" in shown
