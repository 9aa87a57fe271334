"""Views of a run beside its pictures: strips, films, previews, grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import minidiff
from minidiff import cli, read_recipe
from minidiff.cli import grid as grids
from minidiff.models.clip import CLIPText
from minidiff.pipeline import preview as previews
from minidiff.pipeline.encodings import Encoded, encoded_once
from minidiff.pipeline.film import Film
from minidiff.pipeline.montage import SMALLEST, enlarged, table
from minidiff.pipeline.preview import Preview
from minidiff.pipeline.request import Request
from tests.support.command import Run, one_error
from tests.support.tiny import tiny_ddpm, tiny_sd, tiny_xl

COMMON = ("--seed", 3, "--quiet")


def colour(*rgb: int, side: int = 10) -> Image.Image:
    return Image.new("RGB", (side, side), rgb)


def test_a_table_of_pictures() -> None:
    """Every cell is where its row and column meet; labels take the room that they need, and none without one."""
    cells = [[colour(255, 0, 0), colour(0, 255, 0)], [colour(0, 0, 255), colour(9, 9, 9)]]
    bare = table(cells, ["", ""], ["", ""])
    side = enlarged(cells[0][0]).width
    assert SMALLEST <= side < SMALLEST + 10
    assert bare.size == (2 * side, 2 * side)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            assert bare.getpixel((j * side + 5, i * side + 5)) == cell.getpixel((0, 0))
    labelled = table(cells, ["steps 10", "a long label of many words in several lines"], ["euler", "ddim"])
    left, top = labelled.width - 2 * side, labelled.height - 2 * side
    draw = ImageDraw.Draw(labelled)
    assert left == 4 + int(max(draw.textbbox((0, 0), label)[2] for label in ("euler", "ddim"))) + 4
    assert top > 20
    assert labelled.getpixel((left + side + 5, top + side + 5)) == (9, 9, 9)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_film_keeps_some_steps(sampler: str) -> None:
    """The last one among them; samples that a method multiplies are shown as the model sees them."""
    sd = tiny_sd()
    run = sd.run(Request("a fox", steps=7, seed=1, sampler=sampler))
    film = Film(sd, run, 3)
    for step in run:
        film(step)
        scale = float(film.visible(step).std() / step.x.std())
        if step.i < run.rows[3]:
            assert (scale < 0.9) == (sampler == "euler")
    assert [run.rows.index(i) + 1 for i in film.kept] == [2, 4, 7]
    _, x = film.kept[run.rows[-1]]
    assert torch.equal(x, run.last().x)
    (strip,) = film.strips()
    assert strip.height > 2 * SMALLEST
    assert len(film.frames()[0]) == 3


def test_a_preview_is_near_the_picture(tmp_path: Path) -> None:
    """Of the bundled model: the colours of the small picture are those of the decoded one, made as small."""
    sd = minidiff.bundled(device="cpu")
    run = sd.run(Request("a large red star on a blue background", steps=10, seed=3))
    latents = run.last().x
    whole = sd.decode(latents)
    small = torch.nn.functional.adaptive_avg_pool2d(whole, latents.shape[2:])
    preview = Preview(sd, tmp_path / "p.png")
    found = previews.coloured(latents, preview.fitted(latents))
    assert (found - small).abs().mean() < 0.05
    assert preview.picture(latents).size == (16, 16)
    decoded = Preview(sd, tmp_path / "p.png", decode=sd.decode).picture(latents)
    assert decoded.size == (64, 64)


def test_a_preview_takes_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: steps of a second, pictures of 10 ms."""
    now = 0.0
    monkeypatch.setattr(previews.time, "monotonic", lambda: now)
    sd = tiny_sd()
    preview = Preview(sd, tmp_path / "p.png")
    written = []

    def slow(image: Image.Image, path: Path, mark: bool) -> None:
        nonlocal now
        now += 0.01
        written.append(now)

    monkeypatch.setattr(previews, "save_picture", slow)
    for step in sd.run(Request("a fox", steps=50, seed=1)):
        now += 0.2
        preview(step)
    assert 5 < len(written) < 50
    assert preview.spent <= previews.SHARE * now + 0.01


