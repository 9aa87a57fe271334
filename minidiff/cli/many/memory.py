"""Size of a group: as many pictures as fit into half of the memory that is free, by what one was seen to take.

Larger groups are faster, but not by much once the processor is busy, and a kill costs the group that was being made.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minidiff.pipeline.estimate import least
from minidiff.pipeline.memory_limit import limits, physical

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.request import Request

MOST = 8  # pictures at once
SHARE = 0.5  # of the free memory: for what a trial does not see, and for other programs
STATUS, RESET, MACHINE = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


def at_once(pipe: StableDiffusion | Unconditional, request: Request) -> int:
    """Return how many pictures like that of ``request``, which is for one, this process should make at once."""
    need = least(pipe.config, pipe.estimate(request).extent)
    trial = taken(pipe.device, lambda: _try(pipe, request))
    each = max(need, trial or 0)
    own = free(pipe.device) / (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if pipe.device.type == "cpu" else 1)
    return max(1, min(MOST, int(SHARE * own) // max(1, each)))


def _try(pipe: StableDiffusion | Unconditional, request: Request) -> None:
    """Make one step, and decode what it gives."""
    run = pipe.run(request)
    pipe.decode(next(run).x)
    run.close()


def taken(device: torch.device, work: Callable[[], object]) -> int | None:
    """Return the bytes that ``work`` takes at its peak, beyond what there was before; None if that cannot be seen.

    It is done twice: the first time reads weights, which later pictures share.
    """
    work()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, KeyError, ValueError):
        if device.type == "cpu":
            _forget()
            RESET.write_text("5")  # Linux: the peak is what there is now
            before = _field(STATUS, "VmRSS")
            work()
            return _field(STATUS, "VmHWM") - before
    return None


def _forget() -> None:
    """Give back to the system what is held but unused; the work would take it from there, and nothing would be seen.

    That is garbage in cycles of references, and memory that glibc's malloc keeps for later requests.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # other C libraries keep nothing, or do not have the function
        ctypes.CDLL(None).malloc_trim(0)


def free(device: torch.device) -> int:
    """Return the bytes of memory that are free for this process on ``device``."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    with suppress(OSError, KeyError, ValueError):
        own = _field(STATUS, "VmRSS")
        return min([_field(MACHINE, "MemAvailable"), *(limit - own for limit in limits())])
    return physical(device) // 2


def _field(path: Path, name: str) -> int:
    """Return the bytes that a table of the system names. Raises KeyError if it does not."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    raise KeyError(name)
