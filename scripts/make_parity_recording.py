"""Write tests/fixtures/recording_sd1.safetensors: a run of diffusers on a tiny model, as a recording.

The model is that of tests/support/tiny.py, whose weights come from a seed; written as a diffusers folder, it is opened
and run by the installed diffusers. tests/unit/test_parity_recording.py lets minidiff run the same and compares, without
diffusers. Needs the `parity` extra.

    python scripts/make_parity_recording.py [FILE]            # writes the fixture, or FILE
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from minidiff.parity import recording, theirs  # noqa: E402
from minidiff.parity.command import pair, run_of  # noqa: E402
from minidiff.parity.ours import asked  # noqa: E402
from tests.support.convert_sources import write_folder  # noqa: E402
from tests.support.tiny import tiny_sd  # noqa: E402
from weights_convert.module_names import module_names  # noqa: E402

FIXTURE = ROOT / "tests" / "fixtures" / "recording_sd1.safetensors"
REQUEST = asked("a red fox", negative_prompt="blurry", steps=3, seed=5, width=24, height=16)
END = "<|endoftext|>"
TOKENIZER = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": END, "pad_token": END}


def layers_of(scope: str) -> bool:
    """Select the UNet's layers in the first step; more would make the file large."""
    return scope == "step.0"


def tiny_folder(folder: Path) -> Path:
    """Write the tiny model as a folder that diffusers opens."""
    write_folder(folder)
    config = {**TOKENIZER, "bos_token": "<|startoftext|>", "eos_token": END}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def reference(folder: Path) -> tuple[Any, dict[str, dict[str, str]]]:
    """Return diffusers' pipeline of the tiny model, and the names of its modules by those of minidiff's."""
    pipe = theirs.open_pipeline(folder, torch.float32, "cpu")
    ours = tiny_sd()
    return pipe, pair(ours.parts, pipe, module_names(ours.config))


def main() -> None:
    """Write the recording."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURE
    diffusers = theirs.import_diffusers()
    with tempfile.TemporaryDirectory() as folder:
        pipe, pairs = reference(tiny_folder(Path(folder)))
        title = f"diffusers {diffusers.__version__}"
        side = theirs.Theirs(pipe, REQUEST, theirs.renamed(pairs), layers_of, title)
        found = recording.record(side, run_of(tiny_sd(), REQUEST))
    recording.write_recording(target, found)
    print(f"{target}: {len(found.tape)} stages, {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
