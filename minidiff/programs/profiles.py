"""Details that the papers leave open, as minidiff and five other programs settle them: facts with their source files.

Two programs that run "Euler, 20 steps, seed 1" on one checkpoint make different pictures, and neither is wrong: the
papers do not say at which timesteps to stop, what the first noise is multiplied by, or which generator draws it. A
:class:`Profile` lists the choices of one program. ``value`` is what this package acts upon (levels.py, img2img.py and
streams.py say what each stands for), ``says`` is for people, ``source`` is the file and the commit or release in which
it was read; a fact without one is printed as unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minidiff.samplers import SAMPLERS


class Source(NamedTuple):
    """A file, and the commit (of the repository or of a fork of it) or the release in which it was read."""

    where: str
    version: str

    def __str__(self) -> str:
        return f"{self.where} @ {self.version}"


class Fact(NamedTuple):
    """One choice of one program."""

    value: str
    says: str
    source: Source | None

    def __str__(self) -> str:
        return self.says if self.source else f"{self.says} (unverified)"


@dataclass(frozen=True)
class Method:
    """Settings with which a program runs a sampler: the equivalent one of ours, its options (ours, or a scheduler
    config of diffusers), True for ``discard`` if the last but one sigma is left out, and the ``last`` sigma."""

    sampler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    discard: bool = False
    last: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Choices of one program. The facts are in the order in which a run meets them.

    ``methods``: the settings of each sampler, by our names. ``schedulers``: the schedules of sigma that it offers, its
    default first.
    """

    name: str
    program: str
    table: Fact  # of alpha_bar and sigma
    spacing: Fact
    offset: Fact
    final: Fact
    told: Fact  # the timestep that the model gets
    scale: Fact  # of the first noise
    device: Fact
    order: Fact
    later: Fact  # the noise of the steps
    brownian: Fact
    guidance: Fact
    start: Fact  # of image to image
    methods: Mapping[str, Method]
    schedulers: tuple[str, ...] = ()


FIELDS = {
    "table": ("table of alpha_bar and sigma", "last bits of every number that follows"),
    "spacing": ("spacing", "which noise levels are visited: the largest difference of all"),
    "offset": ("offset", "the whole walk shifted by one timestep"),
    "final": ("where the last step lands", "a little noise left over, or none"),
    "told": ("timestep that the model is told", "the network's other input"),
    "scale": ("first noise times", "0.2 % of its size at sigma 14.6"),
    "device": ("noise drawn on", "another algorithm, so another picture altogether"),
    "order": ("order of draws", "what a seed means for the second picture of a batch"),
    "later": ("noise of the steps", "another picture, for ancestral and SDE samplers"),
    "brownian": ("noise of DPM++ SDE", "the same"),
    "guidance": ("guidance off", "whether the negative prompt is asked at all; at 0 even the mathematics"),
    "start": ("image to image", "steps made, and the noise that they begin with"),
}
"""The facts of a profile: attribute -> its heading, and what a difference there does to the picture."""


OWN = "this package"
M_SCHEDULE = Source("minidiff/schedule.py", OWN)
M_LEVELS = Source("minidiff/samplers/levels.py", OWN)
M_NOISE = Source("minidiff/noise.py", OWN)
M_SDE = Source("minidiff/samplers/dpmpp_sde.py", OWN)
M_PROGRAMS = Source("minidiff/programs/__init__.py", OWN)
M_IMG2IMG = Source("minidiff/programs/img2img.py", OWN)

DIFFUSERS = "diffusers 0.42.1"
DF_EULER = Source("src/diffusers/schedulers/scheduling_euler_discrete.py", DIFFUSERS)
DF_DDIM = Source("src/diffusers/schedulers/scheduling_ddim.py", DIFFUSERS)
DF_PIPELINE = Source("src/diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py", DIFFUSERS)
DF_IMAGE = Source("src/diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_img2img.py", DIFFUSERS)
DF_RANDN = Source("src/diffusers/utils/torch_utils.py", DIFFUSERS)
DF_SDE = Source("src/diffusers/schedulers/scheduling_dpmsolver_sde.py", DIFFUSERS)

