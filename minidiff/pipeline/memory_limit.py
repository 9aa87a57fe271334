"""Check, before a run starts, that it can fit into the memory of this machine, or of this container.

Counted is what the tensors of the run take at their peak (:mod:`estimate`), without the weights. Only what cannot work
is refused: twice the memory that the system reports leaves room for swapping, and for speed-ups that save memory.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from minidiff.config import ModelConfig, check
from minidiff.pipeline.estimate import Extent, least

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


def check_fits(config: ModelConfig, extent: Extent, device: torch.device) -> None:
    """Raise :class:`ConfigError` for a run that this machine cannot hold."""
    need, have = least(config, extent), physical(device)
    shown = f"{need / 1e9:,.0f} GB" if need < 10**18 else "more than 1,000,000,000 GB"
    e = extent
    size = f"{e.width} x {e.height}"
    what = f"{e.count:,} pictures of {size} need" if e.count > 1 else f"a picture of {size} needs"
    rows = f" ({e.rows} predictions of each at once)" if e.rows > 2 else ""
    check(
        need <= MARGIN * have,
        f"{what} about {shown} of memory beside the weights{rows}, and this process may use {have / 1e9:,.0f} GB; make "
        "it smaller, or fewer",
    )
