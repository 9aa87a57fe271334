"""Key maps of T2I-Adapters: diffusers' T2IAdapter, and the files of its authors (TencentARC).

The authors number all blocks in one list, except in light adapters, whose levels hold their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from minidiff.config import T2IAdapterConfig
from weights_convert.engine import Module, join

BLOCK = (("block1", "conv1"), ("block2", "conv2"))


def t2i_adapter(config: T2IAdapterConfig, *, original: bool = False) -> Iterator[Module]:
    """Return the map; ``original``: of the authors' files."""
    root = "" if original else "adapter."
    yield Module(f"{root}conv_in", "conv_in")
    flat = original and config.kind != "light"
    for i in range(len(config.channels)):
        level = f"{root}body.{i * config.layers if flat else i}"
        yield Module(f"{level}.in_conv", f"levels.{i}.conv_in")
        for j in range(config.layers):
            block = f"body.{i * config.layers + j}" if flat else f"{level}.{'body' if original else 'resnets'}.{j}"
            yield from join(block, BLOCK, f"levels.{i}.res.{j}")
        yield Module(f"{level}.out_conv", f"levels.{i}.conv_out")
