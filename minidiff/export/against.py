"""``minidiff parity MODEL --against``: an export, or another variant of the networks, held against the model.

Each network is compared alone on random inputs: layer by layer where that is possible (torch.export keeps the modules;
of an ONNX graph the values behind each module are outputs of the run; of an AOTInductor package only the outputs can be
seen), and then the whole pipeline runs on the other networks, from the prompt to the pixels, beside the model's own.

A variant is a function, ``MODULE:FUNCTION``, that takes the pipeline and returns networks by the names of the parts
that they replace: quantised, compiled, or written anew.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.errors import CheckpointError
from minidiff.export.formats import Runner, blaming, hush
from minidiff.export.manifest import Export, open_export
from minidiff.export.onnx_layers import Layers
from minidiff.export.programs import Program, Tensors, programs
from minidiff.export.stand_ins import standing_in
from minidiff.export.variants import is_function, variant
from minidiff.parity.command import DTYPES, Converter, about_run, request_of, teller
from minidiff.parity.compare_command import show, writable
from minidiff.parity.engine import find
from minidiff.parity.names import module_names
from minidiff.parity.ours import Asked, Ours
from minidiff.parity.report import Report
from minidiff.parity.rows import INPUT, Row
from minidiff.parity.taps import Probe, Tap, in_float64
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.samplers import check_name, sampler_from_config
from minidiff.storage.reading import read_object

Pipe = StableDiffusion | Unconditional
Tell = Callable[[str], None]
Names = Mapping[str, Mapping[str, str]]
"""part -> module's name in minidiff -> its name in the variant."""


@dataclass
class Network:
    """A program's network as a side, the outputs of its modules shown by ``names`` (its own -> the stage's). The inputs
    are not: an export may pass them in another order."""

    title: str
    program: Program
    module: nn.Module
    inputs: Tensors
    names: Mapping[str, str]

    @torch.no_grad()
    def run(self, tap: Tap) -> None:
        """Call the network once."""
        probe = Probe(lambda stage, value: value if stage.endswith(INPUT) else tap(stage, value))
        wide = any(p.dtype == torch.float64 for p in self.module.parameters())
        given = {name: x.double() if wide and x.is_floating_point() else x for name, x in self.inputs.items()}
        with probe.watch(self.module, self.names):
            found = self.program.named(self.module(**given))
        _show(probe, found)

    def wide(self) -> AbstractContextManager[None]:
        """Return a context in which the network is in float64."""
        return in_float64([self.module])


@dataclass
class Outside:
    """A program that runs outside of torch as a side: it can be looked at, but not be given other values."""

    title: str
    call: Callable[[], tuple[Tensors, Tensors]]

    def run(self, tap: Tap) -> None:
        """Run it once, and show its layers and its outputs."""
        layers, outputs = self.call()
        probe = Probe(tap)
        for name, value in layers.items():
            probe.show(name, value)
        _show(probe, outputs)

    def wide(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()


def _show(probe: Probe, outputs: Tensors) -> None:
    for name, value in outputs.items():
        probe.show(f"output {name}", value)


def against(
    pipe: Pipe, other: str | Export, request: Asked, tolerance: float | None = None, names: Names | None = None,
    judge: bool = True, tell: Tell = lambda text: None,
) -> Report:  # fmt: skip
    """Compare ``pipe`` with ``other``: the folder of an export, or ``MODULE:FUNCTION``.

    ``tolerance``: largest difference of a stage, of its largest value; None: the bound of the export's format, for a
    variant 0. ``names``: those of a variant's modules, where they differ. Raises :class:`CheckpointError` for a folder
    that is no export of this model, and :class:`ConfigError` for a function that is not there.
    """
    if isinstance(other, str) and is_function(other):
        parts, title = variant(pipe, other), other
        mine = programs(pipe.config, pipe.parts)
        theirs = programs(pipe.config, {**pipe.parts, **parts})
        bound = tolerance or 0.0
        pairs = zip(mine, theirs, strict=True)
        found = [_networks(a, b.module, names or {}, other, bound, judge, tell) for a, b in pairs if _part(a) in parts]
        replaced: Any = type(pipe)(pipe.config, {**pipe.parts, **parts}, pipe.hash)
    else:
        other = other if isinstance(other, Export) else open_export(other)
        other.require(pipe.identity)
        bound, title = other.bound if tolerance is None else tolerance, f"{other.folder} ({other.to})"
        mine = other.programs_of(pipe.config, pipe.parts)
        runners = {program.name: other.runner(program) for program in mine}
        found = [_exported(other, one, runners[one.name], title, bound, judge, tell) for one in mine]
        replaced = standing_in(pipe, runners)
    replaced.source = pipe.identity  # networks of quantised layers hold what is no tensor, and have no identity
    layers_too = not isinstance(other, Export) or other.to == "torch"
    found.append(_within("", _runs(pipe, replaced, request, title, bound, tell), local=layers_too))
    rows, only_a, only_b = ([x for part in column for x in part] for column in zip(*found, strict=True))
    return Report("minidiff", title, rows, bound, only_a, only_b)


Found = tuple[list[Row], list[str], list[str]]


def _exported(
    export: Export, program: Program, runner: Runner, title: str, bound: float, judge: bool, tell: Tell
) -> Found:
    if export.to == "torch":
        with blaming(export.path(program.name), f"run layer by layer as the model's {program.name}"):
            opened = torch.export.unflatten(torch.export.load(export.path(program.name)))
            return _networks(program, opened, {}, title, bound, judge, tell)
    inputs = program.example(*program.sizes[0], seed=1)
    names: Mapping[str, str] = {}
    if export.to == "onnx":
        layers = Layers(export.path(program.name), program, module_names(program.module))
        names = layers.names
        other = Outside(title, lambda: layers.run(inputs))
    else:
        other = Outside(title, lambda: ({}, runner(inputs)))
    mine = Network("minidiff", program, program.module, inputs, {name: name for name in names})
    return _within(program.name, find(mine, _Once(other), bound, judge=False, tell=tell), local=False)


def _networks(
    program: Program, module: nn.Module, names: Names, title: str, bound: float, judge: bool, tell: Tell
) -> Found:
    """Compare two networks that torch runs, layer by layer."""
    prefix = next(name for name, _ in program.module.named_children())
    told = {f"{prefix}.{a}": f"{prefix}.{b}" for a, b in names.get(_part(program), {}).items()}
    have = set(module_names(module))
    for theirs in told.values():
        check(theirs in have, f"names: {title} has no module {theirs.removeprefix(prefix + '.')!r}")
    inputs = program.example(*program.sizes[0], seed=1)
    pairs = told or {name: name for name in module_names(program.module) if name in have}
    single = _single(module, inputs, pairs.values())
    pairs = {x: y for x, y in pairs.items() if y in single}
    a = Network("minidiff", program, program.module, inputs, {x: x for x in pairs})
    b = Network(title, program, module, inputs, {y: x for x, y in pairs.items()})
    return _within(program.name, find(a, b, bound, judge=judge, tell=tell))


@torch.no_grad()
def _single(module: nn.Module, inputs: Tensors, names: Iterable[str]) -> set[str]:
    """Return those modules that return one tensor. A block that adds to a list of skips has none in an export, where
    the skips are further outputs."""
    found: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda part, args, out: found.add(name) if isinstance(out, Tensor) else None

    with ExitStack() as stack:
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_hook(note(name)).remove)
        module(**inputs)
    return found


