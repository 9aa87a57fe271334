"""``minidiff train``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from minidiff.cli.opening import device_of, open_model
from minidiff.cli.options import about
from minidiff.console import show
from minidiff.errors import ConfigError
from minidiff.pipeline.request import read_count, read_number, read_seed, read_whole

ELSEWHERE = {
    **dict.fromkeys(("lr", "learning-rate"), "--rate"),
    **dict.fromkeys(("epochs", "num-train-epochs", "max-train-steps"), "--steps"),
    **dict.fromkeys(("batch-size", "train-batch-size"), "--batch"),
    **dict.fromkeys(("train-data-dir", "instance-data-dir", "dataset-name"), "--data"),
    **dict.fromkeys(("output-dir", "outdir", "output", "-o"), "--out"),
    "resolution": "--size",
    "mixed-precision": "--precision",
    "snr-gamma": "--min-snr",
    "gradient-accumulation-steps": "--accumulate",
    "resume-from-checkpoint": "--resume",
    "pretrained-model-name-or-path": "--model",
}
EXAMPLES = """\
examples:
  minidiff train --data photos/ --out run --size 32 --steps 20000
  minidiff train --data photos/ --out run --resume
  minidiff train --data captioned/ --out tuned --model sd15.safetensors --rate 1e-5 --batch 4 --cache-latents
  torchrun --nproc-per-node 4 -m minidiff train --data photos/ --out run

A run's folder holds model.safetensors, which `minidiff generate --model` takes, state.safetensors for --resume,
log.csv, and samples/. With --resume, options that are not given keep their values.
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(
        commands, "train", "train a model on your own pictures, from nothing or from a model that exists", EXAMPLES
    )
    p.elsewhere = ELSEWHERE
    g = p.add_argument_group("model and data")
    g.add_argument(
        "--data",
        required=True,
        metavar="WHAT",
        help="a folder of pictures (a model with text reads cat.txt beside cat.png, or metadata.jsonl), shapes (drawn "
        "on the fly), or torchvision:NAME",
    )
    g.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the run")
    g.add_argument("--resume", action="store_true", help="continue the run in FOLDER")
    g.add_argument("--model", metavar="PATH", help="start from this model (default: a new, small one without text)")
    g.add_argument("--config", metavar="FILE.json", help="start from a new model of this config")
    g.add_argument(
        "--parts",
        choices=("unet", "unet+text_encoder", "vae"),
        help="what is trained (default: unet; vae: the autoencoder alone)",
    )
    g.add_argument("--size", type=read_whole, metavar="N", help="pixels (default: the model's; 64 for a new one)")
    g.add_argument("--cache-latents", action="store_true", help="compute the latents once and keep them in FOLDER")
    g.add_argument("--held-out", metavar="WHAT", help="data on which the loss is measured whenever samples are made")
    g.add_argument("--download", action="store_true", help="let torchvision download its data set into ./data")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    g.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model over the processes")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=read_whole, metavar="N", help="optimiser steps in all (default: 1000)")
    g.add_argument("--batch", type=read_whole, metavar="N", help="pictures per step, over all processes (default: 16)")
    g.add_argument(
        "--accumulate",
        type=read_whole,
        metavar="N",
        help="micro-batches per batch; more of them need less memory (default: 1)",
    )
    g.add_argument("--rate", type=read_number, metavar="X", help="peak learning rate (default: 1e-4)")
    g.add_argument(
        "--curve", metavar="NAME", help="learning-rate schedule: cosine, linear or constant (default: cosine)"
    )
    g.add_argument(
        "--warmup", type=read_count, metavar="N", help="warm-up steps (default: a tenth of all, at most 500)"
    )
    g.add_argument("--decay", type=read_number, metavar="X", help="weight decay (default: 0.01)")
    g.add_argument("--clip", type=read_number, metavar="X", help="largest gradient norm; 0: no clipping (default: 1)")
    g.add_argument("--precision", metavar="NAME", help="float32, bfloat16 or float16 (default: float32)")
    g.add_argument(
        "--fused",
        action="store_true",
        default=None,
        help="AdamW in one pass over memory: faster, and the weights differ by rounding (default: off)",
    )
    g.add_argument(
        "--channels-last",
        action="store_true",
        default=None,
        help="pictures and weights lie pixel by pixel: the same (default: off)",
    )
    g.add_argument(
        "--ema", type=read_number, metavar="X", help="decay of the averaged weights; 0: no average (default: 0.9999)"
    )
    g.add_argument(
        "--seed",
        type=read_seed,
        metavar="N",
        help="seed of new weights, the order of the data and the noise (default: 0)",
    )
    g = p.add_argument_group("objective")
    g.add_argument(
        "--min-snr", type=read_number, metavar="X", help="gamma of min-SNR loss weighting; 5 is usual (default: off)"
    )
    g.add_argument(
        "--noisy", type=read_number, metavar="X", help="above 1: train more on high noise levels (default: 1)"
    )
    g.add_argument(
        "--offset-noise", type=read_number, metavar="X", help="strength of offset noise; 0.1 is usual (default: 0)"
    )
    g.add_argument(
        "--drop-prompt",
        type=read_number,
        metavar="X",
        help="probability of replacing a prompt by the empty one (default: 0.1)",
    )
    g.add_argument("--kl", type=read_number, metavar="X", help="vae: weight of the KL divergence (default: 1e-6)")
    g = p.add_argument_group("output")
    g.add_argument("--save-every", type=read_whole, metavar="N", help="steps between checkpoints (default: 500)")
    g.add_argument(
        "--sample-every", type=read_count, metavar="N", help="steps between grids of samples; 0: none (default: 0)"
    )
    g.add_argument("--samples", type=read_whole, metavar="N", help="pictures per grid (default: 16)")
    g.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: Namespace) -> None:
    """Run the command."""
    if args.model is not None and args.config is not None:
        raise ConfigError("--model and --config are both given; a run begins with one or the other")
    import torch

    from minidiff.training.command import run

    device = device_of(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    assert device is not None
    path = run(args, lambda path: open_model(path, device, torch.float32)[0], device)
    if path is not None:
        show(path)
