"""Compare a full-size Stable Diffusion 1.5, end to end, with diffusers: tensors, latents, time and memory.

    python scripts/check_full_size.py [--work FOLDER] [--keep]

Writes a Stable Diffusion 1.5 of the real shapes (860 M + 84 M + 123 M parameters, random, float16) with diffusers and
transformers, as a diffusers folder and as an original single file; converts both; generates 512 x 512 with 2 PNDM
steps in float32 from each; and requires: diffusers' own reader of single files finds the same tensors in ours, the two
converted files are equal tensor by tensor, and the latents equal those of diffusers bit for bit. Every stage is a
process of its own, so that its time and peak memory are its own. Needs the `parity` extra, 9 GB of disk, 12 GB of
memory and a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT, NEGATIVE, STEPS, SEED = "a photograph of an astronaut riding a horse", "blurry", 2, 7
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
PNDM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def random_pipeline() -> Any:
    """Build the reference model of the real shapes in float32, with every parameter random."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.support.parity.twins import tokenizer_twin

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=49408
    )
    parts = {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE), "text_encoder": CLIPTextModel(text)}
    with torch.no_grad():
        for part in parts.values():
            for name, p in part.named_parameters():
                if p.ndim == 1:  # norms and biases start as constants, which any mix-up would survive
                    p.add_(torch.randn_like(p) * 0.02)
                assert p.numel() == 1 or p.std() > 0, name
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer_twin(),
        scheduler=PNDMScheduler(**PNDM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_source(work: Path) -> dict[str, Any]:
    """Write the reference model to disk, in both layouts, in float16."""
    from safetensors.torch import save_file

    from tests.support.parity.ldm import original_sd1

    pipe = random_pipeline()
    parts = {name: getattr(pipe, name).half() for name in ("unet", "vae", "text_encoder")}
    pipe.save_pretrained(work / "folder")
    save_file(original_sd1(*(part.state_dict() for part in parts.values())), work / "single.safetensors")
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def judge_single_file(work: Path) -> dict[str, Any]:
    """Check that diffusers reads the same tensors from the single file as from the folder."""
    import torch
    from diffusers import StableDiffusionPipeline

    kwargs = {"torch_dtype": torch.float16, "local_files_only": True, "safety_checker": None}
    single = StableDiffusionPipeline.from_single_file(
        work / "single.safetensors", config=str(work / "folder"), **kwargs
    )
    folder = StableDiffusionPipeline.from_pretrained(work / "folder", **kwargs)
    compared = 0
    for name in ("unet", "vae", "text_encoder"):
        a, b = getattr(single, name).state_dict(), getattr(folder, name).state_dict()
        assert a.keys() == b.keys(), name
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}.{key}"
            compared += 1
    return {"tensors": compared}


def convert(work: Path, source: str) -> dict[str, Any]:
    """Convert as a user does."""
    import weights_convert

    src = work / ("folder" if source == "folder" else "single.safetensors")
    dst = work / f"{source}.minidiff.safetensors"
    start = time.perf_counter()
    weights_convert.convert(src, dst)
    seconds, size = time.perf_counter() - start, dst.stat().st_size
    return {"seconds": seconds, "gb": size / 1e9, "the_disk_alone_seconds": disk(work / "disk", size)}


def disk(path: Path, size: int) -> float:
    """Return the seconds to write and sync ``size`` bytes, a lower bound for every conversion."""
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def compare_converted(work: Path) -> dict[str, Any]:
    """Compare the two converted files, tensor by tensor."""
    import torch

    from minidiff.storage import checkpoint

    a, b = (checkpoint.open_checkpoint(work / f"{source}.minidiff.safetensors") for source in ("folder", "single"))
    assert a.file.lazy.keys() == b.file.lazy.keys()
    for name in a.file.lazy:
        assert torch.equal(a.file.lazy[name].load(), b.file.lazy[name].load()), name
    assert a.config.unet == b.config.unet
    assert a.config == b.config, f"{a.config}\n{b.config}"
    return {"tensors": len(a.file.lazy)}


def ours(work: Path, source: str, *, low_memory: bool = False) -> dict[str, Any]:
    """Run minidiff in float32, with its parts in memory together or in turns."""
    import torch

    import minidiff

    start = time.perf_counter()
    sd = minidiff.load(work / f"{source}.minidiff.safetensors", device="cpu", low_memory=low_memory)
    loaded = time.perf_counter() - start
    assert isinstance(sd, minidiff.StableDiffusion)
    generator = torch.Generator().manual_seed(SEED)
    latents = sd.generate(PROMPT, NEGATIVE, STEPS, generator=generator, output="latent", progress=False)
    torch.save(latents, work / f"latents-{'turns' if low_memory else source}.pt")
    return {"load_seconds": loaded, "generate_seconds": time.perf_counter() - start - loaded}


def theirs(work: Path) -> dict[str, Any]:
    """Run diffusers in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    start = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(work / "folder", torch_dtype=torch.float32, local_files_only=True)
    loaded = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    latents = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, generator=generator, output_type="latent"
    ).images
    torch.save(latents, work / "latents-diffusers.pt")
    return {"load_seconds": loaded, "generate_seconds": time.perf_counter() - start - loaded}


def compare_latents(work: Path) -> dict[str, Any]:
    """Compare all latents."""
    import torch

    reference = torch.load(work / "latents-diffusers.pt")
    for source in ("folder", "single", "turns"):
        latents = torch.load(work / f"latents-{source}.pt")
        gap = (latents - reference).abs().max().item()
        assert torch.equal(latents, reference), f"{source}: latents differ from diffusers' by up to {gap:.3g}"
    return {"shape": list(reference.shape), "std": reference.std().item()}


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "write source with diffusers": write_source,
    "diffusers reads the single file": judge_single_file,
    "convert folder": lambda work: convert(work, "folder"),
    "convert single file": lambda work: convert(work, "single"),
    "converted files equal": compare_converted,
    "generate, from the folder": lambda work: ours(work, "folder"),
    "generate, from the single file": lambda work: ours(work, "single"),
    "generate, parts in turns": lambda work: ours(work, "folder", low_memory=True),
    "generate with diffusers": theirs,
    "latents equal": compare_latents,
}


def main() -> int:
    """Run every stage as a process; return 0 if all succeed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "full_size", help="where the files go")
    parser.add_argument("--keep", action="store_true", help="leave the files there; a source that is there is used")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        start = time.perf_counter()
        facts = STAGES[args.stage](args.work)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({**facts, "total_seconds": time.perf_counter() - start, "peak_gb": peak / 1e9}))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    failed = 0
    for name in STAGES:
        if name == "write source with diffusers" and (args.work / "single.safetensors").exists():
            print(f"{name:34} already there", flush=True)
            continue
        command = [sys.executable, __file__, "--work", str(args.work), "--stage", name]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"{name:34} FAILED\n{done.stderr}", flush=True)
            break
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        shown = "  ".join(f"{k} {v:,.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        print(f"{name:34} {shown}", flush=True)
    if not args.keep and not failed:
        shutil.rmtree(args.work)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
