"""Train a ControlNet on edges of coloured shapes, beside the bundled model, and judge whether it puts them there.

    python scripts/train_control.py                        # five minutes on two cores, then 40 prompts
    python scripts/train_control.py --minutes 10 --out edges.safetensors --sheet sheet.png
    python scripts/train_control.py --control edges.safetensors --count 100      # judge one that is there

The captions say what is in a picture, not where. A picture is right if it shows what its caption says (_judge.py) and
the thing is where the edges are, within 5 of 64 pixels. The same prompts and seeds are painted three times: with their
edges, with the control off, and with the edges of another scene. The sheet shows edges and the three, a row a prompt.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import _judge  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import minidiff  # noqa: E402
from minidiff import Control, ControlModel, StableDiffusion  # noqa: E402
from minidiff.config import ControlConfig, ControlNetConfig  # noqa: E402
from minidiff.models.control import ControlNet  # noqa: E402
from minidiff.models.initial import first_weights  # noqa: E402
from minidiff.pipeline.png import to_pil  # noqa: E402
from minidiff.training import shapes  # noqa: E402
from minidiff.training.captions import caption  # noqa: E402
from minidiff.training.draws import Draws  # noqa: E402
from minidiff.training.objective import draw_noise, draw_timesteps, target  # noqa: E402

EDGE = 0.25  # the least difference of neighbours, of 2, that is an edge
NEAR = 5.0  # pixels that a thing may be off
TRAINED, JUDGED = 1, 2  # seeds of the scenes
PAINTED = {"edges": 0, "off": None, "wrong edges": 1}  # whose edges a picture gets, counted from its own; None: none


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    sd = minidiff.bundled("cpu")
    if args.control is not None:
        control = ControlModel.load(args.control, "cpu")
    else:
        control = new_control(sd)
        train(sd, control, args)
        if args.out is not None:
            control.save(args.out)
    report(sd, control, args)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of training (default: 5)")
    parser.add_argument("--max-steps", type=int, default=10**6, help="end after so many steps, if that is sooner")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the ControlNet here")
    parser.add_argument("--control", type=Path, metavar="FILE", help="judge this one, without training")
    parser.add_argument("--count", type=int, default=40, help="prompts that are judged (default: 40)")
    parser.add_argument("--steps", type=int, default=15, help="of a picture (default: 15)")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write the first twelve rows of pictures here")
    return parser.parse_args(argv)


def new_control(sd: StableDiffusion) -> ControlModel:
    """Return a ControlNet with the weights of the model's way down, whose outputs are zero."""
    c = sd.unet.config
    config = ControlNetConfig(**{f.name: getattr(c, f.name) for f in fields(c)}, hint_widths=(16, 32, 48))
    net, generator = ControlNet(config), torch.Generator().manual_seed(0)
    for module in net.modules():
        first_weights(module, generator)
    net.load_state_dict({k: v for k, v in sd.unet.state_dict().items() if k in net.state_dict()}, strict=False)
    for conv in (*net.zero, net.zero_mid, net.hint.conv_out):
        for parameter in conv.parameters():
            torch.nn.init.zeros_(parameter)
    return ControlModel(ControlConfig(family="shapes-controlnet", control=config), {"control": net})


def scenes(seed: int, start: int, count: int) -> tuple[list[shapes.Item], list[str], Tensor]:
    """Return items of one thing, captions that do not say where it is, and their pixels (B, 3, 64, 64) in [-1, 1]."""
    items = shapes.items(seed, start, count, "single")
    told = [caption(replace(item.facts, place=None), 17 * (start + k)) for k, item in enumerate(items)]
    return items, told, shapes.drawn(items)[0]


def edges(pixels: Tensor) -> Tensor:
    """Return the edges of pictures (B, 3, H, W) in [-1, 1], white on black, as pictures in [0, 1]."""
    right = F.pad(pixels[..., :, 1:] - pixels[..., :, :-1], (0, 1)).abs().amax(dim=1, keepdim=True)
    below = F.pad(pixels[..., 1:, :] - pixels[..., :-1, :], (0, 0, 0, 1)).abs().amax(dim=1, keepdim=True)
    return (torch.maximum(right, below) > EDGE).float().expand(-1, 3, -1, -1)


