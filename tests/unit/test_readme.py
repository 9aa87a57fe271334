"""The code blocks of the READMEs and of CONTRIBUTING.md run, each page from top to bottom, in a folder that holds what
the page takes as given.

* ```python blocks share one namespace, as if typed into one session.
* In ```console and ```bash blocks the lines that call `minidiff`, `python -m minidiff` or `python -m weights_convert`
  are run (a leading `$ ` is the prompt, a backslash at the end joins two lines); other lines are output or set-up.
* A block right below `<!-- not run: REASON -->` is left out.
* What a block made is held against what the text says of it: see PAGES. All Python blocks pass `mypy --strict`.
* A block that trains does so for a few steps only: see SHORTER.

Of a checkpoint that a reader has on disk a tiny random one of the same kind and name lies in the folder: see PAGES.
Links and file names in the pages lead somewhere, and the front page stays short.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.pipeline.png import to_pil
from tests.support import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import _judge

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 200  # lines of the front page
# The commands are started in another folder, and find the checkout even where it is not installed.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
}

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*?-->\s*\Z", re.DOTALL)
SHORTER = {"steps = 600\n": "steps = 4\n"}  # lines of blocks, and what is run in their place
COMMANDS = (("minidiff",), ("python", "-m", "minidiff"), ("python", "-m", "weights_convert"))


@dataclass
class Block:
    language: str
    code: str
    line: int  # of its first line of code
    run: bool


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page of Markdown."""
    return [
        Block(
            language=found[1],
            code=found[2],
            line=text.count("\n", 0, found.start()) + 2,
            run=NOT_RUN.search(text, 0, found.start()) is None,
        )
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """The lines of a console block that are to be run, as arguments to the running Python."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True) if is_command(line) else []
        for start in COMMANDS:
            if tuple(words[: len(start)]) == start:
                module = start[-1]
                found.append(["-m", module, *words[len(start) :]])
    return found


def is_command(line: str) -> bool:
    return any(re.match(rf"(\$ )?{' '.join(start)}(\s|$)", line) for start in COMMANDS)


Check = Callable[[dict[str, Any], Path], None]


def run(text: str, name: str, folder: Path, namespace: dict[str, Any], said: Mapping[str, Check] | None = None) -> int:
    """Run the blocks of ``text``; how many. A failure names the line of the page. ``said``: what is checked after the
    first block that has a line of it, as long as the block's own names are there."""
    count, left = 0, dict(said or {})
    for block in blocks(text):
        if not block.run:
            continue
        if block.language == "python":
            code = block.code
            for line, shorter in SHORTER.items():
                code = code.replace(line, shorter)
            # Padded, so that a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + code, name, "exec", dont_inherit=True), namespace)
            count += 1
            for line in [line for line in left if line in block.code]:
                left.pop(line)(namespace, folder)
        elif block.language in ("console", "bash", "sh"):
            for command in commands(block):
                done = subprocess.run(
                    [sys.executable, *command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
                )
                what = f"{name}, block at line {block.line}: {' '.join(command)}"
                assert done.returncode == 0, f"{what} ended with {done.returncode}:\n{done.stderr}"
                count += 1
    assert not left, f"no block of {name} has {', '.join(left)}"
    return count


def minidiff_file(path: Path) -> None:
    """A tiny Stable Diffusion 1 in minidiff's own format."""
    tiny.random_model(tiny.SD).save(path)


def golden(path: Path) -> None:
    """The recording of a golden."""
    shutil.copy(ROOT / "tests" / "fixtures" / "goldens" / "sd1" / "recording.safetensors", path)


def diffusers_folder(path: Path) -> None:
    """A tiny Stable Diffusion 1 in the layout of diffusers; without diffusers the test is skipped."""
    pytest.importorskip("diffusers", reason="the page converts a folder that diffusers writes")
    from tests.support.parity.twins import folder_twin

    folder_twin(path)


STAR = "a large red star on a blue background"


def shows(picture: Any) -> bool:
    """True if a picture, PIL or tensor (1, 3, 64, 64) in [0, 1], shows the star, to a judge without learned model."""
    picture = to_pil(picture)[0] if isinstance(picture, torch.Tensor) else picture
    seen = _judge.see(np.asarray(picture, dtype=np.float64))
    return _judge.judge(seen, _judge.parse(STAR)).right


def first_picture(names: dict[str, Any], folder: Path) -> None:
    with Image.open(folder / "star.png") as saved:
        assert shows(saved)
    recipe = minidiff.read_recipe(folder / "star.png")
    assert (recipe["prompt"], recipe["seed"], recipe["guidance_scale"]) == (STAR, 0, 2.0)


def previews(names: dict[str, Any], folder: Path) -> None:
    assert names["step"].i == 19
    assert shows(names["preview"])


def loop(names: dict[str, Any], folder: Path) -> None:
    """The written-out loop paints what the library does, to the last bit."""
    want = names["sd"].generate(STAR, sampler="euler", steps=20, seed=0, output="tensor")
    assert torch.equal(names["pixels"], want)
    assert shows(names["pixels"])


def slip(names: dict[str, Any], folder: Path) -> None:
    assert names["report"].first.stage == "mid.res1.norm1"


def quick(names: dict[str, Any], folder: Path) -> None:
    """The plain model is plain again, and the pictures made with switches on show the same."""
    assert names["sd"].fast == ()
    again = names["sd"].generate(STAR, steps=20, seed=0, output="tensor")
    assert torch.equal(again, names["plain"])
    assert shows(names["quick"])


def own_sampler(names: dict[str, Any], folder: Path) -> None:
    """The sampler of the worked example is DDIM."""
    want = names["sd"].generate("a red star on a blue background", sampler="ddim", steps=4, seed=0, output="latent")
    assert torch.equal(names["latents"], want)


def own_switch(names: dict[str, Any], folder: Path) -> None:
    assert len(names["layers"]) > 10
    assert torch.equal(names["again"], names["latents"])
    assert all("forward" not in vars(layer) for layer in names["layers"])


def learned(names: dict[str, Any], folder: Path) -> None:
    """The loop ran to its end, and the sampling after it; four steps teach nothing."""
    assert names["step"] == 3
    assert 0 < names["loss"].item() < 3
    assert 0 < names["rates"].get_last_lr()[0] < 3e-3
    assert names["x"].isfinite().all()
    with Image.open(folder / "learned.png") as saved:
        assert saved.size == (1024, 64)


def test_a_shorter_block_is_one_of_a_page() -> None:
    assert all(line in "".join(block.code for block in blocks(read("README.md"))) for line in SHORTER)


def shown(names: dict[str, Any], folder: Path) -> None:
    assert shows(names["image"])


@dataclass(frozen=True)
class Page:
    """``given``: what its reader has already, a name in one of the blocks that run, and how to make it. ``said``: a
    line of a block, and what must be true of what the block made."""

    given: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    said: Mapping[str, Check] = field(default_factory=dict)


PAGES = {
    "README.md": Page(
        {"stable-diffusion-v1-5": diffusers_folder},
        {
            'minidiff.save_png(image, "star.png")': first_picture,
            "pixels = sd.decode(x)": loop,
            "loss.backward()": learned,
        },
    ),
    "minidiff/README.md": Page(
        said={'"sigma_spacing": "karras"': shown, "preview = sd.decode(step.x0)": previews},
    ),
    "minidiff/samplers/README.md": Page(),
    "minidiff/programs/README.md": Page({"sd15.safetensors": minidiff_file}, {'like="a1111:cpu"': shown}),
    "minidiff/pipeline/dialects/README.md": Page(said={'prompt_style="a1111"': shown}),
    "minidiff/parity/README.md": Page({"sd15.safetensors": minidiff_file}, {"mine.mid.res1.norm1.eps = 1e-5": slip}),
    "tests/fixtures/goldens/README.md": Page({"recording.safetensors": golden, "mine.safetensors": golden}),
    "minidiff/fast/README.md": Page(
        said={"fast.restore(sd)  # the plain model, bit for bit": quick, "guidance_interval=(0.2, 0.8)": shown},
    ),
    "minidiff/export/README.md": Page({"sd15.safetensors": minidiff_file}),
    "minidiff/training/README.md": Page(),
    "minidiff/explain/README.md": Page(),
    "weights_convert/README.md": Page({"stable-diffusion-v1-5": diffusers_folder}),
    "CONTRIBUTING.md": Page(said={"latents = sd.generate(": own_sampler, "layers = put_on(": own_switch}),
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, page = read(name), PAGES[name]
    used = "".join(block.code for block in blocks(text) if block.run)
    for given, make in page.given.items():
        assert re.search(rf"(?<![\w.-]){re.escape(given)}(?![\w.-])", used), f"no block of {name} uses {given}"
        make(tmp_path / given)
    monkeypatch.chdir(tmp_path)
    assert run(text, name, tmp_path, {"__name__": "__main__"}, page.said) > 0, f"{name} has no block that runs"


def test_python_blocks_are_typed(tmp_path: Path) -> None:
    """Each page as one program, with the blocks that are not run: what a reader types is what a type checker knows."""
    pytest.importorskip("mypy", reason="checks types")
    pages = {name: [block for block in blocks(read(name)) if block.language == "python"] for name in PAGES}
    assert any(not block.run for found in pages.values() for block in found)
    sessions = [tmp_path / f"session{k}.py" for k in range(len(pages))]
    for session, found in zip(sessions, pages.values(), strict=True):
        session.write_text("\n".join(block.code for block in found), encoding="utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import minidiff\nminidiff.StableDiffusion.load('a').generate('a', output='latent').sharpen()\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command.append("--allow-untyped-calls")  # torch's Tensor.backward has no types
    done = subprocess.run(
        [*command, *map(str, [*sessions, wrong])],
        cwd=ROOT,
        env={**ENVIRONMENT, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    told = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(told) == 1, f"pages in the order of {list(PAGES)}:\n{done.stdout}{done.stderr}"
    assert '"Tensor" has no attribute "sharpen"' in told[0]


def test_readme_names_the_two_commands() -> None:
    text = read("README.md")
    assert "python3 scripts/demo.py" in text
    assert "python3 scripts/test.py" in text


def test_the_front_page_is_short() -> None:
    assert len(read("README.md").splitlines()) <= LONGEST


def test_the_chinese_page_has_the_same_blocks_and_figures() -> None:
    pages = read("README.md"), read("README.zh.md")
    english, chinese = ([(block.language, block.code) for block in blocks(text)] for text in pages)
    assert english == chinese
    english, chinese = (re.findall(r"[0-9][0-9.,]*[0-9]|\]\([^)]+\)", FENCE.sub("", text)) for text in pages)
    assert Counter(english[1:]) == Counter(chinese[1:])  # but for the first link, each page's to the other one


COUNTED = "minidiff/README.md"  # the page that lists the core files with their lengths
ROW = re.compile(r"^\| \[[^]]*\]\(([^)]+\.py)\) \| \d+ \|", re.MULTILINE)
TOTAL = re.compile(r"\d+ files, [\d,]+ lines")


def counted(text: str) -> str:
    """``text`` of the page with the number of files, their lengths and the sum as they are today."""
    lengths = {path: len(read(f"minidiff/{path}").splitlines()) for path in ROW.findall(text)}
    text = ROW.sub(lambda row: re.sub(r"\d+ \|$", f"{lengths[row[1]]} |", row[0]), text)
    return TOTAL.sub(f"{len(lengths)} files, {sum(lengths.values()):,} lines", text)


def test_the_core_files_have_the_lengths_that_the_page_says() -> None:
    """Run ``python -m tests.unit.test_readme`` to write them anew."""
    text = read(COUNTED)
    assert len(ROW.findall(text)) == 13
    assert len(TOTAL.findall(text)) == 1
    assert text == counted(text)


def heading(line: str) -> str:
    """The anchor that a heading of Markdown gets."""
    return re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")


PAGES_WITHOUT_BLOCKS = ("README.zh.md", "minidiff/parity/SPECIFICATION.md", "scripts/recorders/README.md")


@pytest.mark.parametrize("name", [*PAGES, *PAGES_WITHOUT_BLOCKS])
def test_links_and_file_names_lead_somewhere(name: str) -> None:
    text, folder = FENCE.sub("", read(name)), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            lines = target.read_text(encoding="utf-8").splitlines()
            assert anchor in [heading(line) for line in lines if line.startswith("#")], f"{name}: {link}"
    named = re.findall(r"`(?:python3? )?((?:minidiff|weights_convert|scripts|tests)/[\w./]+)", read(name))
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert links or named


PAGE = """
# Title

```python
a = 1
```

<!-- not run: needs a card -->
```python
raise SystemExit
```

<!-- not run: of another block -->
Text between.

```python
b = a + 1
```

```console
$ pip install minidiff
$ minidiff --help
usage: minidiff ...
$ python -m weights_convert "a b" \\
    c  # comment
$ python3 -m minidiff --help
minidifference
```
"""


def test_blocks_are_found_and_skipped() -> None:
    found = blocks(PAGE)
    assert [(b.language, b.line, b.run) for b in found] == [
        ("python", 5, True),
        ("python", 10, False),
        ("python", 17, True),
        ("console", 21, True),
    ]
    assert commands(found[-1]) == [["-m", "minidiff", "--help"], ["-m", "weights_convert", "a b", "c"]]


def test_python_blocks_share_a_namespace(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    assert run(PAGE.split("```console")[0], "page", tmp_path, namespace) == 2
    assert namespace["b"] == 2


def test_a_broken_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n", "page", tmp_path, {})
    with pytest.raises(AssertionError, match="block at line 2: -m minidiff no-such-command ended with"):
        run("```bash\nminidiff no-such-command\n```\n", "page", tmp_path, {})


if __name__ == "__main__":
    (ROOT / COUNTED).write_text(counted(read(COUNTED)), encoding="utf-8")
