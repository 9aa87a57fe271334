"""Report of a comparison: as data (rows, the first difference, the others), and as a table for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from minidiff.parity.difference import Difference
from minidiff.parity.rows import INPUT, Row

OUTPUT = "output"  # the output of a module that is compared alone; "unet/output out" is one of several
RUNS = re.compile(
    r"(prompt|negative|text\.\d+|plan|encode|start|step\.\d+|decode)/[^/]*"
)  # no layer, a stage of the run
ROUNDING, MOST_LIKELY = 6e-8, 10.0  # relative size of a rounding in float32; growth that is worth a word
AROUND = (4, 8)  # rows shown before and after the first difference

# What to check if a stage that is not a module is the first to differ: (the end of its name, the advice).
PLACES = (
    ("ids", "the tokenizer: its table, padding (SD1 with 49407, SD2 with 0), truncation"),
    ("plan/timesteps", "the plan: spacing, steps_offset, number of steps"),
    ("plan/sigmas", "the plan: spacing of the sigmas, Karras or not, the last one, the dtype of their computation"),
    ("plan/init_noise_sigma", "the plan: the factor of the first noise"),
    ("encode/pixels", "the conversion of a picture to [-1, 1]; the masked one is 0 where the mask is white"),
    ("latents", "from the VAE's encoder to latents: the draw (mean + std * noise), the scaling factor"),
    ("added", "the noise that is added to the picture: its seed, generator, dtype, position in the stream"),
    ("noisy", "the amount of noise added to the picture: the row of the plan (the first is given by the strength)"),
    ("start/x", "the first noise: its seed, generator, dtype, or its factor"),
    ("input", "the sampler's scaling of the UNet's input (scale_input), or the batch for guidance"),
    (
        "/mask",
        "the mask at the latents' size: its threshold, how it is resized (nearest), the order (mask, "
        "then masked picture)",
    ),
    ("/masked", "the masked picture's latents: their position in the noise stream, the scaling factor"),
    ("/pooled", "the pooled text: which encoder, which token, and the order (negative first, then the prompt)"),
    ("/sizes", "SDXL's sizes: height before width; the refiner's score, 6, and 2.5 with the negative prompt"),
    ("/t", "the timestep that the UNet is given"),
    ("context", "the encoded prompts given to the UNet: the layer, and the order (negative first, then the prompt)"),
    ("out", "the guidance: u + scale * (c - u), in this order"),
    ("/x", "the sampler's step: its coefficients, its history, its noise"),
    ("noise", "the noise that the sampler draws"),
    ("pixels", "from the VAE's output to [0, 1]"),
)


@dataclass(frozen=True)
class Report:
    """Comparison of side A with side B. ``about`` describes the run; ``rows`` are the common stages in A's order."""

    a: str
    b: str
    rows: Sequence[Row]
    tolerance: float = 0.0
    only_a: Sequence[str] = ()
    only_b: Sequence[str] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """True if every stage is within the tolerance, each side on its own."""
        return all(row.chained.within(self.tolerance) for row in self.rows)

    @property
    def causes(self) -> list[Row]:
        """Stages that differ beyond the tolerance although their inputs were equal."""
        return [row for row in self.rows if row.local is not None and not row.local.within(self.tolerance)]

    @cached_property
    def first(self) -> Row | None:
        """First difference: the first cause, or (if none was searched, or none is beyond the tolerance by itself) the
        first stage that differs beyond the tolerance. None if the sides are equal."""
        apart = [row for row in self.rows if not row.chained.within(self.tolerance)]
        return (self.causes or apart)[0] if apart else None

    def __str__(self) -> str:
        return text(self)


def section(stage: str) -> str:
    """Return the section of a run that a stage belongs to: "prompt", "plan", "step.0", ...; "network" for a module."""
    head, slash, _ = stage.partition("/")
    return head if slash else "network"


