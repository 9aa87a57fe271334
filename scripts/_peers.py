"""Peers of minidiff for `compare_peers.py`: each in its own words, run by its own interpreter.

    PEERS/NAME/bin/python scripts/_peers.py NAME STAGE WORK SOURCE

A class per peer says how it is imported, which samplers it lists, how it opens Stable Diffusion 1 and paints with it,
and how its UNet and its DDIM (or Euler) are called. SOURCE is a checkout, for peers that are no package. The last line
that a stage prints is JSON. Sockets are closed to all of them: what passes, passes without a network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

PROMPT, STEPS = "a photograph of an astronaut riding a horse", 4
SIDE = 64  # pixels of what is compared

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
LEADING = {**DDIM, "steps_offset": 1, "set_alpha_to_one": False}  # as Stable Diffusion 1 ships


class Missing(Exception):
    """The peer has no such function."""


class Peer:
    """``package``: its distribution on PyPI, or "" for a checkout. ``code``: the folders of its own source.
    ``statement``: what a user imports. ``method``: diffusers' scheduler with the settings nearest to its own sampler.
    """

    name: ClassVar[str]
    package: ClassVar[str] = ""
    code: ClassVar[tuple[str, ...]]
    statement: ClassVar[str]
    method: ClassVar[tuple[str, dict[str, Any]]] = ("DDIMScheduler", LEADING)

    def __init__(self, work: Path, source: Path) -> None:
        self.work, self.source = work, source

    def samplers(self) -> list[str]:
        raise Missing

    def picture(self, which: str) -> Any:
        """Paint one step from the "folder" or the "single" file; PROMPT as its text encoder sees it, (1, 77, 768)."""
        raise Missing

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        """(x, t, context) -> epsilon, with the folder's weights in float32."""
        raise Missing

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        """Latents after STEPS steps from ``noise`` of unit variance, without guidance."""
        raise Missing

    def path(self, which: str) -> Path:
        return self.work / ("folder" if which == "folder" else "single.safetensors")

    def original(self) -> dict[str, Any]:
        """The UNet's tensors as the original single file names them, in float32."""
        import torch

        return {k: v.float() for k, v in torch.load(self.work / "unet.pt", mmap=True).items()}


class Minidiff(Peer):
    name, package, code = "minidiff", "minidiff", ("minidiff", "weights_convert")
    statement = "from minidiff import *"

    def samplers(self) -> list[str]:
        from minidiff.samplers import SAMPLERS

        return list(SAMPLERS)

    def opened(self, which: str) -> Any:
        import weights_convert

        return weights_convert.load(self.path(which), device="cpu")

    def picture(self, which: str) -> Any:
        sd = self.opened(which)
        sd.generate(PROMPT, steps=1, height=SIDE, width=SIDE, progress=False)
        return sd.encode_prompt([PROMPT])[0]

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        self.sd = self.opened("folder")
        return self.sd.unet

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        return self.like(None, noise, context)

    def like(self, program: str | None, noise: Any, context: Any) -> Any:
        """DDIM as another program runs it."""
        return self.sd.generate(
            None,
            prompt_embeds=context,
            latents=noise,
            sampler="ddim",
            steps=STEPS,
            guidance_scale=1.0,
            height=SIDE,
            width=SIDE,
            like=program,
            output="latent",
            progress=False,
        )


class Diffusers(Peer):
    name, package, code = "diffusers", "diffusers", ("diffusers",)
    statement = "from diffusers import StableDiffusionPipeline"

    def samplers(self) -> list[str]:
        from diffusers import PNDMScheduler

        return [c.__name__.removesuffix("Scheduler") for c in PNDMScheduler().compatibles]

    def picture(self, which: str) -> Any:
        import torch
        from diffusers import StableDiffusionPipeline

        load = (
            StableDiffusionPipeline.from_pretrained if which == "folder" else StableDiffusionPipeline.from_single_file
        )
        pipe = load(str(self.path(which)), torch_dtype=torch.float32)
        pipe(PROMPT, num_inference_steps=1, height=SIDE, width=SIDE)
        return pipe.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=False)[0]

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel.from_pretrained(self.path("folder"), subfolder="unet", local_files_only=True)
        model = model.float()
        return lambda x, t, context: model(x, t, context, return_dict=False)[0]

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        return self.scheduled(unet, noise, context, *self.method)

    def scheduled(self, unet: Any, noise: Any, context: Any, name: str, options: dict[str, Any]) -> Any:
        """The loop of diffusers' pipelines."""
        import diffusers

        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(STEPS)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t, context), t, x, return_dict=False)[0]
        return x


