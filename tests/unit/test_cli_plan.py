"""``minidiff plan``: the table of a sampler's steps, of minidiff's own and of other programs."""

from __future__ import annotations

from tests.support.command import Run, one_error


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
