"""``Request``, the list of all options: everything that follows from a field, its stub and its rules.

python -m tests.unit.test_request      # writes minidiff/pipeline/entrance.pyi anew
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.cli.options import add_options, given
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline import entrance
from minidiff.pipeline.recipe import Made, Recipe, parse
from minidiff.pipeline.request import Request, Sizes, ask, asking, between, options, read_number
from tests.support import tiny

STUB = Path(entrance.__file__).with_suffix(".pyi")
HEAD = """# Written by `python -m tests.unit.test_request` from the fields of Request: not to be edited.
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from PIL import Image
from torch import Tensor

from minidiff.adapters.control import Control
from minidiff.noise import Generators
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.denoise import Progress, Run
from minidiff.pipeline.images import Picture
from minidiff.pipeline.request import Request, Seed, Sizes, Text
from minidiff.programs import Program
from minidiff.samplers.method import Sampler

class Entrance(Pipeline, metaclass=ABCMeta):
"""


def stub() -> str:
    """The types of ``generate`` and ``steps``: the fields of a Request, and what ``output`` makes of the result."""
    pil, tensor = arguments({"output": 'Literal["pil"] = "pil"'}), arguments({"output": 'Literal["tensor", "latent"]'})
    ready = "self, request: Request, /, **changes: Any"
    return (
        HEAD
        + overload("generate", pil, "list[Image.Image]")
        + overload("generate", tensor, "Tensor")
        + overload("generate", ready, "list[Image.Image] | Tensor")
        + overload("steps", arguments({}, without=("output", "progress")), "Run")
        + overload("steps", ready, "Run")
    )


def overload(name: str, taken: str, returned: str) -> str:
    return f"    @overload\n    def {name}({taken}) -> {returned}: ...\n"


def arguments(types: Mapping[str, str], without: tuple[str, ...] = ()) -> str:
    """Every field as an argument. One whose default goes away, and all after it, are given by name."""
    lines, by_name = ["self"], False
    for f, _ in options(Request):
        if f.name in without:
            continue
        default = "" if f.default is dataclasses.MISSING else f" = {f.default!r}"
        written = types.get(f.name, f"{f.type}{default}")
        if not by_name and (f.kw_only or (f.name in types and "=" not in written)):
            lines.append("*")
            by_name = True
        lines.append(f"{f.name}: {written}")
    return ",\n        ".join(["\n        self", *lines[1:]]) + ",\n    "


def test_the_stub_is_made_from_the_fields() -> None:
    assert STUB.read_text(encoding="utf-8") == stub()


@dataclass(frozen=True)
class More(Request):
    """A Request with one option more."""

    _: KW_ONLY
    flavour: float = ask(
        0.5,
        "how sweet it is, from 0 to 1 (default: 0.5)",
        "Nobody knows why.",
        flag="--flavour",
        metavar="X",
        read=read_number,
        rule=between(0, 1),
        kept=float,
    )


class Kitchen:
    @asking(More)
    def cook(self, request: Request) -> Request:
        """Cook."""
        return request


def test_one_more_field_is_an_argument() -> None:
    assert "flavour" in inspect.signature(Kitchen.cook).parameters
    cooked = Kitchen().cook("soup", flavour=0.25)
    assert isinstance(cooked, More)
    assert (cooked.prompt, cooked.flavour) == ("soup", 0.25)
    assert Kitchen().cook(cooked, steps=3) == dataclasses.replace(cooked, steps=3)
    with pytest.raises(ConfigError, match=r"flavour=2 must lie in 0\.\.1"):
        Kitchen().cook("soup", flavour=2)
    with pytest.raises(TypeError, match="flavor"):
        Kitchen().cook("soup", flavor=0.25)  # type: ignore[call-arg]


def test_one_more_field_is_documented() -> None:
    doc = Kitchen.cook.__doc__ or ""
    assert doc.startswith("Cook.\n")
    assert "``flavour``: how sweet it is, from 0 to 1 (default: 0.5). Nobody knows why." in doc


def test_one_more_field_is_on_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_options({"sampling": parser.add_argument_group("sampling")}, More)
    assert "--flavour X" in parser.format_help()
    args = parser.parse_args(["--flavour", "0.75", "--steps", "7", "--crop", "1,2"])
    assert given(args, More) == {"flavour": 0.75, "steps": 7, "sizes": Sizes(crop=(2, 1))}
    assert given(parser.parse_args([]), More, More("a", flavour=0.1)) == {"prompt": "a", "flavour": 0.1}


def test_one_more_field_is_in_the_recipe() -> None:
    recipe = Recipe(request=More("soup", flavour=0.25, seed=3), made=Made(model="kitchen"))
    found = json.loads(json.dumps(recipe.to_json()))
    assert found["flavour"] == 0.25
    assert parse(found, "soup.png", More) == (recipe, [])
    assert parse(found, "soup.png")[1] == ["flavour"]
    with pytest.raises(CheckpointError, match="flavour"):
        parse({**found, "flavour": "sweet"}, "soup.png", More)
    assert "flavour" not in Recipe(request=More("soup"), made=Made()).to_json()  # as it is by default


def test_one_more_field_is_refused_by_models_without_text() -> None:
    with pytest.raises(ConfigError, match="flavour= is given, and a tiny ddpm model begins from noise alone"):
        tiny.tiny_ddpm().run(More(None, flavour=0.25, steps=2))


def test_the_list_of_options_needs_no_torch() -> None:
    code = "import sys, minidiff.pipeline.request; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_ready_request_and_its_fields_make_the_same_picture() -> None:
    sd = tiny.tiny_sd()
    asked = Request("a fox", steps=2, seed=1, output="tensor", progress=False)
    assert torch.equal(sd.generate(asked), sd.generate("a fox", steps=2, seed=1, output="tensor", progress=False))
    changed = sd.generate(asked, seed=2)
    assert not torch.equal(changed, sd.generate(asked))
    assert torch.equal(changed, sd.generate("a fox", None, 2, seed=2, output="tensor"))
    assert torch.equal(sd.steps(asked).last().x, sd.generate(asked, output="latent"))
    with pytest.raises(ConfigError, match="a Request and 1 more; name what changes in it"):
        sd.generate(asked, "another")  # type: ignore[call-overload]
    ddpm = tiny.tiny_ddpm()
    alone = Request(None, steps=2, seed=1, num_images=2, output="tensor")
    assert torch.equal(ddpm.generate(alone), ddpm.generate(2, 2, seed=1, output="tensor"))  # type: ignore[call-overload]


def test_steps_takes_nothing_about_the_result() -> None:
    parameters = inspect.signature(tiny.tiny_sd().steps).parameters
    assert not {"output", "progress"} & set(parameters)
    for name in ("output", "progress"):
        with pytest.raises(TypeError, match=name):
            tiny.tiny_sd().steps("a", steps=1, **{name: "pil"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strength": 1.5}, r"strength=1.5 must lie in 0..1"),
        ({"strength": "much"}, "strength='much' must be a finite number"),
        ({"num_images": 0}, "num_images=0 must be a whole number, at least 1"),
        ({"num_images": None}, "num_images=None must be a whole number"),
        ({"height": 64.0}, "height=64.0 must be a whole number of pixels"),
        ({"denoising_end": 1}, "denoising_end=1 must lie between 0 and 1"),
        ({"guidance_interval": (0.9, 0.2)}, "guidance_interval"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
        ({"negative_prompt": [1]}, "negative_prompt must be text, got 1"),
        ({"prompt_2": []}, "prompt_2 is an empty list"),
        ({"output": "png"}, "output='png' is none of pil, tensor, latent"),
        ({"progress": 3}, "progress=3 must be True, False, None"),
    ],
)
def test_rules(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Request("a", **values)


def test_every_option_has_its_line_of_help() -> None:
    for record in (Request, Sizes):
        for f, option in options(record):
            assert option.help, f.name
            assert "\n" not in option.help
            assert bool(option.flag) == bool(option.metavar), f.name
            assert not option.flag or option.flag.startswith("--")


def test_what_a_recipe_keeps_is_what_it_reads() -> None:
    """Every field that a recipe keeps, with a value that is not its default."""
    values: dict[str, Any] = {
        "prompt": "a",
        "negative_prompt": "b",
        "steps": 3,
        "guidance_scale": 2.5,
        "sampler": {"name": "ddim", "eta": 0.5},
        "seed": 9,
        "height": 64,
        "width": 72,
        "strength": 0.5,
        "denoising_start": 0.25,
        "denoising_end": 0.5,
        "sizes": Sizes(original=(8.0, 9.0)),
        "negative_sizes": Sizes(score=3.0),
        "clip_skip": 1,
        "like": "a1111",
        "prompt_style": "compel",
        "prompt_2": "c",
        "negative_prompt_2": "d",
        "guidance_rescale": 0.7,
        "guidance_interval": (0.1, 0.9),
    }
    kept = [f.name for f, option in options(Request) if option.kept is not None]
    assert sorted(kept) == sorted(values)
    recipe = Recipe(request=Request(**values), made=Made(place=1, places=3, lora=(("x", 0.5),), lora_hashes=("ab",)))
    assert parse(json.loads(json.dumps(recipe.to_json())), "a.png") == (recipe, [])


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