def _part(program: Program) -> str:
    return "vae" if program.name.startswith("vae_") else program.name


class _Once:
    """A side whose values can't be replaced: it is run once, and what it showed is shown again."""

    def __init__(self, inner: Outside) -> None:
        self.title, self.inner = inner.title, inner
        self.tape: list[tuple[str, Tensor]] = []

    def run(self, tap: Tap) -> None:
        """Show every stage."""
        if not self.tape:
            self.inner.run(lambda stage, value: self.tape.append((stage, value)) or value)  # type: ignore[func-returns-value]
        for stage, value in self.tape:
            tap(stage, value)

    def wide(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()


def _within(name: str, found: Found, local: bool = True) -> Found:
    """Return rows and stages under the name of their program. Without ``local`` there are no differences on equal
    inputs: a layer that runs outside of torch has none, and a run that has some would hide it from the verdict."""
    rows, only_a, only_b = found
    under = f"{name}/" if name else ""
    rows = [replace(row, stage=f"{under}{row.stage}", local=row.local if local else None) for row in rows]
    return rows, [f"{under}{stage}" for stage in only_a], [f"{under}{stage}" for stage in only_b]


def _runs(pipe: Pipe, other: Pipe, request: Asked, title: str, bound: float, tell: Tell) -> Found:
    """Compare whole runs, without layers."""
    none: Names = {part: {} for part in pipe.parts}
    a, b = (Ours(one, request, none, lambda scope: False, name) for one, name in ((pipe, "minidiff"), (other, title)))
    return find(a, b, bound, judge=False, tell=tell)


def read_names(path: str) -> Names:
    """Read a JSON file with the names of a variant's modules. Raises :class:`CheckpointError` for another content."""
    found = read_object(Path(path))
    for part, names in found.items():
        texts = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
        if not texts:
            raise CheckpointError(f"{path}: {part!r} should be an object of names, minidiff's to the variant's")
    return found


def run(args: Namespace, converter: Converter, device: torch.device) -> int:
    """Compare what ``--against`` names with a checkpoint; print the report, return the exit status."""
    html, tell = writable(args.html, args), teller(args.quiet)
    other = args.against if is_function(args.against) else open_export(args.against)
    names = None if args.names is None else read_names(args.names)
    pipe = converter.open_model(args.checkpoint, device, DTYPES[args.dtype])
    request = request_of(args, pipe, converter)
    if args.sampler is not None:
        request = replace(request, sampler=sampler_from_config({"name": check_name(args.sampler, settable=False)}))
    hush()
    report = against(pipe, other, request, args.tolerance, names, args.judge, tell)
    about = {"model": f"{args.checkpoint} ({pipe.config.family})", **about_run(pipe, request, args)}
    return show(replace(report, about=about), args, html)
