"""Export networks at full width, and print how near to the model each is, the time, and the memory it took.

    python scripts/check_export.py [--family sd15,sd21,sdxl,ddpm] [--to torch,onnx,aoti] [--divide 1] [--parts unet]

Every network has the real shapes and random weights; ``--divide 4`` makes the UNets' widths a fourth, for a machine
with less memory or time. Each is exported in a process of its own, from weights that are mapped from a file. "made" is
the most memory that the process held when the export was written, beyond what imports and an empty model take, over the
size of the weights; "checked" the same after the export was read back and run. The exporters are imported by the export
of a single layer before that: their code takes some 150 MB, whatever the size of the network. onnx needs
`pip install 'minidiff[export]'`, aoti a C++ compiler and, at full width, a long time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _processes

PROGRAMS = {"vae": ("vae_encoder", "vae_decoder")}  # of a part, if not one by its name


def config_of(family: str, divide: int) -> Any:
    """Return the config of a family, the UNet's widths divided."""
    from minidiff import config as c

    one = {"schedule": c.ScheduleConfig(), "sampler": {"name": "ddim"}}
    text = {"vae": c.VAE_SD, "text_encoder": c.CLIP_L, "tokenizer": c.TokenizerConfig()}
    known = {
        "sd15": lambda: c.ModelConfig(family="sd1", unet=c.SD15, **text, **one),
        "sd21": lambda: c.ModelConfig(family="sd2", unet=c.SD21, **{**text, "text_encoder": c.OPENCLIP_H}, **one),
        "sdxl": lambda: c.ModelConfig(
            family="sdxl",
            unet=c.SDXL,
            **{**text, "vae": c.VAE_SDXL},
            text_encoder_2=c.OPENCLIP_BIGG,
            tokenizer_2=c.TokenizerConfig(pad=0),
            text_layer="penultimate",
            **one,
        ),
        "ddpm": lambda: c.ModelConfig(family="ddpm", unet=c.DDPM_CAT256, **one),
    }
    model = known[family]()
    levels = [replace(level, channels=level.channels // divide) for level in (*model.unet.levels, model.unet.mid)]
    unet = replace(model.unet, levels=tuple(levels[:-1]), mid=levels[-1], groups=model.unet.groups // divide)
    return replace(model, unet=unet)


def drawn(shape: tuple[int, ...], one: bool) -> Any:
    """Return a random weight: about 1 for a norm, and of a size that keeps the size of what passes through."""
    import torch

    noise = torch.randn(shape)
    return 1 + 0.1 * noise if one else 0.1 * noise if len(shape) == 1 else noise / (noise[0].numel() ** 0.5)


def write_weights(family: str, divide: int, part: str, file: Path) -> None:
    """Write random weights of one part, a tensor at a time."""
    from torch import nn

    from minidiff.storage.checkpoint import build
    from minidiff.storage.files import Lazy, write_tensors

    module = build(config_of(family, divide))[part]
    norms = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    state = {name: (tuple(p.shape), p.dtype) for name, p in module.state_dict().items()}
    tensors = {n: Lazy(s, dtype, partial(drawn, s, n in norms)) for n, (s, dtype) in state.items()}
    write_tensors(file, tensors, {})


def warm_up(to: str) -> None:
    """Export one layer, so that the code of the exporters is in memory."""
    import torch

    from minidiff.export import formats
    from minidiff.export.programs import Program

    one = Program("one", torch.nn.Linear(4, 4), {"input": ("batch", 4)}, ("out",))
    with tempfile.TemporaryDirectory() as folder:
        formats.write(to, one, formats.traced(one), Path(folder))


def export_one(family: str, divide: int, to: str, part: str, program: str, file: Path, work: Path) -> None:
    """Export one network, and print what was measured as a line of JSON."""
    import resource

    from minidiff.export import formats
    from minidiff.export.programs import programs
    from minidiff.storage.checkpoint import build
    from minidiff.storage.files import TensorFile

    def held() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    formats.need(to)
    config = config_of(family, divide)
    parts = build(config)
    made = next(p for p in programs(config, parts) if p.name == program)
    warm_up(to)
    before = held()
    weights = TensorFile(file).lazy
    parts[part].load_state_dict({name: entry.load() for name, entry in weights.items()}, assign=True)
    parts[part].requires_grad_(False)
    size = sum(entry.nbytes for entry in weights.values())
    begun = time.perf_counter()
    path = formats.write(to, made, formats.traced(made), work)
    seconds, most = time.perf_counter() - begun, held() - before
    gap = formats.measured(made, formats.reading(to, made, path))
    found = {"weights": size, "seconds": seconds, "made": most / size, "checked": (held() - before) / size, "gap": gap}
    print(json.dumps(found))


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--family", default="sd15,sd21,sdxl,ddpm", help="which, separated by commas")
    p.add_argument("--to", default="torch,onnx,aoti", help="which formats")
    p.add_argument("--divide", type=int, default=1, help="all widths of the UNets over this number (default: 1)")
    p.add_argument("--parts", default="unet", help="unet, vae, text_encoder, text_encoder_2 (default: unet)")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child is not None:
        told = json.loads(args.child)
        given = {**told, "file": Path(told["file"]), **({"work": Path(told["work"])} if "work" in told else {})}
        (export_one if "to" in told else write_weights)(**given)
        return
    print(f"{'family':8} {'program':14} {'to':6} {'weights':>9} {'made':>6} {'checked':>8} {'seconds':>8} {'gap':>9}")
    for family in args.family.split(","):
        for part in args.parts.split(","):
            with tempfile.TemporaryDirectory() as folder:
                one = {"family": family, "divide": args.divide, "part": part, "file": f"{folder}/weights.safetensors"}
                started(one)
                for program in PROGRAMS.get(part, (part,)):
                    for to in args.to.split(","):
                        work = Path(folder) / f"{program}-{to}"
                        work.mkdir()
                        told = {**one, "to": to, "program": program, "work": str(work)}
                        f = started(told).facts
                        row = f"{f['weights'] / 1e6:7,.0f}MB {f['made']:6.2f} {f['checked']:8.2f} {f['seconds']:8.0f}"
                        print(f"{family:8} {program:14} {to:6} {row} {f['gap']:9.2g}", flush=True)


def started(told: dict[str, Any]) -> _processes.Done:
    """Run this script as a child."""
    return _processes.run([sys.executable, __file__, "--child", json.dumps(told)])


if __name__ == "__main__":
    main()