def test_views_of_the_command(run: Run, tmp_path: Path) -> None:
    found = run(
        *("generate", "a fox", "--model", "text", "--sampler", "ddim", "--steps", 4, *COMMON),
        *("--out", "a.jpg"),
        *("--strip", "--gif", "--apng", "--preview", "p.png", "--num-images", 2),
    )
    assert found.out == [
        *("a.jpg", "a-steps.png", "a.gif", "a-film.png"),
        *("a-2.jpg", "a-2-steps.png", "a-2.gif", "a-2-film.png"),
    ]
    for name, frames in (("a.gif", 4), ("a-film.png", 4)):
        with Image.open(tmp_path / name) as film:
            assert film.n_frames == frames  # type: ignore[attr-defined]
            assert film.info["duration"] == 100
            film.seek(frames - 1)
            assert film.info["duration"] == 1500, "the result stays a while"
    with Image.open(tmp_path / "p.png") as preview:
        assert min(preview.size) >= SMALLEST
    for name in ("a.jpg", "a-steps.png", "a.gif", "a-film.png", "p.png"):
        assert b"DigitalSourceType" in (tmp_path / name).read_bytes(), name
    assert b"\x21\xff\x0bXMP DataXMP<?xpacket begin" in (tmp_path / "a.gif").read_bytes()
    options = ("--strip", "--gif", "--apng", "--preview", "q.png", "--no-mark", "--out", "b.jpg", "--num-images", 2)
    run("generate", "a fox", "--model", "text", "--sampler", "ddim", "--steps", 4, *COMMON, *options)
    for name in ("b.jpg", "b-steps.png", "b.gif", "b-film.png", "q.png"):
        assert b"DigitalSourceType" not in (tmp_path / name).read_bytes(), name
    with Image.open(tmp_path / "a.gif") as film, Image.open(tmp_path / "b.gif") as plain:
        for k in range(4):
            film.seek(k)
            plain.seek(k)
            assert film.convert("RGB").tobytes() == plain.convert("RGB").tobytes()


def test_previews_that_cannot_be(run: Run) -> None:
    for options, words in (
        (("--preview", "p.gif"), "end it in one of .png"),
        (("--preview", "nowhere/p.png"), "there is no folder nowhere"),
        (("--preview-vae", "x"), "name its file with --preview"),
    ):
        one_error(run("generate", "a fox", "--model", "text", "--steps", 1, *options), words)


def test_views_of_a_model_without_text(run: Run, tmp_path: Path) -> None:
    found = run(
        "generate", "--model", "plain", "--steps", 2, *COMMON, "--out", "a.png", "--strip", "--preview", "p.png"
    )
    assert found.out == ["a.png", "a-steps.png"]
    film = Film(tiny_ddpm(), tiny_ddpm().run(Request(None, steps=2, seed=1)), 8)
    assert len(film.rows) == 2


def test_labels_are_drawn_in_a_font_that_has_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the system has; else in Pillow's own, which draws a box for each that it lacks."""
    from PIL import ImageFont

    from minidiff.pipeline import montage

    own, tried = ImageFont.load_default(), list[str]()
    other = ImageFont.load_default(size=montage.SIZE + 1)

    def open_font(name: str, size: int) -> Any:
        tried.append(name)
        if name != montage.FONTS[1]:
            raise OSError("cannot open resource")
        return other

    monkeypatch.setattr(ImageFont, "truetype", open_font)
    monkeypatch.setattr(ImageFont, "load_default", lambda: own)
    assert montage.font_for("a red star, 1.5") is own
    assert tried == []
    assert not montage._has(own, "猫")
    assert montage.font_for("一只猫") is own
    assert tried == list(montage.FONTS)
    monkeypatch.setattr(montage, "_has", lambda font, text: font is other)
    assert montage.font_for("一只猫") is other
    montage.table([[colour(255, 0, 0)]], ["一只猫"], [""])


# --- grids -----------------------------------------------------------------------------------------------------------