class ComfyUI(Peer):
    name, code = "ComfyUI", ("comfy", "comfy_extras", "app", "*.py")
    statement = "import comfy.cli_args\ncomfy.cli_args.args.cpu = True\nimport comfy.sd, comfy.sample"
    method = ("DDIMScheduler", {**LEADING, "set_alpha_to_one": True})

    def prepare(self) -> Any:
        import comfy.cli_args

        comfy.cli_args.args.cpu = comfy.cli_args.args.force_fp32 = True  # as the options --cpu --force-fp32
        return importlib.import_module("comfy.sd")

    def samplers(self) -> list[str]:
        self.prepare()
        return list(importlib.import_module("comfy.samplers").SAMPLER_NAMES)

    def sample(self, model: Any, noise: Any, steps: int, cfg: float, positive: Any, negative: Any) -> Any:
        import torch

        sample, start = importlib.import_module("comfy.sample").sample, torch.zeros_like(noise)
        given = ("ddim", "ddim_uniform", positive, negative, start)
        return sample(model, noise, steps, cfg, *given, disable_pbar=True, seed=0)

    def picture(self, which: str) -> Any:
        import torch

        sd = self.prepare()
        if which == "folder":
            load = importlib.import_module("comfy.diffusers_load").load_diffusers
            model, clip, vae = load(str(self.path(which)))
        else:
            model, clip, vae, _ = sd.load_checkpoint_guess_config(str(self.path(which)))
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]
        latents = self.sample(model, torch.randn(1, 4, SIDE // 8, SIDE // 8), 1, 7.5, *prompts)
        vae.decode(latents)
        return prompts[0][0][0]

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        self.model = self.prepare().load_checkpoint_guess_config(
            str(self.path("single")), output_vae=False, output_clip=False
        )[0]
        network = self.model.model.diffusion_model
        return lambda x, t, context: network(x, t.expand(len(x)), context=context)

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        latents = self.sample(self.model, noise, STEPS, 1.0, [[context, {}]], [[context, {}]])
        return self.model.model.latent_format.process_in(latents)


class Refiners(Peer):
    name, package, code = "refiners", "refiners", ("refiners",)
    statement = "from refiners.foundationals.latent_diffusion import StableDiffusion_1"

    def samplers(self) -> list[str]:
        solvers = importlib.import_module("refiners.foundationals.latent_diffusion.solvers")
        kept = [
            n for n in solvers.__all__ if isinstance(c := getattr(solvers, n), type) and issubclass(c, solvers.Solver)
        ]
        return [n for n in kept if n not in ("Solver", "FrankenSolver")]  # the base, and a shell for diffusers' own

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        """Filled through its own conversion table, in memory: it has no function that opens a checkpoint."""
        from refiners.conversion.models.unet_sd15 import diffusers_recipe
        from refiners.foundationals.latent_diffusion import SD1UNet
        from safetensors.torch import load_file

        model = SD1UNet(in_channels=4)
        found = diffusers_recipe.translate_keys(load_file(next((self.path("folder") / "unet").glob("*.safetensors"))))
        model.load_state_dict({k: v.float() for k, v in found.items()})

        def call(x: Any, t: Any, context: Any) -> Any:
            model.set_timestep(t.reshape(1))
            model.set_clip_text_embedding(context)
            return model(x)

        return call

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        from refiners.foundationals.latent_diffusion.solvers import DDIM as Solver

        solver, x = Solver(STEPS), noise
        for step in solver.inference_steps:
            x = solver(x, predicted_noise=unet(x, solver.timesteps[step], context), step=step)
        return x


class CompVis(Peer):
    name, code = "CompVis", ("ldm", "scripts", "main.py")
    statement = (
        "from ldm.modules.diffusionmodules.openaimodel import UNetModel\n"
        "from ldm.models.diffusion.ddim import DDIMSampler"
    )

    def samplers(self) -> list[str]:
        there = {p.stem for p in (self.source / "ldm/models/diffusion").iterdir()}
        return sorted(there - {"__init__", "__pycache__", "ddpm", "classifier"})  # these two are models

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        from ldm.util import instantiate_from_config
        from omegaconf import OmegaConf

        config = OmegaConf.load(self.source / "configs/stable-diffusion/v1-inference.yaml")
        model = instantiate_from_config(config.model.params.unet_config)
        model.load_state_dict(self.original())
        return lambda x, t, context: model.eval()(x, t.expand(len(x)), context=context)

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        import numpy as np
        import torch
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.modules.diffusionmodules.util import make_beta_schedule

        class OnTheCPU(DDIMSampler):
            def register_buffer(self, name: str, attr: Any) -> None:
                setattr(self, name, attr)  # its own moves every tensor to CUDA

        betas = make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012)
        bars = np.cumprod(1.0 - betas)
        tables = {"betas": betas, "alphas_cumprod": bars, "alphas_cumprod_prev": np.append(1.0, bars[:-1])}
        model = SimpleNamespace(
            num_timesteps=1000,
            device=torch.device("cpu"),
            apply_model=unet,
            **{k: torch.tensor(v, dtype=torch.float32) for k, v in tables.items()},
        )
        return OnTheCPU(model).sample(STEPS, 1, noise.shape[1:], context, verbose=False, x_T=noise)[0]


class Kjsman(Peer):
    name, code = "stable-diffusion-pytorch", ("stable_diffusion_pytorch",)
    statement = "from stable_diffusion_pytorch import pipeline"
    method = (
        "EulerDiscreteScheduler",
        {k: v for k, v in DDIM.items() if k != "clip_sample"} | {"timestep_spacing": "linspace"},
    )

    def samplers(self) -> list[str]:
        found = importlib.import_module("stable_diffusion_pytorch.samplers")
        return [n.removesuffix("Sampler") for n in vars(found) if n.endswith("Sampler")]

    def unet(self) -> Callable[[Any, Any, Any], Any]:
        from stable_diffusion_pytorch import util
        from stable_diffusion_pytorch.diffusion import Diffusion

        model = Diffusion()
        model.load_state_dict(kjsman_names(self.original()))
        return lambda x, t, context: model(x, context, util.get_time_embedding(float(t)))

    def trajectory(self, unet: Any, noise: Any, context: Any) -> Any:
        from stable_diffusion_pytorch.samplers import KEulerSampler

        sampler = KEulerSampler(n_inference_steps=STEPS)
        x = noise * sampler.initial_scale
        for t in sampler.timesteps:
            x = sampler.step(x, unet((x * sampler.get_input_scale()).float(), t, context))
        return x.float()


# The original names of the UNet's parts, and kjsman's.
RENAMED = (
    ("attn1.to_out.0.", "attention_1.out_proj."),
    ("attn2.to_out.0.", "attention_2.out_proj."),
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("input_blocks.", "unet.encoders."),
    ("middle_block.", "unet.bottleneck."),
    ("output_blocks.", "unet.decoders."),
    ("out.0.", "final.groupnorm."),
    ("out.2.", "final.conv."),
    ("in_layers.0.", "groupnorm_feature."),
    ("in_layers.2.", "conv_feature."),
    ("emb_layers.1.", "linear_time."),
    ("out_layers.0.", "groupnorm_merged."),
    ("out_layers.3.", "conv_merged."),
    ("skip_connection.", "residual_layer."),
    ("proj_in.", "conv_input."),
    ("proj_out.", "conv_output."),
    ("transformer_blocks.0.", ""),
    ("norm1.", "layernorm_1."),
    ("norm2.", "layernorm_2."),
    ("norm3.", "layernorm_3."),
    ("attn2.to_q.", "attention_2.q_proj."),
    ("attn2.to_k.", "attention_2.k_proj."),
    ("attn2.to_v.", "attention_2.v_proj."),
    ("ff.net.0.proj.", "linear_geglu_1."),
    ("ff.net.2.", "linear_geglu_2."),
)


def kjsman_names(found: dict[str, Any]) -> dict[str, Any]:
    """The original's tensors under kjsman's names; q, k and v of self-attention are one matrix there."""
    import torch

    named: dict[str, Any] = {}
    for key, value in found.items():
        if ".attn1.to_q." in key:
            value = torch.cat([found[key.replace("to_q", f"to_{part}")] for part in "qkv"])
            key = key.replace("attn1.to_q.", "attention_1.in_proj.")
        elif ".attn1.to_k." in key or ".attn1.to_v." in key:
            continue
        for old, new in RENAMED:
            key = key.replace(old, new)
        named[key.replace(".norm.", ".groupnorm.").replace("op.", "")] = value
    return named


PEERS: dict[str, type[Peer]] = {p.name: p for p in (Minidiff, Diffusers, ComfyUI, Refiners, CompVis, Kjsman)}


def facts(peer: Peer) -> dict[str, Any]:
    """Count the environment of this peer beyond torch and torchvision, its own lines, its samplers."""
    needed = beyond_torch()
    site = Path(next(iter(importlib.metadata.distributions(name="torch"))).locate_file("")) if peer.package else None
    files = [f for part in peer.code for f in python_files((site or peer.source) / part)]
    return {
        "version": committed(peer.source) or importlib.metadata.version(peer.package),
        "packages": len(needed),
        "megabytes": sum(size(d) for d in needed) / 1e6,
        "lines": sum(1 for f in files for line in f.read_bytes().splitlines() if line.strip()),
        "samplers": peer.samplers(),
    }


def committed(source: Path) -> str:
    """The date of a checkout's commit, "" without one."""
    done = subprocess.run(["git", "-C", str(source), "log", "-1", "--format=%cs"], capture_output=True, text=True)
    return done.stdout.strip()


def python_files(path: Path) -> list[Path]:
    """The Python files of a folder or of a pattern."""
    return sorted(path.rglob("*.py") if path.is_dir() else path.parent.glob(path.name))


def size(distribution: importlib.metadata.Distribution) -> int:
    """Bytes of the installed files, compiled ones left out."""
    paths = [Path(str(f.locate())) for f in distribution.files or () if f.suffix != ".pyc"]
    return sum(p.stat().st_size for p in paths if p.is_file())


def plain(name: str) -> str:
    """The name of a distribution, in the one spelling that is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def beyond_torch() -> list[importlib.metadata.Distribution]:
    """Every distribution of this environment but those that torch and torchvision bring, and the installers."""
    there = {plain(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    brought, ahead = {"pip", "setuptools", "wheel"}, ["torch", "torchvision"]
    while ahead:
        name = ahead.pop()
        if name in there and name not in brought:
            brought.add(name)
            plainly = [r for r in there[name].requires or () if "extra ==" not in r]
            ahead += [plain(re.split(r"[^\w.-]", r, maxsplit=1)[0]) for r in plainly]
    # torch asks for its CUDA libraries through extras of one another.
    return [d for name, d in there.items() if name not in brought and not name.startswith(("nvidia-", "cuda-"))]


def imported(peer: Peer) -> dict[str, Any]:
    """The number of modules that the import loads beyond those of `import torch`."""
    import torch  # noqa: F401

    before = set(sys.modules)
    exec(peer.statement, {})
    return {"modules": len(set(sys.modules) - before)}


def inputs() -> tuple[Any, Any, Any]:
    """x (2, 4, h, w), t and context (2, 77, 768) of the UNet call that is compared."""
    import torch

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, SIDE // 8, SIDE // 8, generator=g)
    return x, torch.tensor(501), torch.randn(2, 77, 768, generator=g)


def reference(peer: Diffusers) -> dict[str, Any]:
    """Compute what all are compared with: diffusers' UNet, and its trajectory in the settings of each peer."""
    import torch
    from safetensors.torch import load_file, save_file

    # For peers that bring no reader of safetensors.
    single, prefix = load_file(peer.path("single")), "model.diffusion_model."
    torch.save({k.removeprefix(prefix): v for k, v in single.items() if k.startswith(prefix)}, peer.work / "unet.pt")
    del single
    # Keys as in the published folders; since transformers 5 they are written without this prefix, and both are read.
    text = peer.path("folder") / "text_encoder" / "model.safetensors"
    words = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}
    save_file(words, text, metadata={"format": "pt"})

    unet, (x, t, context) = peer.unet(), inputs()
    found = {"unet": unet(x, t, context), "prompt": peer.picture("folder")}
    for other in PEERS.values():
        same = [p.name for p in PEERS.values() if p.method == other.method and p.name in found]
        found[other.name] = found[same[0]] if same else peer.scheduled(unet, x[:1], context[:1], *other.method)
    torch.save(found, peer.work / "reference.pt")
    return {"std": found["unet"].std().item()}