LDM_UTIL = Source(
    "CompVis/latent-diffusion ldm/modules/diffusionmodules/util.py", "1dbf39c16249a342821bfeb9c0f1e56c613a361c"
)
LDM_DDPM = Source("CompVis/stable-diffusion ldm/models/diffusion/ddpm.py", "0258d8576670d1536c78eee50790c02154e9f0e0")
LDM_DDIM = Source("CompVis/stable-diffusion ldm/models/diffusion/ddim.py", "0ede0af65acd3a7c4bb48e5783b6741a3ec63586")
LDM_TEXT = Source("CompVis/stable-diffusion scripts/txt2img.py", "0532f7a933da22b0d45226966aba3da1304ab360")
LDM_IMAGE = Source("CompVis/stable-diffusion scripts/img2img.py", "07c956411425ac423518a79423d6c39cb1c7d2dd")

KD = "k-diffusion 0.1.1.post1"
KD_EXTERNAL, KD_SAMPLING = Source("k_diffusion/external.py", KD), Source("k_diffusion/sampling.py", KD)
KD_SAMPLE = Source("crowsonkb/k-diffusion sample.py", "43d3e99f36d21787ec2174b2175dc5185810d6a6")

A1111 = "AUTOMATIC1111/stable-diffusion-webui modules/"
A_KD = Source(A1111 + "sd_samplers_kdiffusion.py", "5ef669de080814067961f28357256e8fe27544f4 (v1.6.0)")
A_TIMES = Source(A1111 + "sd_samplers_timesteps.py", "1c77b18ac8971769dfc96fd79cb4e34b9a12555e")
A_DDIM = Source(A1111 + "sd_samplers_timesteps_impl.py", "2035cbbd5d6e7678450c701fce1a5de7d8bd7084")
A_COMMON = Source(A1111 + "sd_samplers_common.py", "044494d914f40cbbdfa32f518855cd65eebb44c9")
A_CFG = Source(A1111 + "sd_samplers_cfg_denoiser.py", "029adbe5318b57c04dbc0d92273cce38e1ecf457")
A_RNG = Source(A1111 + "rng.py", "0d5dc9a6e7f6362e423a06bf0e75dd5854025394")
A_OPTIONS = Source(A1111 + "shared_options.py", "0027ce1f6e58c5f4279173e468a60aef420babfe")

C_SAMPLERS = Source("Comfy-Org/ComfyUI comfy/samplers.py", "e0d4ea77a9f6fda218619802b8c4e83cda5db082")
C_MODEL = Source("Comfy-Org/ComfyUI comfy/model_sampling.py", "2fd2083913be0894287f5f1d2abef8c5f94d1d0a")
C_NOISE = Source("comfyanonymous/ComfyUI comfy/sample.py", "b5346a022910e33b1b5d28a86c58b23c21657c83")
C_KD = Source("comfyanonymous/ComfyUI comfy/k_diffusion/sampling.py", "02159d814dee609acc27994c1bf25fc5b40e2aaa")
C_UNIPC = Source("Comfy-Org/ComfyUI comfy/extra_samplers/uni_pc.py", "0748e38fa2a1ba652be82b00b4c9478cb9df8bb9")


# The scheduler_config.json of Stable Diffusion 1, but for the class: what Scheduler.from_config(pipe.scheduler.config)
# hands over. What it does not name is the class's own default: linspace spacing for the methods in sigma.
SD = {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
CLASSES: dict[str, dict[str, Any]] = {
    "ddpm": {"_class_name": "DDPMScheduler"},
    "ddim": {"_class_name": "DDIMScheduler"},
    "pndm": {"_class_name": "PNDMScheduler"},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "euler_ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    "lms": {"_class_name": "LMSDiscreteScheduler"},
    "dpm2": {"_class_name": "KDPM2DiscreteScheduler"},
    "dpm2_ancestral": {"_class_name": "KDPM2AncestralDiscreteScheduler"},
    "dpmpp_2m": {"_class_name": "DPMSolverMultistepScheduler"},
    "dpmpp_2m_sde": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    "dpmpp_3m_sde": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
    },
    "dpmpp_2s": {"_class_name": "DPMSolverSinglestepScheduler"},
    "dpmpp_sde": {"_class_name": "DPMSolverSDEScheduler"},
    "deis": {"_class_name": "DEISMultistepScheduler"},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "sa_solver": {"_class_name": "SASolverScheduler"},
    "lcm": {"_class_name": "LCMScheduler"},
    "tcd": {"_class_name": "TCDScheduler"},
}


def _as_k_diffusion(*names: str, discard: tuple[str, ...] = ()) -> dict[str, Method]:
    """k-diffusion's samplers under our names. Its multistep methods keep their order up to the last step, to sigma 0,
    which is of order 1."""
    full = {"lower_order_final": False}
    multistep = {"dpmpp_2m": full, "dpmpp_2m_sde": full, "dpmpp_3m_sde": full}
    return {name: Method(name, multistep.get(name, {}), name in discard) for name in names}


