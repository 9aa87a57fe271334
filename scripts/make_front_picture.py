"""Make the picture at the top of the README: `python scripts/make_front_picture.py`.

It shows six prompts, and below each picture the words from which the bundled model painted it.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import minidiff
from minidiff.pipeline.png import to_pil

PATH = Path(__file__).resolve().parent / "front_picture.webp"
SIDE, GAP, CAPTION = 160, 12, 60  # pixels: of a picture as it is shown, between two, and of the text below
SEED = 2
PROMPTS = (
    "a large red star on a blue background",
    "a small yellow circle on a black background",
    "a green triangle on a white background",
    "a red circle left of a blue square on a white background",
    "a yellow ring above a green cross on a black background",
    "a blue cross left of an orange square on a gray background",
)


def main() -> None:
    torch.set_num_threads(1)
    sd = minidiff.bundled()
    pictures = [to_pil(sd.generate(prompt, steps=25, seed=SEED, output="tensor"))[0] for prompt in PROMPTS]
    whole = Image.new("RGB", (len(PROMPTS) * (SIDE + GAP) + GAP, SIDE + GAP + CAPTION), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for k, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        left = GAP + k * (SIDE + GAP)
        whole.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, GAP))
        draw.rectangle((left, GAP, left + SIDE - 1, GAP + SIDE - 1), outline="lightgray")
        draw.text((left, GAP + SIDE + 4), textwrap.fill(prompt, 27), fill="black", font=font)
    whole.save(PATH, quality=90, method=6)
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
