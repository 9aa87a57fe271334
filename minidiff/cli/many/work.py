"""The share of one process: what to make, with which model, and what to do with a group that fails."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from minidiff.cli.many import job as jobs
from minidiff.cli.many.groups import Group, Picture, batch, finished, groups, shared
from minidiff.cli.many.job import FILE, Job
from minidiff.cli.output import Output
from minidiff.console import say, show
from minidiff.console.progress import Counter
from minidiff.errors import ConfigError, MinidiffError
from minidiff.version import VERSION

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.request import Request
    from minidiff.training.ranks import Alone

T = TypeVar("T")


class Maker(NamedTuple):
    """A model that is ready, and a function from fields to the Request that it is given."""

    pipe: StableDiffusion | Unconditional
    request: Callable[[Mapping[str, Any]], Request]


def agreed(ranks: Alone, decide: Callable[[], T]) -> T:
    """Return what the first process decides, in all of them. Its error ends them all, and is reported once."""
    told: Any = None
    try:
        told = decide() if ranks.main else None
    except (MinidiffError, OSError) as e:
        told = e
    told = ranks.same(told)
    if isinstance(told, Exception):
        if ranks.main:
            raise told
        raise SystemExit(2)
    found: T = told
    return found


@dataclass
class Work:
    """The work of this process. ``broken``: what is wrong with a line, by number."""

    args: Namespace
    ranks: Alone
    output: Output
    broken: dict[int, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of the pictures and of the job's file."""
        return self.output.folder

    def there(self, name: str) -> bool:
        """Return True if a picture of that name is finished."""
        return os.path.lexists(self.folder / name)

    def claim(self, stack: ExitStack, wanted: Job, *, seeded: bool) -> Job | None:
        """Lock the folder, and return the job that was begun in it; None if there is none.

        Raises :class:`ConfigError` for another job than ``wanted``. ``seeded``: the seeds count as well.
        """
        from minidiff.training.run import claimed

        stack.enter_context(claimed(self.folder))
        before = jobs.load(self.folder)
        if before is not None:
            same = ("lines", "options", "names", *(["seeds"] if seeded else []))
            jobs.check_same(before, wanted, self.folder, same)
            if self.args.together not in (None, before.together):
                raise ConfigError(f"{self.folder / FILE}: was begun with --together {before.together}; leave it out")
        return before

    def all(self, found: list[Picture], before: Job | None, wanted: Job, opened: Callable[[], Maker]) -> None:
        """Make this process's share of the pictures."""
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)  # on another machine it may be another folder
        threads = self.ranks.same(wanted.threads or torch.get_num_threads())
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
            if before is not None and not self.args.quiet:
                say(f"{self.folder / FILE}: {threads} threads a process, as it was begun")
        maker = opened()
        here = replace(wanted, threads=threads, model=self.model(maker), place=where(maker))
        job = agreed(self.ranks, lambda: self.decided(before, here, found, maker))
        if not self.ranks.main:  # on another machine it may be another file
            jobs.check_same(job, here, self.folder, ("model",))
        if job.place != here.place:
            say(f"{self.folder / FILE}: begun on {job.place}, this is {here.place}; pixels may differ", "warning")
        made = groups(found, job.together)
        done = {k for k, group in enumerate(made) if finished(group, self.there)}
        done = set().union(*self.ranks.gathered(done))
        left = [group for k, group in enumerate(made) if k not in done]
        if done and not self.args.quiet:
            kept = len(found) - sum(map(len, left))
            say(f"{kept} of {len(found)} pictures are finished already")
        mine = left[self.ranks.rank :: self.ranks.count]
        with Counter(sum(map(len, mine)), "picture", show=not self.args.quiet) as counter:
            for group in mine:
                self.make(group, maker)
                counter.count(items=len(group))

    def model(self, maker: Maker) -> tuple[str, ...]:
        """Return the identity of the model, and the hashes of adapters and controls."""
        controls = maker.request({"prompt": ""}).controls if self.args.control else None
        added = [control.model.identity for control in controls or ()]
        return (maker.pipe.identity, *(hash for _, _, hash in maker.pipe.parts.adapters), *added)

    def decided(self, before: Job | None, here: Job, found: list[Picture], maker: Maker) -> Job:
        """Return the job: the one that was begun, or a new one, which is written."""
        if before is not None:
            jobs.check_same(before, here, self.folder, ("model",))
            return before
        taken = next((picture.name for picture in found if self.there(picture.name)), None)
        if taken is not None:
            raise ConfigError(f"{self.folder / taken}: exists, and no {FILE} that says how; name another folder")
        job = replace(here, together=self.args.together or self.measured(found, maker))
        jobs.save(job, self.folder)
        return job

    def measured(self, found: list[Picture], maker: Maker) -> int:
        """Return the size of groups for this machine's memory, by the largest picture that shares its group."""
        from minidiff.cli.many.memory import MOST, at_once

        kinds: list[Picture] = []
        for group in groups(found, MOST):
            if len(group) > 1 and all(shared(group[0]) != shared(kind) for kind in kinds):
                kinds.append(group[0])
        sides = [maker.pipe.unet.config.sides[k] * getattr(maker.pipe.config.vae, "factor", 1) for k in (0, 1)]
        kinds.sort(key=lambda p: -(p.asked.get("height") or sides[0]) * (p.asked.get("width") or sides[1]))
        for kind in kinds:
            try:
                return at_once(maker.pipe, maker.request(batch([kind])))
            except (MinidiffError, OSError):  # a broken line, which is told in its turn
                continue
        return 1

    def make(self, group: Group, maker: Maker) -> None:
        """Make a group; one that fails is made picture by picture, so that the fault stays with its line."""
        from minidiff.pipeline.png import label, to_pil

        if finished(group, self.there):
            return
        try:
            run = maker.pipe.run(maker.request(batch(group)))
            pixels = maker.pipe.finish(run, progress=False)
        except (MinidiffError, OSError) as e:
            if len(group) == 1:
                self.broken.setdefault(group[0].line, str(e))
            else:
                for one in group:
                    self.make([one], maker)
            return
        for picture, image, recipe in zip(group, to_pil(pixels), run.recipes, strict=True):
            if not self.there(picture.name):  # a finished file is kept
                show(self.output.write(label(image, recipe), self.folder / picture.name, "refuse"))


def where(maker: Maker) -> str:
    """Return what the bits depend on beside the job: dtype, device, versions."""
    import torch

    dtype = str(maker.pipe.dtype).removeprefix("torch.")
    return f"{maker.pipe.device.type}, {dtype}, minidiff {VERSION}, torch {torch.__version__}"
