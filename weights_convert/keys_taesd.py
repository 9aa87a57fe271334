"""Key maps of the tiny autoencoder: diffusers' AutoencoderTiny, and the two files of its author.

Both store each half as a flat list of layers, in which ReLUs and upsamplings count. The author's decoder begins with an
additional layer, which limits the latents, so its numbers are higher by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from minidiff.config import TAESDConfig
from weights_convert.engine import Module, join

BLOCK = (("conv.0", "conv1"), ("conv.2", "conv2"), ("conv.4", "conv3"))


def taesd(config: TAESDConfig, *, original: bool = False) -> Iterator[Module]:
    """Return the map; ``original``: of the author's two files, under "encoder." and "decoder."."""
    layers = "" if original else "layers."
    yield Module(f"encoder.{layers}0", "encoder.conv_in")
    n = 1
    for i, blocks in enumerate(config.blocks):
        if i > 0:
            yield Module(f"encoder.{layers}{n}", f"encoder.down.{i}.conv")
            n += 1
        for j in range(blocks):
            yield from join(f"encoder.{layers}{n}", BLOCK, f"encoder.down.{i}.res.{j}")
            n += 1
    yield Module(f"encoder.{layers}{n}", "encoder.conv_out")
    n = 1 if original else 0
    yield Module(f"decoder.{layers}{n}", "decoder.conv_in")
    n += 2  # the ReLU has no weights
    last = len(config.blocks) - 1
    for i, blocks in enumerate(reversed(config.blocks)):
        for j in range(blocks):
            yield from join(f"decoder.{layers}{n}", BLOCK, f"decoder.up.{i}.res.{j}")
            n += 1
        if i < last:
            yield Module(f"decoder.{layers}{n + 1}", f"decoder.up.{i}.conv")  # after the upsampling
            n += 2
    yield Module(f"decoder.{layers}{n}", "decoder.conv_out")
