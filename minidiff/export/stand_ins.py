"""Networks that compute by an export, in the places of a model's own, so that a whole pipeline runs on them.

Everything that a stand-in does not compute (its config, its dtype and device) it takes from the network that it stands
for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.errors import UnsupportedError
from minidiff.export.formats import Runner
from minidiff.models.clip import TextOutput
from minidiff.models.vae import DiagonalGaussian
from minidiff.pipeline import StableDiffusion, Unconditional

Pipe = StableDiffusion | Unconditional


class StandIn(nn.Module):
    """Base class: ``runners`` by the program's name, and ``own``, the network that this stands for."""

    def __init__(self, own: nn.Module, runners: Mapping[str, Runner]) -> None:
        super().__init__()
        self.__dict__.update(own=own, runners=runners)  # not as a module inside this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["own"], name)

    def parameters(self, recurse: bool = True) -> Any:
        """Return the weights of the network that this stands for."""
        return self.own.parameters(recurse)


class UNetStandIn(StandIn):
    """Stand-in for a UNet."""

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
        residuals: Any = None,
        features: Any = None,
    ) -> Tensor:
        if residuals is not None or features is not None:
            raise UnsupportedError("an exported UNet has no inputs for controls; run it without")
        pooled, sizes = (None, None) if added is None else added
        told = torch.as_tensor(t, dtype=torch.float32).expand(x.shape[0]).contiguous()
        given = {"x": x, "t": told, "context": context, "pooled": pooled, "sizes": sizes, "guidance": guidance}
        out: Tensor = self.runners["unet"]({k: v for k, v in given.items() if v is not None})["out"]
        return out


class VAEStandIn(StandIn):
    """Stand-in for an autoencoder."""

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(**self.runners["vae_encoder"]({"pixels": pixels}))

    def decode(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.runners["vae_decoder"]({"latents": z})["pixels"]
        return pixels


class TextStandIn(StandIn):
    """Stand-in for the text encoder of that name. Whatever layer is read, it is the one that was exported."""

    def __init__(self, own: nn.Module, runners: Mapping[str, Runner], name: str) -> None:
        super().__init__(own, runners)
        self.name = name

    def forward(self, ids: Tensor, skip: int = 0, seen: Tensor | None = None) -> TextOutput:
        if skip or seen is not None:
            raise UnsupportedError("an exported text encoder gives one layer, for prompts without a style; run it so")
        found = self.runners[self.name]({"ids": ids})
        return TextOutput(found["context"], found["context"], found["pooled"])


def standing_in(pipe: Pipe, runners: Mapping[str, Runner]) -> Pipe:
    """Return a pipeline like ``pipe`` whose networks are the exported programs."""
    parts: dict[str, nn.Module] = dict(pipe.parts)
    for name, own in pipe.parts.items():
        if name == "unet":
            parts[name] = UNetStandIn(own, runners)
        elif name == "vae":
            parts[name] = VAEStandIn(own, runners)
        else:
            parts[name] = TextStandIn(own, runners, name)
    return type(pipe)(pipe.config, parts, pipe.hash)
