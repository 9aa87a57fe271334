"""Answers of the panel of timesteps: short questions, each with the numbers of this run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minidiff.explain.collect import Seen
from minidiff.explain.panel import answer
from minidiff.explain.visits import STRENGTHS, Entry, Habit, grids, landing_sigma, planned, steps_of
from minidiff.page.html import Child, Html, table
from minidiff.page.languages import say, words
from minidiff.samplers.method import Plan

WORDS = words(__package__, "timesteps_answers.json")


def first(seen: Seen) -> list[Html]:
    """Answer why it begins where it begins, and what the offset is for."""
    total, n = len(seen.pipe.schedule), steps_of(seen)
    found = {name: t[0] for name, t in grids(total, n).items()}
    said: dict[str, object] = {"total": total, "last": total - 1, "n": n, "apart": total // n}
    said |= {"leading": found["leading"], "offset": found["leading + 1"], "trailing": found["trailing"]}
    parts = [say(WORDS["first"], "p", None, linspace=found["linspace"], **said), _own(seen)]
    plain, moved = (planned(seen, "ddim", steps_offset=k) for k in (0, 1))
    offset = []
    if plain is not None and moved is not None:
        ends = {f"{name} {end}": f"{float(value):.6g}" for name, end, value in _last(("a", plain), ("b", moved))}
        offset = [say(WORDS["offset"], "p", None, **{key.replace(" ", "_"): value for key, value in ends.items()})]
    return [
        answer("q-first-timestep", WORDS["first?"], *parts),
        answer("q-offset", WORDS["offset?"], *offset),
    ]


def _last(*plans: tuple[str, Plan[Any]]) -> list[tuple[str, str, float]]:
    rows = [(name, (plan.timesteps[-1], plan.levels.here[-1], plan.levels.to[-1])) for name, plan in plans]
    return [(name, end, float(v)) for name, row in rows for end, v in zip(("t", "from", "to"), row, strict=True)]


def _own(seen: Seen) -> Html:
    """Return the settings of this run's sampler, in words."""
    like, spacing = seen.recipe.get("like"), getattr(seen.sampler, "spacing", None)
    if like:
        return say(WORDS["own like"], "p", like=like, first=f"{seen.frames[0].t:g}")
    if spacing is None:
        return say(WORDS["own other"], "p", first=f"{seen.frames[0].t:g}")
    offset, curve = getattr(seen.sampler, "steps_offset", 0), getattr(seen.sampler, "sigma_spacing", "timesteps")
    if curve != "timesteps":
        return say(WORDS["own curve"], "p", curve=curve, first=f"{seen.frames[0].t:g}")
    return say(WORDS["own"], "p", spacing=spacing, offset=offset, first=f"{seen.frames[0].t:g}")


def twice(seen: Seen) -> list[Html]:
    """Answer why a run of 50 steps may call the model 51 times."""
    pndm, heun = planned(seen, "pndm"), planned(seen, "heun")
    parts = [say(WORDS["calls"], "p", n=steps_of(seen), k=len(seen.plan), made=len(seen.frames))]
    if pndm is not None and len(pndm) > 2:
        head = [f"{float(t):g}" for t in pndm.timesteps[:4]]
        parts.append(
            say(
                WORDS["pndm"],
                "p",
                n=steps_of(seen),
                k=len(pndm),
                head=", ".join([*head, *("…" for _ in range(len(pndm) > 4))]),
                again=head[1],
            )
        )
        kinds = [str(kind) for kind in pndm.rows.call[:4]]
        names = [say(WORDS["row"]), say(WORDS["told"]), say(WORDS["kind"])]
        parts.append(table(names, [[k, head[k], kinds[k]] for k in range(len(head))]))
    if heun is not None:
        parts.append(say(WORDS["heun"], "p", n=steps_of(seen), k=len(heun)))
    return [answer("q-timestep-twice", WORDS["twice?"], *parts)]


