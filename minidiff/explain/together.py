"""Several runs of one request, by other samplers, whose model calls are made together.

A call of a small network costs more than its arithmetic, and a UNet takes a timestep for each picture of its batch. So
the runs go on side by side, each at its own noise level: every round makes one call for all of them. A batch of another
size changes results by rounding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from minidiff.models.unet import UNet
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.pipeline.job import Job
from minidiff.pipeline.request import Request

SMALL = 32 * 32 * 4  # numbers of a sample up to which calls are made together: a larger one keeps the processor busy

Trail = Generator[tuple[Tensor, Tensor], Tensor, Tensor]


@torch.no_grad()
def results(pipe: StableDiffusion | Unconditional, requests: Sequence[Request]) -> list[tuple[Tensor, int]]:
    """Return the last sample (1, C, h, w) and the number of model calls of each request. They are requests for one
    picture from noise, and differ in sampler, steps and seed only; ``pipe`` has no approximations, which keep something
    from call to call.

    Raises :class:`ConfigError` for a sampler that cannot run the model.
    """
    own = copy(pipe)
    own.unet = cast(UNet, _Each(pipe.unet))
    jobs = [own.job(request) for request in requests]
    if any(job.instead or job.x.numel() > SMALL for job in jobs):  # calls that are conditioned each in its own way
        for job in jobs:
            job.done()
        runs = [pipe.run(request) for request in requests]
        return [(run.last().x, len(run)) for run in runs]
    trails = dict(enumerate(map(_trail, jobs)))
    asked = {k: next(trail) for k, trail in trails.items()}
    found: dict[int, Tensor] = {}
    count, predict = 1, jobs[0].predict
    while asked:
        shown, t = zip(*asked.values(), strict=True)
        if len(asked) != count:
            count = len(asked)
            predict = own.job(replace(requests[0], num_images=count, latents=None, seed=0)).predict
        out = predict(torch.cat(shown), torch.stack([each.float() for each in t])).out
        for k, one in zip(tuple(asked), out.unsqueeze(1), strict=True):
            try:
                asked[k] = trails[k].send(one)
            except StopIteration as end:
                del asked[k]
                found[k] = end.value
    return [(found[k], len(job.rows)) for k, job in enumerate(jobs)]


def _trail(job: Job) -> Trail:
    """Run a job, and yield what the model is asked at each row, the scaled sample and the timestep; the prediction is
    sent in. Return the last sample."""
    plan, sampler, x = job.plan.to(job.x.device), job.sampler, job.x
    state = sampler.start()
    for i in job.rows:
        out = yield sampler.scale_input(plan, i, x), plan.timesteps[i]
        x, state = sampler.step(plan, i, x, out, state, job.draw)
    return x


class _Each:
    """A UNet that is called with a timestep for each picture, also where pictures come twice, without and with the
    prompt."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(self, x: Tensor, t: Tensor, *more: Any) -> Tensor:
        out: Tensor = self.unet(x, t.repeat(len(x) // len(t)), *more)
        return out