def test_a_grid_has_a_cell_for_each_pair(run: Run, tmp_path: Path) -> None:
    grid = ("--grid", "sampler=euler,ddim", "steps=2,3,4")
    found = run("generate", "a fox", "--model", "text", *COMMON, *grid, "--out", "g.png")
    assert found.out == ["g.png"]
    cells = tmp_path / "g-cells"
    assert sorted(p.name for p in cells.iterdir()) == [f"0{i}-0{j}.png" for i in (1, 2, 3) for j in (1, 2)]
    for i, steps in enumerate((2, 3, 4), 1):
        for j, sampler in enumerate(("euler", "ddim"), 1):
            recipe = read_recipe(cells / f"0{i}-0{j}.png")
            assert (recipe["steps"], recipe["sampler"]["name"], recipe["seed"]) == (steps, sampler, 3)
    alone = run("generate", "a fox", "--model", "text", *COMMON, "--sampler", "ddim", "--steps", 3, "--out", "one.png")
    assert alone.out == ["one.png"]
    assert (cells / "02-02.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_cells_that_are_there_are_not_made_again(run: Run, tmp_path: Path) -> None:
    grid = ("generate", "a fox", "--model", "text", *COMMON, "--grid", "steps=2,3", "--out", "g.png", "--force")
    run(*grid)
    cells = sorted((tmp_path / "g-cells").iterdir())
    kept = [cell.stat().st_mtime_ns for cell in cells]
    cells[0].unlink()
    cells[1].touch()
    touched = cells[1].stat().st_mtime_ns
    run(*grid)
    assert cells[0].exists()
    assert cells[1].stat().st_mtime_ns == touched
    cells[1].write_bytes(b"half a picture")
    run(*grid)
    assert read_recipe(cells[1])["steps"] == 3
    run(*grid, "--scale", 3)
    assert [read_recipe(cell)["guidance_scale"] for cell in cells] == [3.0, 3.0], "of another request"
    assert len(kept) == 2


def test_another_grid_has_a_place_of_its_own(run: Run, tmp_path: Path) -> None:
    """Pictures of the first one stay; the same command again keeps its own, and makes nothing new."""
    model = ("generate", "a fox", "--model", "text", *COMMON, "--out", "g.png", "--grid")
    assert run(*model, "steps=2,3").out == ["g.png"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "g-cells").iterdir()}
    assert run(*model, "scale=2,3", "--steps", 2).out == ["g-2.png"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "g-cells").iterdir()} == before
    assert read_recipe(tmp_path / "g-2-cells" / "01-02.png")["guidance_scale"] == 3
    times = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*.png"))]
    assert run(*model, "steps=2,3").out == ["g.png"]
    assert run(*model, "scale=2,3", "--steps", 2).out == ["g-2.png"]
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*.png"))] == times
    (tmp_path / "h.png").write_text("somebody's own")
    own = tuple("h.png" if word == "g.png" else word for word in model)
    assert run(*own, "steps=2").out == ["h-2.png"]
    assert (tmp_path / "h-2-cells" / "01-01.png").exists()


def test_a_grid_goes_on_with_the_seed_that_it_began_with(run: Run, tmp_path: Path) -> None:
    """Which nobody named: of an interrupted grid, what is there counts."""
    unseeded = [word for word in COMMON if word not in ("--seed", 3)]
    grid = ("generate", "a fox", "--model", "text", *unseeded, "--grid", "steps=1,2,3", "--out", "g.png")
    run(*grid)
    cells = sorted((tmp_path / "g-cells").iterdir())
    before = [cell.read_bytes() for cell in cells]
    cells[1].unlink()
    (tmp_path / "g.png").unlink()
    assert run(*grid).out == ["g.png"]
    assert [cell.read_bytes() for cell in cells] == before


def test_a_grid_that_fails_leaves_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    one_error(run("generate", "a fox", "--model", "text", *COMMON, "--grid", "like=nobody", "--out", "g.png"), "nobody")
    one_error(
        run("generate", "a fox", "--model", "text", *COMMON, "--grid", "steps=2", "--out", "no/g.png"), "no folder"
    )
    one_error(run("generate", "a fox", "--model", "text", *COMMON, "--grid", "clip-skip=90", "--out", "g.png"), "clip")
    assert sorted(tmp_path.iterdir()) == before


def test_a_grid_encodes_each_prompt_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = CLIPText.forward

    def counting(self: CLIPText, ids: Any, *others: Any, **options: Any) -> Any:
        asked.extend(map(tuple, ids.tolist()))
        return plain(self, ids, *others, **options)

    monkeypatch.setattr(CLIPText, "forward", counting)
    grid = ("--grid", "prompt=a fox|an owl, at night", "scale=1,2,3,4,5,6,7,8")
    run("generate", "--model", "text", "--steps", 1, *COMMON, *grid, "--out", "g.png")
    assert len(asked) == len(set(asked)) == 3, "the two prompts, and the empty one beside them"


