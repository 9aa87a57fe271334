"""Ways to do one piece of work: plain, with each switch, in diffusers, compiled, by OpenVINO."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _bench import in_turn, progress
from _works import Work, timed
from torch import Tensor, nn

from minidiff import fast
from minidiff.fast.switch import put_on
from minidiff.fast.trial import choices

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}  # in OpenVINO's words


@dataclass
class Way:
    """Way to do the work. ``before`` and ``after`` set it up and undo that, and are not timed."""

    name: str
    run: Callable[[], Tensor]
    before: Callable[[], Any] = lambda: None
    after: Callable[[], Any] = lambda: None


def ours(work: Work) -> Iterator[Way]:
    """Return the plain model, each switch by itself, and all together."""
    names = tuple(fast.SWITCHES)
    for some in dict.fromkeys(((), *((name,) for name in names), names)):
        yield switched(work, some)


def switched(work: Work, names: tuple[str, ...]) -> Way:
    """Return the model with these switches on, those that this processor gains by, with the kernels chosen for it."""
    on: list[tuple[str, list[nn.Module]]] = []

    def before() -> None:
        for name in names:
            switch = fast.SWITCHES[name].fit(taken(work))
            on.append((name, [] if switch is None else put_on(switch, [work.ours])))
        if names:
            work.ours(*work.inputs)  # weights are packed, and the prompt is remembered, at the first call

    def after() -> None:
        while on:
            name, layers = on.pop()
            for layer in layers:
                fast.SWITCHES[name].take_off(layer)

    return Way(f"minidiff, {'+'.join(names) or 'plain'}", lambda: work.ours(*work.inputs), before, after)


def taken(work: Work) -> dict[str, str]:
    """Return what was tried as the fastest on this processor, by name; tried now if it was not before."""
    some = next(work.ours.parameters())
    return choices(some.dtype, measure=True) if some.device.type == "cpu" else {}


def eager(work: Work, theirs: nn.Module) -> Way:
    return Way("diffusers, eager", lambda: theirs(*work.inputs))


def frozen(name: str, module: nn.Module, work: Work) -> Way:
    """Compile with frozen weights, which may be folded and packed."""
    from torch._inductor import config

    compiled = torch.compile(module, dynamic=False)

    def run() -> Tensor:
        with config.patch(freezing=True):  # read when the first call compiles
            out: Tensor = compiled(*work.inputs)
        return out

    return Way(f"{name}, compiled with freezing", run)


def openvino(work: Work, dtype: torch.dtype) -> Way:
    """Convert the UNet to OpenVINO in memory. It takes float32 weights and chooses its own precision inside,
    which it is only asked for."""
    import openvino as ov

    source = work.ours if dtype == torch.float32 else copy.deepcopy(work.ours).float()
    example = tuple(t.float() if t.is_floating_point() else t for t in work.inputs)
    with warnings.catch_warnings():  # torch no longer recommends the tracing that OpenVINO does
        warnings.simplefilter("ignore")
        model = ov.convert_model(source, example_input=example)
    asked = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(model, "CPU", asked)
    inputs = [t.numpy() for t in example]
    got = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return Way(f"OpenVINO, {got}", lambda: torch.from_numpy(compiled(inputs)[0].copy()))


@dataclass
class Found:
    """Cost of a way's first call, which may pack or compile, and distance of its result from the plain one: the norm
    of the difference, of the plain one's norm."""

    first: float
    difference: float


def tried(ways: list[Way], plain: Tensor, device: torch.device) -> dict[str, Found]:
    """Try every way once, outside the rounds."""
    found = {}
    for way in ways:
        outs: list[Tensor] = []
        way.before()
        seconds = timed(lambda way=way, outs=outs: outs.append(way.run()), device)
        way.after()
        gap = (outs[0].cpu().double() - plain.cpu().double()).norm() / plain.cpu().double().norm()
        found[way.name] = Found(seconds, gap.item())
        progress(f"{way.name}: first call {seconds:.3f} s")
    return found


def measured(ways: list[Way], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each call, by way; every way runs once a round."""
    named = {way.name: way for way in ways}

    def run(name: str) -> float:
        way = named[name]
        way.before()
        seconds = timed(way.run, device)
        way.after()
        progress(f"{name}: {seconds:.3f} s")
        return seconds

    return in_turn(list(named), rounds, run)
