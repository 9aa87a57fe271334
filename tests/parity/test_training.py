"""Thirty optimiser steps of the reference's training loop, and thirty of ours: the same weights to the last bit.

The reference's loop is that of its tutorials: accelerate's ``accumulate``, ``backward`` and ``clip_grad_norm_``, AdamW,
the cosine schedule of ``diffusers.optimization``, two micro-batches a step. Both read the same pictures, and the same
timesteps and noise, which ours looks up by the number of the example.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn

import weights_convert
from minidiff.config import Prediction, ScheduleConfig
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.schedule import NoiseSchedule
from minidiff.training.curves import rate_at
from minidiff.training.draws import Draws
from minidiff.training.ema import EMA
from minidiff.training.loop import Trainer
from minidiff.training.objective import min_snr_weights, snr
from minidiff.training.settings import TrainConfig
from tests.support.parity.twins import folder_twin, ours, unet_twin
from tests.tolerances import SNR, assert_close

STEPS, BATCH, PARTS, RATE, WARMUP = 30, 4, 2, 3e-3, 5
WORDS = ("a red fox", "an owl", "two blue circles on a table", "the sea at night", "a tree")


class Pictures:
    """An endless stream of noise pictures with captions, number k the same in any batch."""

    def __init__(self, side: int) -> None:
        self.side = side

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        pixels = torch.cat([Draws(99, k, 1).normal((3, self.side, self.side)) for k in range(start, start + count)])
        return pixels.clamp(-1, 1), [WORDS[k % len(WORDS)] for k in range(start, start + count)]


def reference_steps(unet: nn.Module, predict: Any, fused: bool) -> list[float]:
    """The tutorial's loop on ``unet``; ``predict(first, count)`` gives its answer and the right one. All losses."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, fused=fused or None)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    unet, optimizer, scheduler = accelerator.prepare(unet, optimizer, scheduler)
    losses = []
    count = BATCH // PARTS
    for k in range(0, STEPS * BATCH, count):
        with accelerator.accumulate(unet):
            answer, wanted = predict(k, count)
            loss = F.mse_loss(answer.float(), wanted.float(), reduction="mean")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_order_of(trainer: Trainer, make_twin: Any) -> dict[str, Tensor]:
    """The trainer's weights in the order of the twin's: the length of all gradients is a sum, and sums have an order.

    Each parameter of a fresh twin is filled with its number, and the converter says where it goes.
    """
    twin = make_twin()
    for i, p in enumerate(twin.parameters()):
        p.data.fill_(i)
    place = {f"unet.{name}": p.flatten()[0].item() for name, p in ours(twin).named_parameters()}
    return dict(sorted(trainer.weights.items(), key=lambda item: place[item[0]]))


def settings(**options: Any) -> TrainConfig:
    found: dict[str, Any] = dict(
        steps=STEPS, batch=BATCH, accumulate=PARTS, rate=RATE, warmup=WARMUP, curve="cosine", clip=1.0, seed=5
    )
    return TrainConfig(**found | options)


