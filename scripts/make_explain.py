"""Make the course page of the bundled model: `python scripts/make_explain.py [--out FILE]`.

It is what `minidiff explain` writes of one prompt, both languages in one page. `--list` also writes the table of
questions in minidiff/explain/README.md anew, from the page; `--picture` the small picture of a part (with Chromium).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minidiff.cli import main as minidiff_command

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle left of a blue star on a white background"
README, PICTURE = ROOT / "minidiff" / "explain" / "README.md", ROOT / "scripts" / "explain_picture.webp"
BEGIN, END = "| question | panel | anchor |\n|---|---|---|\n", "\n\n"
WIDE, HIGH, SHOWN = 1100, 2600, 720  # pixels: of the window, and of the picture's width
PART = (10, 1150, 1090, 1760)  # of the window: the maps of the words
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("explain.html"), help="where the page goes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--list", action="store_true", help="write the README's table of questions anew")
    parser.add_argument("--picture", action="store_true", help="write the small picture of the page anew")
    args = parser.parse_args()
    status = page(args.out, args.steps)
    if status:
        return status
    if args.list:
        text = README.read_text("utf-8")
        before, rest = text.split(BEGIN)
        rows = [
            f"| {words} | {panel} | `#{anchor}` |" for anchor, panel, words in questions(args.out.read_text("utf-8"))
        ]
        README.write_text(before + BEGIN + "\n".join(rows) + END + rest.split(END, 1)[1], "utf-8")
    return picture(args.steps) if args.picture else 0


def page(out: Path, steps: int, *more: str) -> int:
    """Write the page, and return the command's exit status."""
    asked = ["explain", PROMPT, "--steps", str(steps), "--seed", "3", "--out", str(out), "--force", *more]
    return minidiff_command(asked)


def questions(html: str) -> list[tuple[str, str, str]]:
    """Return anchor, panel and English words of every question in a page, in its order."""
    found, panel = [], ""
    section = r'<section id="([\w-]+)" class="(panel|answer)[^"]*">(?:<h[23] lang="en">(.*?)</h[23]>)?'
    for anchor, kind, words in re.findall(section, html, re.S):
        if kind == "panel":
            panel = anchor
        elif anchor.startswith("q-"):
            found.append((anchor, panel, unescape(re.sub(r"</?code>", "`", words))))
    return found


def picture(steps: int) -> int:
    """Write a picture of a part of the panel of words."""
    from PIL import Image

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("there is no Chromium; the picture is as it was", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        shot, words = Path(folder) / "shot.png", Path(folder) / "words.html"
        page(words, steps, "--panels", "words", "--quiet")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        window = [f"--window-size={WIDE},{HIGH}", f"--screenshot={shot}", words.as_uri()]
        subprocess.run([browser, *options, *window], check=True, capture_output=True)
        whole = Image.open(shot).convert("RGB").crop(PART)
    small = whole.resize((SHOWN, round(whole.height * SHOWN / whole.width)), Image.Resampling.LANCZOS)
    small.save(PICTURE, quality=70, method=6)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