def train(sd: StableDiffusion, control: ControlModel, args: argparse.Namespace) -> None:
    """Train the control alone: the model's own weights stay as they are."""
    net = control.net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.rate, weight_decay=0.0)
    begun, losses = time.perf_counter(), []
    for step in range(args.max_steps):
        passed = max((time.perf_counter() - begun) / (60 * args.minutes), step / args.max_steps)
        if passed >= 1:
            break
        # a short way up, and half a cosine down to the end of the time, or of the steps
        rate = args.rate * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * passed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(sd, net, step, args.batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", flush=True)
    print(f"{len(losses)} steps of {args.batch} in {time.perf_counter() - begun:.0f} s")
    net.requires_grad_(False)


def loss_of(sd: StableDiffusion, net: ControlNet, step: int, batch: int) -> Tensor:
    """Return the objective of the model itself (minidiff/training/objective.py), under the control of the edges."""
    _, told, pixels = scenes(TRAINED, step * batch, batch)
    draws = Draws(TRAINED, step * batch, batch)
    with torch.no_grad():
        x0 = sd.vae.encode(pixels).mean * sd.vae.config.scaling_factor
        context, _ = sd.encode_prompt(told)
    t, noise = draw_timesteps(draws, len(sd.schedule)), draw_noise(draws, tuple(x0.shape[1:]))
    x = sd.schedule.add_noise(x0, noise, t)
    out = sd.unet(x, t, context, residuals=net(x, t, context, net.hint(edges(pixels))))
    return F.mse_loss(out, target(sd.schedule, x0, noise, t))


def report(sd: StableDiffusion, control: ControlModel, args: argparse.Namespace) -> None:
    """Paint every prompt in the three ways, print the shares that are right, and write the sheet."""
    items, told, pixels = scenes(JUDGED, 0, args.count)
    drawn = edges(pixels)
    painted: dict[str, Tensor] = {}
    for way, other in PAINTED.items():
        pictures = None if other is None else another(items, drawn, other)
        controls = [] if pictures is None else [Control(control, pictures)]
        asked = {"steps": args.steps, "seed": 0, "output": "tensor", "progress": False}
        painted[way] = sd.generate(told, controls=controls, **asked)
        right = [is_right(image, item, text) for image, item, text in zip(painted[way], items, told, strict=True)]
        print(f"{way:<12} {sum(right)} of {len(right)} right ({100 * sum(right) / len(right):.0f} %)", flush=True)
    if args.sheet is not None:
        rows = [torch.cat([drawn[k], *(painted[way][k] for way in PAINTED)], dim=2) for k in range(min(12, len(items)))]
        to_pil(torch.cat(rows, dim=1)[None])[0].save(args.sheet)


def another(items: Sequence[shapes.Item], drawn: Tensor, other: int) -> Tensor:
    """Return each scene's own edges or (``other`` 1) those of the next scene whose thing is elsewhere."""
    if not other:
        return drawn
    found = []
    for k, item in enumerate(items):
        order = [(k + n) % len(items) for n in range(1, len(items) + 1)]
        found.append(next((j for j in order if apart(items[j], item) > 2 * NEAR), order[0]))
    return drawn[found]


def apart(one: shapes.Item, other: shapes.Item) -> float:
    """Return how far apart the things of two scenes are, in pixels."""
    a, b = one.scene.things[0], other.scene.things[0]
    return math.hypot(a.x - b.x, a.y - b.y)


def is_right(image: Tensor, item: shapes.Item, told: str) -> bool:
    """Return True if a picture shows what its caption says, where the scene has it."""
    levels = np.asarray(to_pil(image[None])[0].convert("RGB"), dtype=np.float64)
    seen, thing = _judge.see(levels), item.scene.things[0]
    near = len(seen.things) == 1 and math.hypot(seen.things[0].x - thing.x, seen.things[0].y - thing.y) <= NEAR
    return near and _judge.judge(seen, _judge.parse(told)).right


if __name__ == "__main__":
    sys.exit(main())
