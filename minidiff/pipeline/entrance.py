"""``generate`` and ``steps`` of models that read a prompt: the fields of a Request as arguments.

The types that callers see stand in ``entrance.pyi``, which is written from the fields (``python -m
tests.unit.test_request``): what ``generate`` returns depends on ``output``, and a type checker takes only the first
overload of a ParamSpec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.denoise import Run
from minidiff.pipeline.request import Request, asking

if TYPE_CHECKING:
    from PIL import Image


class Entrance(Pipeline):
    """Base class of pipelines that take the fields of a Request as arguments."""

    @asking(Request)
    def generate(self, request: Request) -> list[Image.Image] | Tensor:
        """Generate ``num_images`` pictures for each prompt, in the order of the prompts.

        Takes the fields of :class:`minidiff.Request`, or a Request that is ready and changes to it. Raises
        :class:`ConfigError` for invalid values, before the first model call, and :class:`MinidiffError` if a value
        overflows during the run, naming the module.
        """
        return self._deliver(self.run(request), request.output, request.progress)

    @asking(Request, without=("output", "progress"))
    def steps(self, request: Request) -> Run:
        """Return the denoising of :meth:`generate` as an iterator with one :class:`Step` per model call.

        Arguments are checked and the prompt and the image are encoded before it returns. ``x`` of the last step holds
        the finished latents, (B, C, height / 8, width / 8); :meth:`decode` turns them into pixels.
        """
        return self.run(request)