def same_training(trainer: Trainer, twin: Any, make_twin: Any, predict: Any) -> None:
    """Train both and compare: losses, every weight of the UNet, and that training did something to each of them."""
    before = ours(twin).state_dict()
    if trainer.config.channels_last:
        twin.to(memory_format=torch.channels_last)
    losses = reference_steps(twin, predict, trainer.config.fused)
    trainer.weights = in_order_of(trainer, make_twin)
    reports = list(trainer.steps())
    after = ours(twin).state_dict()
    assert max(r.norm for r in reports) > 1  # so that the clipping was in it
    assert [r.loss for r in reports] == [
        sum((torch.tensor(loss) / 2 for loss in losses[i : i + 2]), torch.zeros(())).item() for i in range(0, 60, 2)
    ]
    for name, weight in trainer.pipe.unet.state_dict().items():
        assert_close(weight, after[name], where=name)
        assert not weight.equal(before[name]), name


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"fused": True, "channels_last": True}], ids=str)
def test_thirty_steps_of_a_pixel_model(tmp_path: Any, options: Any) -> None:
    """The twin is in eval mode, where it has nothing to leave out (its dropout is 0): in train mode it copies the
    input of some convolutions to another memory layout, and then those sum in another order."""
    folder_twin(tmp_path / "twin", "ddpm")
    pipe = weights_convert.load(tmp_path / "twin", device="cpu")
    assert isinstance(pipe, Unconditional)
    data = Pictures(8)
    twin = unet_twin("ddpm").requires_grad_(True)
    scheduler = DDPMScheduler()

    def predict(first: int, count: int) -> tuple[Tensor, Tensor]:
        draws = Draws(5, first, count)
        t, noise = draws.integers(1000), draws.normal((3, 8, 8))
        return twin(scheduler.add_noise(data.batch(first, count)[0], noise, t), t).sample, noise

    same_training(Trainer(pipe, data, settings(**options)), twin, lambda: unet_twin("ddpm"), predict)


def test_thirty_steps_of_a_text_model(tmp_path: Any) -> None:
    """Frozen autoencoder and text encoder around a UNet that learns, a third of the prompts dropped."""
    reference = folder_twin(tmp_path / "twin", "sd1")
    pipe = weights_convert.load(tmp_path / "twin", device="cpu")
    assert isinstance(pipe, StableDiffusion)
    data = Pictures(16)
    twin = reference.unet.train().requires_grad_(True)
    scheduler = DDPMScheduler.from_config(reference.scheduler.config)
    options = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")

    def predict(first: int, count: int) -> tuple[Tensor, Tensor]:
        draws = Draws(5, first, count)
        t, pixels = draws.integers(1000), data.batch(first, count)[0]
        with torch.no_grad():
            gaussian = reference.vae.encode(pixels).latent_dist
            latents = gaussian.mean + gaussian.std * draws.normal((4, 4, 4))
            latents = latents * reference.vae.config.scaling_factor
            coins = draws.uniform()
            texts = data.batch(first, count)[1]
            captions = ["" if coin < 0.3 else text for coin, text in zip(coins, texts, strict=True)]
            context = reference.text_encoder(reference.tokenizer(captions, **options).input_ids)[0]
        noise = draws.normal((4, 4, 4))
        return twin(scheduler.add_noise(latents, noise, t), t, context).sample, noise

    same_training(Trainer(pipe, data, settings(drop_prompt=0.3)), twin, lambda: unet_twin("sd1"), predict)


@pytest.mark.parametrize("curve", ["constant", "cosine", "linear"])
def test_learning_rates(curve: Any) -> None:
    config = TrainConfig(steps=50, warmup=7, rate=3e-4, curve=curve)
    name = "constant_with_warmup" if curve == "constant" else curve
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.rate)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=50)
    for step in range(51):
        assert rate_at(config, step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_ema(decay: float) -> None:
    weights = {"a": torch.randn(300), "b": torch.randn(7, 5)}
    theirs, own = EMAModel([nn.Parameter(w) for w in weights.values()], decay=decay), EMA(weights, decay)
    for n in range(1, 30):
        weights = {name: torch.randn(w.shape) for name, w in weights.items()}
        theirs.step([nn.Parameter(w) for w in weights.values()])
        own.update(weights, n)
    for mine, other in zip(own.average.values(), theirs.shadow_params, strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction: Prediction) -> None:
    """As the reference's training script has them since its second correction; for x0 it has none."""
    t = torch.arange(1000)
    theirs = compute_snr(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), t)
    ratio = snr(NoiseSchedule.from_config(ScheduleConfig()), t)
    assert_close(ratio, theirs, SNR)
    weights = theirs.clamp(max=5) / (theirs if prediction == "epsilon" else theirs + 1)
    assert_close(min_snr_weights(prediction, ratio, 5.0), weights, SNR)