def test_encoded_once_gives_the_same_and_is_taken_off() -> None:
    sd = tiny_sd()
    plain = sd.encode_prompt(["a fox"])[0]
    with encoded_once(sd):
        assert torch.equal(sd.encode_prompt(["a fox"])[0], plain)
        assert torch.equal(sd.encode_prompt(["a fox"])[0], plain)
        assert not torch.equal(sd.encode_prompt(["an owl"])[0], plain)
        assert isinstance(sd.text_encoder.__dict__["forward"], Encoded)
    assert "forward" not in sd.text_encoder.__dict__


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["stepz=3"], "did you mean steps"),
        (["steps=3,"], "should be OPTION=VALUE,VALUE"),
        (["steps"], "should be OPTION=VALUE,VALUE"),
        (["steps=0"], "'0' should be a whole number"),
        (["steps=2,3", "steps=4"], "names steps twice"),
        (["steps=2", "scale=1", "seed=3"], "one or two options"),
        (["seed=" + ",".join(map(str, range(401)))], "400 is the most"),
        (["sampler=euler,eulre"], "eulre"),
    ],
)
def test_grids_that_cannot_be(axes: list[str], words: str, run: Run) -> None:
    one_error(run("generate", "a fox", "--model", "text", "--quiet", "--grid", *axes), words)


def test_what_does_not_go_with_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--strip"], ["--num-images", "2"], ["--preview", "p.png"], ["--out", "g.jpg"]):
        assert cli.main(["generate", "a red star", "--grid", "steps=2", *option]) == 2
        assert "grid" in capsys.readouterr().err


def test_pictures_on_an_axis(run: Run, tmp_path: Path) -> None:
    """Pictures to begin from are an option like others; cells have the size of theirs, labels its name."""
    (tmp_path / "in").mkdir()
    colour(255, 0, 0, side=64).save(tmp_path / "in" / "a.png")
    colour(0, 0, 255, side=32).save(tmp_path / "in" / "b.png")
    begun = ("generate", "a fox", "--model", "text", "--steps", 4, *COMMON, "--strength", 0.5)
    grid = (*begun, "--out", "g.png", "--grid")
    assert run(*grid, "image=in/a.png,in/b.png", "seed=1,2").out == ["g.png"]
    cells = tmp_path / "g-cells"
    for j, (name, side) in enumerate((("a.png", 64), ("b.png", 32)), 1):
        recipe = read_recipe(cells / f"02-0{j}.png")
        assert (recipe["image"], recipe["strength"], recipe["width"], recipe["seed"]) == (name, 0.5, side, 2)
    before = (cells / "01-01.png").stat().st_mtime_ns
    run(*grid, "image=in/a.png,in/b.png", "seed=1,2")
    assert (cells / "01-01.png").stat().st_mtime_ns == before
    assert grids.read_axis("image=in/a.png,in/b.png").labels() == ["image a.png", "image b.png"]
    one_error(run(*grid, "image=in/a.png,gone.png"), "--grid image=gone.png: no such file")
    one_error(run(*grid, "scale=1,2"), "name it with --image")


def test_fields_of_a_record_on_an_axis(run: Run, tmp_path: Path) -> None:
    """SDXL's sizes, of which the command line may give others."""
    tiny_xl().save(tmp_path / "xl.safetensors")
    grid = ("generate", "a fox", "--model", "xl.safetensors", "--steps", 1, *COMMON, "--out", "g.png", "--grid")
    assert run(*grid[:-1], "--target-size", "96x64", "--grid", "crop=0,0|8,16", "original-size=64x32,64x64").out
    for i, original in enumerate(([32, 64], [64, 64]), 1):
        for j, crop in enumerate(([0, 0], [16, 8]), 1):
            sizes = read_recipe(tmp_path / "g-cells" / f"0{i}-0{j}.png")["sizes"]
            assert (sizes["original"], sizes["crop"], sizes["target"]) == (original, crop, [64, 96])
    one_error(run("generate", "a fox", "--model", "text", *COMMON, "--grid", "crop=0,0|8,16"), "sizes are given")
    one_error(run(*grid, "croq=1,2|3,4"), "did you mean crop?")