def names(seen: Seen) -> list[Html]:
    """Three names of one noise level, and what diffusers calls beta_prod."""
    frame = seen.frames[len(seen.frames) // 2]
    plan, i = seen.plan, frame.i
    level = float(plan.alpha_bars[i])
    signal, noise = float(plan.signal[i]), float(plan.noise[i])
    ratio = signal / noise if noise else float("inf")
    lines: list[list[Child]] = [
        ["t", f"{frame.t:g}", say(WORDS["is t"])],
        ["alpha_bar", f"{level:.5f}", say(WORDS["is alpha_bar"])],
        ["signal = √alpha_bar", f"{signal:.5f}", say(WORDS["is signal"])],
        ["noise = √(1 − alpha_bar)", f"{noise:.5f}", say(WORDS["is noise"])],
        ["sigma = noise / signal", f"{noise / signal:.5f}" if signal else "∞", say(WORDS["is sigma"])],
        ["SNR = 1 / sigma²", f"{ratio**2:.6g}", say(WORDS["is snr"])],
    ]
    shown = table([say(WORDS["name"]), say(WORDS["here"]), say(WORDS["meaning"])], lines, cls="texts")
    found = [answer("q-sigma-alpha-timestep", WORDS["names?"], say(WORDS["names"], "p", call=_call(seen, i)), shown)]
    t = min(max(round(frame.t), 1), len(seen.pipe.schedule) - 1)
    alpha_bar = seen.pipe.schedule.alphas_cumprod.cpu().double()
    betas = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    product = float(betas[: t + 1].log10().sum())
    said = {"t": t, "beta": f"{float(betas[t]):.6f}", "one": f"{1 - float(alpha_bar[t]):.6f}"}
    found.append(answer("q-beta-prod", WORDS["beta?"], say(WORDS["beta"], "p", None, product=f"{product:.0f}", **said)))
    return found


def _call(seen: Seen, i: int) -> int:
    return [frame.i for frame in seen.frames].index(i) + 1


def after(seen: Seen) -> list[Html]:
    """Answer what comes after the last row: the negative timestep, and where the last step lands."""
    own = seen.plan.levels.landing
    past = seen.plan if own is not None and int(own[-1]) < 0 else planned(seen, "ddim")
    negative = []
    if past is not None and past.levels.landing is not None:
        rows = range(max(0, len(past) - 3), len(past))
        lines: list[list[Child]] = [
            [f"{float(past.timesteps[i]):g}", int(past.levels.landing[i]), f"{_to(past, i):.6f}"] for i in rows
        ]
        heads = [say(WORDS["told"]), say(WORDS["lands"]), say(WORDS["level there"])]
        last, minus, apart = past.timesteps[-1], int(past.levels.landing[-1]), len(seen.pipe.schedule) // steps_of(seen)
        told = {"last": f"{float(last):g}", "minus": minus, "apart": apart, "to": f"{_to(past, -1):.6f}"}
        said = say(WORDS["negative" if float(last) - minus == apart else "negative next"], "p", None, **told)
        negative = [said, table(heads, lines)]
    end, whole = landing_sigma(seen.plan), seen.frames[-1].i == len(seen.plan) - 1
    ended = say(WORDS["last" if whole else "not last"], "p", sigma=f"{end:.6g}", t=f"{seen.frames[-1].t:g}")
    return [
        answer("q-negative-timestep", WORDS["negative?"], *negative),
        answer("q-last-step", WORDS["last?"], ended, say(WORDS["last ways"], "p")),
    ]


def _to(plan: Plan[Any], i: int) -> float:
    return float(plan.levels.to[i])


def habits(seen: Seen, others: Mapping[str, Habit]) -> list[Html]:
    """Other programs with the same sampler and number of steps."""
    lines: list[list[Child]] = []
    for name, habit in others.items():
        if habit.why:
            continue
        t = [f"{value:.5g}" for value in habit.timesteps]
        shown = ", ".join(t if len(t) <= 4 else [*t[:2], "…", *t[-1:]])
        sigmas = f"{habit.sigmas[0]:.5g} … {habit.sigmas[-1]:.4g} → {habit.last:.4g}"
        lines.append([name, len(t), shown, sigmas, f"{habit.first:.6g}"])
    missing = [name for name, habit in others.items() if habit.why]
    heads = [say(WORDS[name]) for name in ("program", "model calls", "timesteps", "sigmas", "first noise")]
    parts = [say(WORDS["programs"], "p"), table(heads, lines)]
    if missing:
        parts.append(say(WORDS["without"], "p", missing=", ".join(missing)))
    return [answer("q-programs-differ", WORDS["programs?"], *parts)]


def strength(seen: Seen, starts: Mapping[str, Sequence[Entry]]) -> list[Html]:
    """From strength to a number of steps."""

    def cell(entry: Entry) -> str | Html:
        if entry.why or entry.first is None:
            return "–" if entry.why else "0"
        return say(WORDS["entry" if entry.calls != 1 else "entry one"], calls=entry.calls, first=f"{entry.first:.5g}")

    lines: list[list[Child]] = [[name, *(cell(entry) for entry in row)] for name, row in starts.items()]
    heads = [say(WORDS["program"]), *(f"strength {value:g}" for value in STRENGTHS)]
    parts = [say(WORDS["strength"], "p"), table(heads, lines)]
    asked = seen.recipe.get("strength")
    if asked is not None:
        said = {"strength": f"{asked:g}", "calls": len(seen.frames), "k": len(seen.plan)}
        parts.append(say(WORDS["own strength"], "p", None, first=f"{seen.frames[0].t:g}", **said))
    return [answer("q-strength", WORDS["strength?"], *parts)]


def elsewhere(seen: Seen) -> list[Html]:
    """Inversion, and sampling by another method than that of training."""
    inverse, found = planned(seen, "ddim_inverse"), []
    if inverse is not None:
        told, before = inverse.timesteps.tolist(), inverse.levels.here.tolist()
        lines: list[list[Child]] = [
            [k + 1, told[k], f"{before[k]:.6f}", f"{_to(inverse, k):.6f}"] for k in range(min(3, len(told)))
        ]
        heads = [say(WORDS[name]) for name in ("row", "told", "level before", "level there")]
        apart = len(seen.pipe.schedule) // steps_of(seen)
        text = say(WORDS["inversion"], "p", apart=apart, begin=f"{before[0]:.6f}")
        found.append(answer("q-inversion", WORDS["inversion?"], text, table(heads, lines)))
    frame = seen.frames[len(seen.frames) // 2]
    table_of_training = seen.pipe.schedule.alphas_cumprod
    near = min(max(round(frame.t), 0), len(table_of_training) - 1)
    said = {"t": f"{frame.t:g}", "run": f"{float(seen.plan.alpha_bars[frame.i]):.6f}", "near": near}
    text = say(WORDS["other method"], "p", None, trained=f"{float(table_of_training[near]):.6f}", **said)
    return [*found, answer("q-ddpm-ddim", WORDS["other method?"], text)]