def numbers(peer: Peer) -> dict[str, Any]:
    """Measure how far the UNet and the trajectory are from diffusers, relative to the standard deviation there."""
    import torch

    wanted, unet, (x, t, context) = torch.load(peer.work / "reference.pt"), peer.unet(), inputs()
    found = {"unet": apart(unet(x, t, context), wanted["unet"])}
    latents = peer.trajectory(unet, x[:1], context[:1])
    torch.save(latents, peer.work / f"{peer.name}.pt")
    return {**found, "trajectory": apart(latents, wanted[peer.name])}


def liked(peer: Minidiff) -> dict[str, Any]:
    """Measure how far minidiff's `like=` is from what the program itself gave in ``numbers``."""
    import torch

    found, (x, _, context) = {}, inputs()
    peer.unet()
    for name, program in (("ComfyUI", "comfyui:ddim_uniform"), ("CompVis", "ldm")):
        if (peer.work / f"{name}.pt").exists():
            theirs = torch.load(peer.work / f"{name}.pt")
            found[name] = apart(peer.like(program, x[:1], context[:1]), theirs)
    return found


def apart(a: Any, b: Any) -> float:
    """The largest difference, relative to the standard deviation of ``b``; 0 only if all bits are equal."""
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    return 0.0 if a.equal(b) else max((a - b).abs().max() / b.std(), 5e-324).item()


def opens(peer: Peer, which: str) -> dict[str, Any]:
    """Report whether the peer opens every part of that layout: random weights of a part would go unnoticed in a picture
    of random weights, so the prompt is compared.
    """
    import torch

    wanted = torch.load(peer.work / "reference.pt")["prompt"]
    return {"opens": apart(peer.picture(which).float(), wanted) < 1e-3}


STAGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "facts": facts,
    "import": imported,
    "folder": lambda peer: opens(peer, "folder"),
    "single": lambda peer: opens(peer, "single"),
    "reference": reference,
    "numbers": numbers,
    "like": liked,
}


def closed(*_: Any, **__: Any) -> Any:
    raise OSError("no network here")


def main(name: str, stage: str, work: str, source: str) -> None:
    socket.socket.connect = socket.getaddrinfo = closed  # type: ignore[assignment,method-assign]
    sys.path[0] = source  # in place of this folder
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for fill in ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_", "xavier_uniform_"):
        setattr(torch.nn.init, fill, lambda tensor, *_, **__: tensor)  # all weights come from the checkpoint
    peer = PEERS[name](Path(work), Path(source))
    try:
        said = STAGES[stage](peer)
    except Missing:
        said = {"missing": True}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