KD_NAMES: tuple[str, ...] = ("euler", "euler_ancestral", "heun", "lms", "dpm2", "dpm2_ancestral", "dpmpp_sde")
KD_NAMES += ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
PLMS_DDIM = {"ddim": Method("ddim"), "pndm": Method("pndm")}
ROUNDED = "float64, alpha_bar rounded to float32"
STRIDED = "each T // steps: more rows than steps where those do not divide T"

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="minidiff",
            program="minidiff; a checkpoint's own sampler comes with its own options",
            table=Fact("float32", "float32 throughout", M_SCHEDULE),
            spacing=Fact("class", "the sampler's option: leading by default", M_LEVELS),
            offset=Fact("class", "the sampler's option: 1 by default", M_LEVELS),
            final=Fact("class", "alpha_bar of timestep 0 (DDIM, PNDM); sigma 0", M_LEVELS),
            told=Fact("sampler", "whole; fractional between timesteps", M_LEVELS),
            scale=Fact("sampler", "1; the largest sigma for Euler and its kin", M_LEVELS),
            device=Fact("cpu", "the CPU, in float32", M_NOISE),
            order=Fact("image", "a generator for each picture, seeds s, s + 1, ...", M_NOISE),
            later=Fact("same", "the same generators go on", M_NOISE),
            brownian=Fact("none", "a Brownian tree with a seed of its own", M_SDE),
            guidance=Fact("except 1", "at exactly 1", M_PROGRAMS),
            start=Fact("diffusers", "int(steps * strength) steps, from the level of the first of them", M_IMG2IMG),
            methods={name: Method(name) for name in SAMPLERS},
        ),
        Profile(
            name="diffusers",
            program="diffusers 0.42.1, with the scheduler_config.json of Stable Diffusion 1",
            table=Fact("float32", "float32 throughout", DF_EULER),
            spacing=Fact("class", "leading for DDIM and PNDM; linspace for the others", DF_EULER),
            offset=Fact("1", "1, for leading spacing only", DF_DDIM),
            final=Fact("alpha_bar[0]", "alpha_bar of timestep 0 (DDIM, PNDM); sigma 0", DF_DDIM),
            told=Fact("sampler", "whole; fractional for Euler and its kin", DF_EULER),
            scale=Fact("sampler", "1; the largest sigma for Euler and its kin", DF_EULER),
            device=Fact("cpu", "the generator's device: the CPU, if that is asked for", DF_RANDN),
            order=Fact("batch", "one generator, the whole batch in one draw", DF_RANDN),
            later=Fact("same", "the same generator goes on", DF_RANDN),
            brownian=Fact("global", "a Brownian tree, seeded from torch's global generator", DF_SDE),
            guidance=Fact("above 1", "at 1 and below, where the prompt alone counts", DF_PIPELINE),
            start=Fact("diffusers", "int(steps * strength) steps, from the level of the first of them", DF_IMAGE),
            methods={name: Method(name, {**SD, **config}) for name, config in CLASSES.items()},
        ),
        Profile(
            name="ldm",
            program="CompVis' stable-diffusion: DDIM and PLMS",
            table=Fact("rounded", ROUNDED, LDM_DDPM),
            spacing=Fact("strided", STRIDED, LDM_UTIL),
            offset=Fact("1", "1", LDM_UTIL),
            final=Fact("alpha_bar[0]", "alpha_bar of timestep 0", LDM_UTIL),
            told=Fact("sampler", "whole", LDM_DDIM),
            scale=Fact("sampler", "1", LDM_DDIM),
            device=Fact("gpu", "the GPU", LDM_DDIM),
            order=Fact("batch", "the global generator, the whole batch in one draw", LDM_TEXT),
            later=Fact("same", "the same generator goes on (DDIM draws at every step, at eta 0 for nothing)", LDM_DDIM),
            brownian=Fact("none", "no such sampler", LDM_TEXT),
            guidance=Fact("except 1", "at exactly 1", LDM_DDIM),
            start=Fact("ldm", "int(strength * steps) steps, from the level one row above the first", LDM_IMAGE),
            methods=PLMS_DDIM,
        ),
        Profile(
            name="k-diffusion",
            program="k-diffusion 0.1.1.post1, a CompVisDenoiser around the model",
            table=Fact("rounded", ROUNDED + ", sigma of that in float32", KD_EXTERNAL),
            spacing=Fact("uniform", "from T - 1 to 0 evenly, log sigma interpolated", KD_EXTERNAL),
            offset=Fact("0", "0", KD_EXTERNAL),
            final=Fact("sigma 0", "sigma 0", KD_EXTERNAL),
            told=Fact("fractional", "fractional, by log sigma", KD_EXTERNAL),
            scale=Fact("sigma", "the largest sigma", KD_SAMPLE),
            device=Fact("gpu", "the sample's device: the GPU", KD_SAMPLE),
            order=Fact("batch", "the global generator, the whole batch in one draw", KD_SAMPLE),
            later=Fact("same", "the same generator goes on", KD_SAMPLING),
            brownian=Fact("global", "a Brownian tree, seeded from torch's global generator", KD_SAMPLING),
            guidance=Fact("except 1", "none of its own: the caller's", KD_EXTERNAL),
            start=Fact("none", "none of its own", KD_SAMPLING),
            methods=_as_k_diffusion(*KD_NAMES),
            schedulers=("uniform", "karras", "exponential"),
        ),
        Profile(
            name="a1111",
            program="AUTOMATIC1111's stable-diffusion-webui 1.6",
            table=Fact("rounded", "as ldm; a model in float16 may round it further", None),
            spacing=Fact("uniform", "k-diffusion's; DDIM and PLMS each T // steps", A_KD),
            offset=Fact("1", "0; DDIM and PLMS 1", A_TIMES),
            final=Fact("sigma 0", "sigma 0; DDIM and PLMS stop at timestep 1, whose step they leave out", A_DDIM),
            told=Fact("fractional", "fractional, by log sigma; DDIM and PLMS whole", A_KD),
            scale=Fact("sigma", "the largest sigma; DDIM and PLMS 1", A_KD),
            device=Fact("gpu", "the GPU; an option says CPU, or NV, CUDA's stream computed on the CPU", A_OPTIONS),
            order=Fact("image", "a generator for each picture, seeds s, s + 1, ...", A_RNG),
            later=Fact("same", "the same generators go on", A_RNG),
            brownian=Fact("image", "a Brownian tree for each picture, with its seed", A_COMMON),
            guidance=Fact("never", "never: both prompts are always asked", A_CFG),
            start=Fact("a1111", "int(strength * steps) + 1 steps, strength 0.999 at most", A_COMMON),
            methods={
                **{name: Method(name, method.options) for name, method in PLMS_DDIM.items()},
                **_as_k_diffusion(*KD_NAMES, discard=("dpm2", "dpm2_ancestral", "dpmpp_3m_sde")),
            },
            schedulers=("uniform", "karras", "exponential"),
        ),
        Profile(
            name="comfyui",
            program="ComfyUI, its KSampler",
            table=Fact("float64", "float64, sigma rounded to float32", C_MODEL),
            spacing=Fact(
                "simple", "each T / steps-th sigma from the top, the lowest never (scheduler simple)", C_SAMPLERS
            ),
            offset=Fact("0", "0", C_SAMPLERS),
            final=Fact("sigma 0", "sigma 0; UniPC 0.001; DPM2 and UniPC leave out the last but one sigma", C_UNIPC),
            told=Fact("nearest", "whole: the nearest in log sigma", C_MODEL),
            scale=Fact("max", "sqrt(sigma ** 2 + 1) from the largest sigma, else sigma", C_MODEL),
            device=Fact("cpu", "the CPU", C_NOISE),
            order=Fact("batch", "one generator, the whole batch in one draw", C_NOISE),
            later=Fact("restarted", "a new generator of the seed, on the GPU (on a CPU of seed + 1)", C_KD),
            brownian=Fact("batch", "a Brownian tree for the batch, with the seed, on the CPU", C_KD),
            guidance=Fact("about 1", "at 1, within 1e-9", C_SAMPLERS),
            start=Fact("comfyui", "all steps, the last of int(steps / strength)", C_SAMPLERS),
            methods={
                "ddim": Method("euler"),
                **_as_k_diffusion(*KD_NAMES, discard=("dpm2", "dpm2_ancestral")),
                "unipc": Method("unipc", {"solver_type": "bh1", "solver_order": 3}, discard=True, last=0.001),
            },
            schedulers=("simple", "normal", "karras", "exponential", "sgm_uniform", "ddim_uniform", "beta"),
        ),
    )
}
