"""Each switch of ``minidiff.fast`` on a real card, with ``pytest -m cuda``; without one they are skipped.

Equal in result to the plain model on the same card, memory that is saved where that is the point, and a loop that never
waits. That they copy nothing and mix nothing is shown without a card by ``test_fake_cuda_fast.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import fast
from minidiff.pipeline import StableDiffusion
from minidiff.samplers import SAMPLERS
from tests.support.cuda_guard import ON_A_CARD
from tests.support.tiny import tiny_sd
from tests.tolerances import FLOAT16_CUDA, assert_close
from tests.unit.test_cuda import draw
from tests.unit.test_fake_cuda_fast import FOR_CPUS

pytestmark = ON_A_CARD
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def sd() -> Iterator[StableDiffusion]:
    pipe = tiny_sd()
    for part in pipe.parts.values():
        draw(part)
    pipe.to("cuda", torch.float16)
    yield pipe
    fast.restore(pipe)


def made(pipe: StableDiffusion, **options: Any) -> Tensor:
    found: Tensor = pipe.generate(PROMPTS, steps=4, seed=3, output="tensor", progress=False, **options)
    return found


def check_equal_in_result(pipe: StableDiffusion, plain: Tensor) -> None:
    scale = plain.float().std()
    assert_close(made(pipe).float() / scale, plain.float() / scale, FLOAT16_CUDA)


def most(pipe: StableDiffusion) -> int:
    """Bytes of the card at the peak of a run."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    made(pipe)
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("switch", [*fast.SWITCHES, "channels_last", "halves", "vae_slices"])
def test_equal_in_result_and_off_again(sd: StableDiffusion, switch: str) -> None:
    plain = made(sd)
    on = fast.optimize(sd, (switch,))
    assert (on[switch] > 0) == (switch not in FOR_CPUS)
    check_equal_in_result(sd, plain)
    fast.restore(sd)
    check_equal_in_result(sd, plain)
    assert not any("forward" in m.__dict__ for part in sd.parts.values() for m in part.modules())


@pytest.mark.slow
def test_graphs(sd: StableDiffusion) -> None:
    """A multistep sampler: answers of earlier launches are still there."""
    plain = made(sd, sampler="pndm")
    fast.optimize(sd, ("graphs",))
    scale = plain.float().std()
    for _ in range(2):  # recorded, and launched
        assert_close(made(sd, sampler="pndm").float() / scale, plain.float() / scale, FLOAT16_CUDA)


def test_channels_last_is_how_weights_lie(sd: StableDiffusion) -> None:
    fast.optimize(sd, ("channels_last",))
    made(sd)
    weights = [m.weight for m in sd.unet.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_halves_only_once_the_whole_does_not_fit(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made(sd)
    batches: list[int] = []
    forward = type(sd.unet).forward

    def small(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 2:
            torch.empty(1 << 50, device="cuda")  # a petabyte
        batches.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(sd.unet), "forward", small)
    fast.optimize(sd, ("halves",))
    check_equal_in_result(sd, plain)
    assert set(batches) == {2}


def test_slices_and_tiles_take_less(sd: StableDiffusion) -> None:
    z = torch.randn(4, 4, 48, 48, device="cuda", dtype=torch.float16)

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            sd.vae.decode(z)
        return torch.cuda.max_memory_allocated() - before

    whole = peak()
    fast.optimize(sd, ("vae_slices",))
    sliced = peak()
    fast.restore(sd)
    fast.tiled(sd, side=16)
    assert sliced < whole / 2
    assert peak() < whole / 2


def test_offloaded_parts_are_not_there_together(sd: StableDiffusion) -> None:
    """The same bits, and less of the card. What is restored lies on the host."""
    plain, all_at_once = made(sd), most(sd)
    sizes = {name: sum(p.nbytes for p in part.parameters()) for name, part in sd.parts.items()}
    sd.to("cpu")
    fast.offload(sd, "cuda")
    assert torch.cuda.memory_allocated() < min(sizes.values()) + 2**20
    assert torch.equal(made(sd), plain)
    assert most(sd) <= all_at_once - min(sizes.values())
    pinned = [slot.original.is_pinned() for slots in sd.low_memory.slots.values() for slot in slots]  # type: ignore[union-attr]
    assert all(pinned)
    fast.restore(sd)
    assert {p.device.type for part in sd.parts.values() for p in part.parameters()} == {"cpu"}
    sd.to("cuda")
    assert torch.equal(made(sd), plain)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_loop_never_waits(name: str, scale: float, sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = SAMPLERS[name]
    start, started = kind.start, []
    fast.optimize(sd, (*fast.SWITCHES, "channels_last", "halves"))
    made(sd)  # weights are laid out
    run = sd.steps("a cat", steps=4, guidance_scale=scale, sampler=name, generator=torch.Generator("cuda"))

    def watched(self: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        started.append(True)
        return start(self)

    monkeypatch.setattr(kind, "start", watched)
    try:
        assert len(list(run)) > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started
