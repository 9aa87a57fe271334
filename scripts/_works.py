"""Timed work: one call of a UNet or one decoding with random weights, ours and the reference's.

Both sides are modules that take the same inputs in the same order, and read the same weights: diffusers' model holds
minidiff's tensors under its own names (the key map that exports folders), so both fit into memory, and their results
can be held against each other. Time does not depend on what the weights are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from minidiff.config import SD15, SDXL, VAE_SD, VAE_SDXL, Level, UNetConfig, VAEConfig, text
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = 77


class Family(NamedTuple):
    unet: UNetConfig
    vae: VAEConfig

    @property
    def side(self) -> int:
        """Side of the pictures that the family was trained on."""
        return self.unet.sample_size * self.vae.factor


FAMILIES = {
    "sd15": Family(SD15, VAE_SD),
    "sdxl": Family(SDXL, VAE_SDXL),
    "tiny": Family(  # for trying the scripts out
        replace(SD15, levels=(text(32, 2), Level(channels=64)), mid=text(64, 2), context_dim=32, sample_size=8),
        replace(VAE_SD, channels=(32, 32, 32, 64), layers=1, sample_size=64),
    ),
}


class Work(NamedTuple):
    """``ours(*inputs)`` is what is timed; ``theirs()`` makes the reference's module for the same inputs, ``twin()``
    another of ours, which no switch reaches. All hold the same tensors."""

    ours: nn.Module
    inputs: tuple[Tensor, ...]
    theirs: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]


class OurUNet(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *added: Tensor) -> Tensor:
        out: Tensor = self.model(x, t, context, added or None)
        return out


class TheirUNet(OurUNet):
    def forward(self, x: Tensor, t: Tensor, context: Tensor, *added: Tensor) -> Tensor:
        told = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        out: Tensor = self.model(x, t, context, added_cond_kwargs=told, return_dict=False)[0]
        return out


class OurDecoder(OurUNet):
    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.model.decode(z)
        return out


class TheirDecoder(OurUNet):
    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.model.decode(z, return_dict=False)[0]
        return out


def unet_call(
    family: Family, size: int, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Work:
    """Return the work of one UNet call for ``size`` x ``size`` pixels; ``batch`` 2 is one picture with guidance: the
    same sample twice."""
    c, side = family.unet, size // family.vae.factor
    samples = torch.randn(-(-batch // 2), c.in_channels, side, side).to(device, dtype)
    inputs = [
        torch.cat([samples, samples])[:batch],
        torch.tensor(500).to(device),
        torch.randn(batch, TOKENS, c.context_dim or 1).to(device, dtype),
    ]
    if c.added_dim is not None:
        sizes = torch.tensor([[size, size, 0, 0, size, size]]).expand(batch, -1)
        inputs += [
            torch.randn(batch, c.added_dim - 6 * c.added_sinusoid).to(device, dtype),
            sizes.to(device, dtype),
        ]
    model = filled(lambda: UNet(c), device, dtype)
    return Work(
        OurUNet(model),
        tuple(inputs),
        lambda: TheirUNet(reference(c, model)),
        lambda: OurUNet(holding(lambda: UNet(c), model.state_dict())),
    )


def decoding(
    family: Family, size: int, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Work:
    """Return the work of one decoding by the VAE."""
    c, side = family.vae, size // family.vae.factor
    model = filled(lambda: VAE(c), device, dtype)
    z = torch.randn(batch, c.latent_channels, side, side).to(device, dtype)
    return Work(
        OurDecoder(model),
        (z,),
        lambda: TheirDecoder(reference(c, model)),
        lambda: OurDecoder(holding(lambda: VAE(c), model.state_dict())),
    )


PARTS = {"unet": unet_call, "vae": decoding}


def filled(make: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Build a model with random weights (norms near 1, the others small). One stretch of noise is repeated: a billion
    draws would take minutes."""
    with torch.device("meta"):
        shapes = make().state_dict()
    noise = 0.02 * torch.randn(2**20, dtype=torch.float32)
    state = {}
    for name, p in shapes.items():
        copies = -(-p.numel() // len(noise))
        values = noise.repeat(copies)[: p.numel()].clone().view(p.shape)  # a slice would keep all of it
        norm = p.ndim == 1 and name.endswith("weight")
        state[name] = (values + 1 if norm else values).to(device, dtype)
    return holding(make, state)


def holding(make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """Build a model that holds these very tensors."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(state, assign=True)
    return model.eval()


def reference(config: UNetConfig | VAEConfig, model: nn.Module) -> nn.Module:
    """Build diffusers' model of this config, which holds the very tensors of ``model``."""
    import diffusers

    from minidiff.storage.files import lazy
    from weights_convert.component import key_map
    from weights_convert.configs_out import class_of, config_json
    from weights_convert.engine import expand, restore

    found = config_json(config)
    mine = {name: lazy(p) for name, p in model.state_dict().items()}
    state = {name: t.load() for name, t in restore(expand(key_map(config, {}), model), mine).items()}
    return holding(lambda: getattr(diffusers, class_of(found)).from_config(found), state)


def counted(work: Work) -> tuple[Tensor, int]:
    """Return the result of one call, and the number of its floating-point operations.

    The counter does not know the attention that a CPU runs; uncounted, a sixth of Stable Diffusion's would be missing.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention}) as counter:
        out = work.ours(*work.inputs)
    return out, int(counter.get_total_flops())


def _attention(q: Any, k: Any, v: Any, *_: Any, **others: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def ceiling(family: Family, size: int, batch: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a 3 x 3 convolution as wide as the UNet's first level: the kernel that comes nearest to a
    processor's limit."""
    side, channels = size // family.vae.factor, family.unet.levels[0].channels
    x = torch.randn(batch, channels, side, side).to(device, dtype)
    weight = torch.randn(channels, channels, 3, 3).to(device, dtype)
    best = min(timed(lambda: F.conv2d(x, weight, padding=1), device) for _ in range(20))
    return 2 * x.numel() * channels * 9 / best


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, on a GPU until its work is done."""
    wait(device)
    begun = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
