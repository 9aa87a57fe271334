"""Compare minidiff with other ways to run Stable Diffusion from Python, and print the table of the README.

    python scripts/compare_peers.py --peers FOLDER                        # all that are there
    python scripts/compare_peers.py --peers FOLDER --only minidiff ComfyUI

Every peer lives in an environment of its own, FOLDER/NAME, with a checkout of its source in FOLDER/NAME/source if it
is no package; one that is not there is left out, with a line that says what to install. Needs the `parity` extra, which
writes Stable Diffusion 1.5 with random weights as a folder and as an original single file (6 GB, kept in --work), and
the peer diffusers, with which the others are compared. Everything measured is kept in a file, which a later start goes
on from: delete it to begin anew. Each question is a process of its own on one thread, with no
network; nothing in the table is written down here but the names. "equal" means equal bits; other differences are the
largest one divided by the reference's standard deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _peers import PEERS, STEPS

ROOT = Path(__file__).resolve().parent.parent
REFERENCE, OURS = "diffusers", "minidiff"
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
OPENING = ("folder", "single")
CHILD = ROOT / "scripts" / "_peers.py"

# What brings a peer into its environment, once `python -m venv FOLDER/NAME` has made it.
INSTALL = {
    "minidiff": "pip install CHECKOUT, a path to minidiff itself",
    "diffusers": "pip install 'diffusers[torch]==0.42.1' transformers==5.23.0",
    "ComfyUI": "a checkout of github.com/Comfy-Org/ComfyUI as SOURCE; pip install -r SOURCE/requirements.txt",
    "refiners": "a checkout of github.com/finegrain-ai/refiners as SOURCE;"
    " pip install 'SOURCE[conversion]' torchvision",
    "CompVis": "a checkout of github.com/CompVis/stable-diffusion as SOURCE; pip install torch torchvision einops"
    " omegaconf tqdm",
    "stable-diffusion-pytorch": "a checkout of github.com/kjsman/stable-diffusion-pytorch as SOURCE;"
    " pip install -r SOURCE/requirements.txt torchvision",
}


class Place:
    """Place of a peer, and the way it is asked."""

    def __init__(self, name: str, peers: Path, work: Path) -> None:
        self.name, self.work = name, work
        self.python = peers / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.source = peers / name / "source"

    def missing(self) -> str | None:
        """The line that says what to install, or None."""
        if self.python.exists() and (PEERS[self.name].package or self.source.exists()):
            return None
        return f"{self.name}: not in {self.python.parent.parent} (needed there: {INSTALL[self.name]})"

    def command(self, stage: str) -> list[str]:
        return [str(self.python), str(CHILD), self.name, stage, str(self.work), str(self.source)]

    def ask(self, stage: str) -> dict[str, Any]:
        """Return what the stage said. A checkpoint that does not open is an answer; other failures end the program."""
        print(f"{self.name}: {stage}", file=sys.stderr)
        done = subprocess.run(self.command(stage), env=ENV, capture_output=True, text=True, cwd=self.work)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if stage not in OPENING:
            raise SystemExit(f"{done.stderr}{self.name} failed in {stage}; what was measured is kept")
        return {"opens": False, "error": done.stderr.strip().splitlines()[-1:]}


def measure(places: dict[str, Place], kept: Path) -> dict[str, dict[str, Any]]:
    """Everything about every peer: {name: {stage: what it said}}. What ``kept`` holds is not measured again."""
    known: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}

    def ask(name: str, *stages: str) -> None:
        for stage in stages:
            if stage not in known.setdefault(name, {}):
                known[name][stage] = places[name].ask(stage)
                kept.write_text(json.dumps(known, indent=1))

    ask(REFERENCE, "reference")
    for name in places:
        ask(name, "facts", "import", *OPENING, "numbers")
    if OURS in places:  # anew, since what it is held against may be new
        known[OURS]["like"] = places[OURS].ask("like")
    return {name: known[name] for name in places}


def gap(value: float) -> str:
    return "equal" if value == 0 else f"{value:.1e}"


def opened(said: dict[str, Any]) -> str:
    """Which of the two layouts gave a picture."""
    found = [word for stage, word in (("folder", "folder"), ("single", "file")) if said[stage].get("opens")]
    return " and ".join(found) or ("" if said["single"].get("missing") else "none")


def column(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """A peer's cells, in the order of ROWS."""
    said = found[name]
    facts, numbers, like = said["facts"], said["numbers"], found.get(OURS, {}).get("like", {})
    own = name == REFERENCE
    return [
        f"{facts['packages']}, {facts['megabytes']:.0f} MB",
        f"{facts['lines']:,}; {said['import']['modules']:,}",
        str(len(facts["samplers"])),
        opened(said),
        "" if own else f"{gap(numbers['unet'])}; {gap(numbers['trajectory'])}",
        gap(like[name]) if name in like else "",
    ]


ROWS = (
    "packages beside torch's own",
    "lines of Python; modules that the import loads beside torch's",
    "samplers listed",
    "paints offline from diffusers' folder, from the original single file",
    f"UNet; {STEPS} steps of DDIM: against diffusers",
    "these steps, against minidiff with `like=`",
)


def table(found: dict[str, dict[str, Any]]) -> str:
    """The README's table in Markdown."""
    head = [f"{name} {said['facts']['version']}".strip() for name, said in found.items()]
    cells = zip(ROWS, *(column(name, found) for name in found), strict=True)
    lines = [["", *head], ["---"] * (len(found) + 1), *map(list, cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=ROOT / "out" / "peers", help="the folder of environments")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "full_size", help="where the checkpoints go")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="of the peers")
    parser.add_argument("--json", type=Path, help="keep what is measured there, and go on from what it holds")
    args = parser.parse_args()
    places = {name: Place(name, args.peers.absolute(), args.work.absolute()) for name in PEERS}
    asked = [name for name in PEERS if name in (*args.only, REFERENCE)]
    for name in asked:
        if line := places[name].missing():
            print(line, file=sys.stderr)
    there = {name: places[name] for name in asked if places[name].missing() is None}
    if REFERENCE not in there:
        return 1
    if not (args.work / "single.safetensors").exists():
        args.work.mkdir(parents=True, exist_ok=True)
        stage = ["--work", str(args.work), "--stage", "write source with diffusers"]
        subprocess.run([sys.executable, str(ROOT / "scripts" / "check_full_size.py"), *stage], env=ENV, check=True)
    print(table(measure(there, args.json or args.work / "peers.json")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
