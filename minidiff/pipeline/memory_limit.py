"""Check, before a run starts, that it can fit into the memory of this machine, or of this container.

Counted is only the minimum that any order of the arithmetic needs: the UNet's skips, which are kept for the way up, and
one layer's input and output at the finest resolution, there and in the decoder. A run takes a few times as much. Only
what cannot work is refused: twice the memory that the system reports leaves room for swapping.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from minidiff.config import ModelConfig, VAEConfig, check

MARGIN = 2  # times the memory that there is
UNKNOWN = 2**38  # bytes, assumed if the system does not say
# Linux: the control groups of this process, and the folder of them all (containers and clusters limit memory by them).
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def physical(device: torch.device) -> int:
    """Return the bytes of memory that this process may use, on CUDA with those of the card, since drivers lend one to
    the other."""
    try:
        own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        own = 0
    own = min([own if own > 0 else UNKNOWN, *limits()])
    if device.type == "cuda" and torch.cuda.is_available():
        own += torch.cuda.get_device_properties(device).total_memory
    return own


def limits() -> list[int]:
    """Return the bytes of memory that each control group of this process allows, of those that set a limit.

    A limit holds for all groups below. A container may see the path of its group from outside and mount it as the root,
    so every folder on the way that exists is asked.
    """
    found = []
    with suppress(OSError):
        for line in CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                root, name = CGROUPS, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = CGROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = Path(path.lstrip("/"))
            for place in (group, *group.parents):
                with suppress(OSError, ValueError):  # "max": no limit
                    found.append(int((root / place / name).read_text()))
    return found


def least(config: ModelConfig, count: int, height: int, width: int, size: int, at_once: int) -> int:
    """Return the bytes that ``count`` pictures of ``height`` x ``width`` pixels need at the least, in numbers of
    ``size`` bytes; ``at_once`` of them are decoded together, 0 for none whole."""
    c, vae = config.unet, config.vae
    area = height * width if vae is None else (height // vae.factor) * (width // vae.factor)
    skips = sum((c.layers + 1) * level.channels * (area >> 2 * k) for k, level in enumerate(c.levels))
    unet = count * (skips + 2 * c.levels[0].channels * area) * size
    if vae is None:
        return unet
    finest = vae.channels[0] if isinstance(vae, VAEConfig) else vae.width
    decoder = at_once * 2 * finest * height * width * size
    return max(unet, decoder) + count * 3 * height * width * 4  # and the pictures themselves, in float32


def check_fits(
    config: ModelConfig, count: int, height: int, width: int, *, device: torch.device, size: int, at_once: int
) -> None:
    """Raise :class:`ConfigError` for a run that this machine cannot hold. The arguments are those of :func:`least`."""
    need, have = least(config, count, height, width, size, at_once), physical(device)
    shown = f"{need / 1e9:,.0f} GB" if need < 10**18 else "more than 1,000,000,000 GB"
    what = f"{count:,} pictures of {width} x {height} need" if count > 1 else f"a picture of {width} x {height} needs"
    check(
        need <= MARGIN * have,
        f"{what} {shown} of memory at the least, and this process may use {have / 1e9:,.0f} GB; make it smaller, or "
        "fewer",
    )