def sections(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by section, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(section(row.stage), []).append(row)
    return found


def outcome(report: Report) -> str:
    """Summarize the comparison in one line."""
    if report.first is not None:
        return f"first difference at {report.first.stage}"
    bound = "every value is equal" if report.tolerance == 0 else f"every stage is within {report.tolerance:g}"
    return f"equal: {bound} at all {len(report.rows)} stages"


def reasons(report: Report) -> dict[str, str]:
    """Return what is known about the first difference; empty if there is none."""
    first = report.first
    if first is None:
        return {}
    shown = first.chained if first.local is None or first.local.within(report.tolerance) else first.local
    found = {"how far": describe(shown), "where": where(report, first)}
    if shown.same_shape and shown.finite and not shown.hashed:
        found["spread"] = spread(shown)
    if first.operation:
        found["operation"] = first.operation
    if first.judgement is not None:
        found["float64"] = judged(first)
    if first.local is None:
        found |= jump(report)
    others = _elsewhere(report)
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        found["also"] = f"on equal inputs these differ too: {', '.join(others[:4])}{more}"
    return found


def jump(report: Report) -> dict[str, str]:
    """Return where the differences grow most from one stage to the next, if that is not the first difference.

    Where nothing is known of equal inputs, it is the best sign of a cause among stages that all differ a little.
    """
    so_far, steepest, most = ROUNDING, MOST_LIKELY, None
    for row in report.rows:
        size = noise(row.chained)
        if size / so_far > steepest:
            steepest, most = size / so_far, (row, so_far, size)
        so_far = max(so_far, size)
    if most is None or most[0] is report.first:
        return {}
    return {"jump": f"the norm of the difference grows most at {most[0].stage}, from {most[1]:.1e} to {most[2]:.1e}"}


def _elsewhere(report: Report) -> list[str]:
    """Return the causes after the first, without those that follow from another.

    That is, without the same place in other steps and the network around a cause.
    """
    found: dict[str, str] = {}
    for row in report.causes:
        found.setdefault(row.stage.partition("/")[2] or row.stage, row.stage)
    told = {"prediction"} if any("/unet/" in stage for stage in found.values()) else set()
    if "start/x" in found.values():  # which diffusers does not accept from outside
        told.add("input")
    return [stage for place, stage in found.items() if place not in told][1:]


def describe(d: Difference) -> str:
    """Describe a difference in one line."""
    if not d.same_shape:
        return f"shape {d.shape_a} in A, {d.shape_b} in B"
    if not d.finite:
        return f"not finite: {d.bad_a:,} NaN in A, {d.bad_b:,} in B, of {d.total:,} values"
    if d.hashed:
        return f"other bits, by the hash; {d.total:,} values"
    dtypes = "" if d.dtype_a == d.dtype_b else f"; {_name(d.dtype_a)} in A, {_name(d.dtype_b)} in B"
    ulps = "" if d.ulps is None else f", {d.ulps:,} ULPs"
    return f"max abs {d.max_abs:.3g}, relative {d.max_rel:.3g}{ulps}; {d.differing:,} of {d.total:,} values{dtypes}"


def spread(d: Difference) -> str:
    """Describe in one line whether all values differ a little, or a few of them much."""
    ulps = "" if d.ulps is None else f"; ULPs: median {d.ulps_median:,}, 99 % at most {d.ulps_99:,}"
    return f"norm {d.norm:.3g} of A's ({_decibels(d)}), correlation {_near_one(d.correlation)}{ulps}"


def _near_one(x: float) -> str:
    return f"1 - {1 - x:.1e}" if 1e-15 < 1 - x < 1e-4 else f"{x:.6g}"


def where(report: Report, row: Row) -> str:
    """Return the kind of a stage, and advice on what to check."""
    stages = [r.stage for r in report.rows]
    k = stages.index(row.stage)
    if row.local is not None and row.local.within(report.tolerance):
        return "no stage is beyond the tolerance by itself: small differences of earlier stages have added up"
    so_far = "equal" if report.tolerance == 0 else "within the tolerance"
    alone = " on equal inputs" if row.local is not None else f", and every stage before it is {so_far}" if k else ""
    if row.stage.endswith(INPUT):
        before = f"between {stages[k - 1]} and it" if k else "before it"
        return f"what reaches this module differs; it is computed {before}, outside of any module that is compared"
    if any(s.startswith(row.stage + ".") for s in stages):
        return f"inside this block, behind {stages[k - 1]}: its own use of the outputs of its modules"
    if RUNS.fullmatch(row.stage):
        place = row.stage.partition("#")[0]
        return next((advice for end, advice in PLACES if place.endswith(end)), f"this stage differs{alone}")
    if row.stage.rpartition("/")[2].partition(" ")[0] == OUTPUT:
        if k == 0 or section(stages[k - 1]) != section(row.stage):
            return f"the whole network's output{alone}; no layer of it is compared"
        return f"the whole module's output, behind {stages[k - 1]}: its own use of the outputs of its modules"
    if row.judgement is not None and row.judgement.same_function:
        return (
            "this module rounds otherwise on equal inputs: another kernel, order of summation, memory layout or dtype"
        )
    return f"this module computes something else{alone}: weights, bias, epsilon, dtype"


def judged(row: Row) -> str:
    """Describe the comparison with float64 in one line."""
    j = row.judgement
    assert j is not None
    if not j.same_function:
        return f"not rounding: in float64 the two still differ, by {j.gap:.3g}, so they compute different functions"
    errors = f"A is {j.error_a:.3g} from the truth (root mean square), B {j.error_b:.3g}"
    alone = "by the judge's recording" if row.local is None else "only one side can run in it"
    same = "rounding: in float64 the two agree" if j.gap is not None else alone
    nearer = "both are equally near" if j.nearer == "both" else f"{j.nearer} is nearer"
    return f"{same}; {errors}: {nearer}"


def text(report: Report, *, every: bool = False) -> str:
    """Format the report for a terminal: the run, a row per section, the rows around the first difference or ``every``
    row."""
    lines = [f"{key:<9} {value}" for key, value in {"A": report.a, "B": report.b, **report.about}.items()]
    lines += ["", *_table(("section", *COLUMNS), [summary(s, rows, report) for s, rows in _grouped(report)])]
    first = report.first
    rows = list(report.rows)
    if first is not None and not every:
        k = rows.index(first)
        rows = rows[max(0, k - AROUND[0]) : k + AROUND[1]]
    if first is not None or every:
        lines += ["", *_table(("stage", *COLUMNS), [line(row, report) for row in rows])]
    for side, only in (("A", report.only_a), ("B", report.only_b)):
        if only:
            lines.append(
                f"\nonly in {side}: {', '.join(only[:4])}{f' and {len(only) - 4} more' if len(only) > 4 else ''}"
            )
    return "\n".join([*lines, "", outcome(report), *(f"  {key:<9} {said}" for key, said in reasons(report).items())])


COLUMNS = ("equal", "max abs", "relative", "ULPs", "SNR", "on equal inputs", "nearer")


def _grouped(report: Report) -> list[tuple[str, list[Row]]]:
    return list(sections(report.rows).items())


def summary(name: str, rows: Sequence[Row], report: Report) -> tuple[str, ...]:
    """Return the row of a section: the number of equal stages, and its largest differences."""
    equal = sum(row.chained.equal for row in rows)
    worst = max(rows, key=lambda row: size(row.chained))
    local = [row for row in rows if row.local is not None]
    most = max((size(row.local) for row in local if row.local is not None), default=None)
    ulps = [row.chained.ulps for row in rows if row.chained.ulps is not None]
    mark = "  <- first difference" if report.first in rows else ""
    loudest = _decibels(max((row.chained for row in rows), key=noise))
    figures = (_figure(worst.chained.max_abs), _figure(size(worst.chained)), f"{max(ulps):,}" if ulps else "-", loudest)
    return (name, f"{equal}/{len(rows)}", *figures, "-" if most is None else _figure(most), mark)


def line(row: Row, report: Report) -> tuple[str, ...]:
    d, j = row.chained, row.judgement
    local = "-" if row.local is None else _figure(size(row.local))
    nearer = "" if j is None else j.nearer if j.same_function else "neither"
    mark = f"{nearer}{'  <- first difference' if row is report.first else ''}"
    shape = "shape" if not d.same_shape else _figure(d.max_abs)
    ulps = "-" if d.ulps is None else f"{d.ulps:,}"
    return (row.stage, "yes" if d.equal else "no", shape, _figure(size(d)), ulps, _decibels(d), local, mark)


def noise(d: Difference) -> float:
    """Return the norm of a difference relative to the values'; NaN counts as infinite."""
    return math.inf if math.isnan(d.norm) else d.norm


def _decibels(d: Difference) -> str:
    return f"{d.snr:.0f} dB" if math.isfinite(d.snr) else "-"


def size(d: Difference) -> float:
    """Return the relative difference; NaN counts as infinite."""
    return math.inf if math.isnan(d.max_rel) else d.max_rel


def _figure(value: float) -> str:
    return "0" if value == 0 else "NaN" if math.isnan(value) else f"{value:.2e}" if math.isfinite(value) else "inf"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if k in (0, len(head) - 1) else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
