"""A run as pictures: what the model expects to see in the end, and the noisy sample, at some of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.denoise import Run, Step
from minidiff.pipeline.montage import table
from minidiff.pipeline.png import to_pil

if TYPE_CHECKING:
    from PIL import Image


class Film:
    """Collector of a run's steps; call it with each :class:`Step`.

    ``count``: number of steps that are kept, at equal distances, the last one among them.
    """

    def __init__(self, pipe: Pipeline, run: Run, count: int) -> None:
        self.pipe, self.run = pipe, run
        count = min(count, len(run))
        self.rows = [run.rows[(k + 1) * len(run) // count - 1] for k in range(count)]
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, step: Step) -> None:
        """Keep the step if it is one of those chosen; samplers without an estimate x0 give the sample in its place."""
        if step.i in self.rows:
            x0 = step.x0
            self.kept[step.i] = ((step.x if x0 is None else x0).clone(), self.visible(step).clone())

    def visible(self, step: Step) -> Tensor:
        """Return the sample as the model sees it next, about as large as a picture's; some methods' own is larger."""
        job = self.run.job
        later = step.i + 1
        if job is None or later >= len(self.run.plan):
            return step.x
        return job.sampler.scale_input(job.plan.to(step.x.device), later, step.x)

    def frames(self) -> list[list[Image.Image]]:
        """Return the estimates x0 as pictures, for each picture of the batch."""
        return _by_picture([to_pil(self.pipe.decode(x0)) for x0, _ in self.kept.values()])

    def strips(self) -> list[Image.Image]:
        """Return, for each picture of the batch, x0 above x at the steps that were kept, labelled."""
        noisy = _by_picture([to_pil(self.pipe.decode(x)) for _, x in self.kept.values()])
        places = [self.run.rows.index(i) + 1 for i in self.kept]
        labels = [f"step {place} of {len(self.run)}" for place in places]
        return [table([above, below], labels, ["x0", "x"]) for above, below in zip(self.frames(), noisy, strict=True)]


def _by_picture(steps: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    return [list(pictures) for pictures in zip(*steps, strict=True)]
