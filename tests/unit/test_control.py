"""Controls: what a request takes, the part of the way on which they work, weights by depth, switches and threads."""

from __future__ import annotations

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff import Control, ControlModel, StableDiffusion, Unconditional, fast
from minidiff.adapters.control import Steering
from minidiff.config import ControlConfig, from_json, to_json
from minidiff.errors import CheckpointError, ConfigError, MinidiffError
from minidiff.pipeline.recipe import parse
from minidiff.storage.checkpoint import build
from tests.support.tiny import XL, tiny_adapter, tiny_controlnet, tiny_ddpm, tiny_sd, tiny_xl
from tests.tolerances import BATCH, assert_close

EDGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
OTHER = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> ControlModel:
    return tiny_controlnet()


@pytest.fixture(scope="module")
def adapter() -> ControlModel:
    return tiny_adapter()


def drawn(sd: StableDiffusion, *controls: Control, **options: Any) -> Tensor:
    given = {"seed": 1, "steps": 3, "output": "latent", "progress": False, **options}
    found: Tensor = sd.generate("a horse", controls=list(controls), **given)
    return found


def test_a_control_counts_by_its_picture_and_weight(
    sd: StableDiffusion, net: ControlModel, adapter: ControlModel
) -> None:
    plain = drawn(sd)
    for model in (net, adapter):
        one = drawn(sd, Control(model, EDGES))
        assert not torch.equal(one, plain)
        assert not torch.equal(one, drawn(sd, Control(model, OTHER)))
        assert not torch.equal(one, drawn(sd, Control(model, EDGES, 0.5)))
        assert torch.equal(drawn(sd, Control(model, EDGES, 0)), plain)
        assert torch.equal(drawn(sd, Control(model, EDGES)), one), "nothing is left on the models"
    both = drawn(sd, Control(net, EDGES), Control(adapter, OTHER))
    assert torch.equal(drawn(sd, Control(adapter, OTHER), Control(net, EDGES)), both)
    assert not torch.equal(both, drawn(sd, Control(net, EDGES)))


def test_a_control_works_on_its_part_of_the_way(sd: StableDiffusion, net: ControlModel) -> None:
    calls: list[int] = []
    handle = net.net.register_forward_hook(lambda *_: calls.append(1))
    given: dict[str, Any] = {"seed": 1, "steps": 4, "sampler": "ddim"}
    plain = [step.x for step in sd.steps("a horse", **given)]
    late = [step.x for step in sd.steps("a horse", controls=[Control(net, EDGES, low=0.5)], **given)]
    assert [torch.equal(a, b) for a, b in zip(plain, late, strict=True)] == [True, True, False, False]
    assert len(calls) == 2
    calls.clear()
    list(sd.steps("a horse", controls=[Control(net, EDGES, high=0.6)], guidance_interval=(0.3, 0.9), **given))
    assert len(calls) == 2
    handle.remove()


def test_the_part_of_a_run_from_a_picture_is_counted_from_its_first_row(sd: StableDiffusion, net: ControlModel) -> None:
    control = Control(net, EDGES, low=0.5)
    assert control.rows(range(4), 4) == {2, 3}
    assert control.rows(range(6, 10), 10) == {8, 9}
    assert control.rows(range(6), 10) == {5}, "a run that stops early is a part of a longer way"


def test_soft_and_guess_weigh_by_depth(sd: StableDiffusion, net: ControlModel) -> None:
    given: dict[str, Any] = {"steps": 1, "guidance_scale": 1.0}
    outputs: list[tuple[list[Tensor], Tensor]] = []
    handle = net.net.register_forward_hook(lambda _, args, out: outputs.append(out))
    seen: list[Any] = []
    watch = sd.unet.register_forward_pre_hook(lambda _, args: seen.append(args[5]))
    drawn(sd, Control(net, EDGES, 0.7, soft=0.5), **given)
    drawn(sd, Control(net, EDGES, 0.7, guess=True), **given)
    drawn(sd, Control(net, EDGES, 0.7, guess=True), steps=1)
    handle.remove()
    watch.remove()
    for (down, mid), given_to, factors in zip(
        outputs,
        seen,
        (
            [0.5**k for k in (4, 3, 2, 1, 0)],
            [10 ** (-1 + k / 4) for k in range(5)],
            [10 ** (-1 + k / 4) for k in range(5)],
        ),
        strict=True,
    ):
        found = [*given_to[0], given_to[1]]
        for raw, weighed, factor in zip([*down, mid], found, factors, strict=True):
            assert_close(weighed[-1:], raw[-1:] * 0.7 * factor, BATCH)
    assert [len(mid) for _, mid in outputs] == [1, 1, 1], "of the prediction with the prompt alone"
    assert all(not r[0].any() for r in [*seen[2][0], seen[2][1]]), "the other is left as it is"


def test_the_size_is_that_of_the_picture(sd: StableDiffusion, net: ControlModel, adapter: ControlModel) -> None:
    wide = torch.rand(1, 3, 67, 90)
    assert drawn(sd, Control(net, wide)).shape[2:] == (8, 11)
    assert drawn(sd, Control(net, wide), Control(adapter, EDGES), height=48).shape[2:] == (6, 11)
    assert drawn(sd, Control(net, wide), image=EDGES).shape[2:] == (8, 8)
    assert Steering(sd.unet, [Control(tiny_adapter(factor=16), wide)]).size(8) == (64, 80), "what the adapter can read"


def test_every_picture_or_prompt_may_have_its_own(sd: StableDiffusion, net: ControlModel) -> None:
    two = torch.cat([EDGES, OTHER])
    found = drawn(sd, Control(net, two), num_images=2)
    for k, picture in enumerate((EDGES, OTHER)):
        assert_close(found[k : k + 1], drawn(sd, Control(net, picture), seed=1 + k), BATCH)
    with pytest.raises(ConfigError, match=r"2 controls\[0\]\.pictures for 3 pictures"):
        drawn(sd, Control(net, two), num_images=3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": float("nan")}, "weight=nan of a control must be a finite number"),
        ({"weight": 1e9}, r"weight=1e\+09 of a control must lie in"),
        ({"low": 0.5, "high": 0.5}, r"low=0\.5, high=0\.5 of a control must be 0 <= low < high <= 1"),
        ({"soft": 0}, r"soft=0 of a control must lie in 0\.\.1, without 0"),
        ({"guess": 1}, "guess=1 of a control must be True or False"),
        ({"guess": True, "soft": 0.8}, "soft and guess both weigh a control's outputs by depth"),
        ({"model": "canny.safetensors"}, "model='canny.safetensors' of a control must be a loaded ControlNet"),
    ],
)
def test_bad_settings(net: ControlModel, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Control(**{"model": net, "picture": EDGES, **settings})


def test_bad_requests(sd: StableDiffusion, net: ControlModel, adapter: ControlModel, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ([net], "must be a list of controls"),
        (Control(net, EDGES), "must be a list of controls"),
        ([Control(net, EDGES, low=0.9)], r"controls\[0\]: low=0\.9, high=1 holds none of the 4 model calls"),
        ([Control(net, EDGES[:, :1])], r"controls\[0\]\.picture is a tensor of shape .*; 3 channels are wanted"),
        ([Control(net, EDGES * 2)], r"controls\[0\]\.picture has values from .* not in -1\.\.1"),
        ([Control(net, tmp_path / "no.png")], r"no\.png: no such file; controls\[0\]\.picture names a picture"),
        ([Control(net, torch.rand(1, 3, 5, 64))], r"controls\[0\]\.picture of 64 x 5 pixels is too small"),
        (
            [Control(adapter, EDGES), Control(tiny_controlnet(config=XL), EDGES)],
            r"controls\[1\] .*: it reads prompts of",
        ),
        (
            [Control(tiny_controlnet(layers=2), EDGES)],
            r"its outputs are \[.*\] channels wide, the skips of this tiny sd",
        ),
        ([Control(tiny_controlnet(hint_widths=(4, 4)), EDGES)], "it makes 1 of 2 pixels along a side"),
        ([Control(tiny_adapter(channels=(16,)), EDGES)], r"its features have the shapes \[\(16, 8, 8\)\]"),
        ([Control(tiny_adapter(factor=16, kind="xl"), EDGES)], "its features have the shapes"),
        (
            [Control(tiny_controlnet().to(dtype=torch.bfloat16), EDGES)],
            r"computes in torch\.bfloat16 on cpu, the model",
        ),
    ]
    for controls, words in cases:
        with pytest.raises(MinidiffError, match=words) as e:
            sd.generate("a horse", steps=3, controls=controls)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="controls= is given, and a tiny ddpm model"):
        tiny_ddpm().generate(1, 2, controls=[Control(net, EDGES)])


def test_a_control_of_sdxl_reads_its_sizes() -> None:
    sd, net = tiny_xl(), tiny_controlnet(config=XL)
    one = drawn(sd, Control(net, EDGES), steps=1)
    other = drawn(sd, Control(net, EDGES), steps=1, sizes=minidiff.Sizes(original=(8, 8)))
    assert not torch.equal(one, other)


# --- files and recipes ------------------------------------------------------------------------------------------------


def test_saved_and_opened(net: ControlModel, tmp_path: Path) -> None:
    net.save(tmp_path / "edges.safetensors")
    found = minidiff.load(tmp_path / "edges.safetensors", "cpu")
    assert isinstance(found, ControlModel)
    assert (found.config, found.identity, found.name) == (net.config, net.identity, "edges.safetensors")
    assert found.net.state_dict().keys() == net.net.state_dict().keys()
    assert all(torch.equal(a, net.net.state_dict()[k]) for k, a in found.net.state_dict().items())
    assert not any(p.requires_grad for p in found.net.parameters())
    lines = repr(found).splitlines()
    assert lines[0] == "ControlModel: tiny control"
    assert lines[1].endswith(" M; float32 on cpu")
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "edges.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"a tiny control, which steers a model; open it by ControlModel\.load"):
        StableDiffusion.load(tmp_path / "edges.safetensors")
    tiny_ddpm().save(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"a tiny ddpm model, no control; open it by minidiff\.load"):
        ControlModel.load(tmp_path / "plain.safetensors")
    assert isinstance(minidiff.load(tmp_path / "plain.safetensors"), Unconditional)


def test_the_recipe_names_controls(sd: StableDiffusion, net: ControlModel, tmp_path: Path) -> None:
    from torchvision.utils import save_image

    save_image(EDGES, tmp_path / "edges.png")
    controls = [Control(net, tmp_path / "edges.png", 0.5, 0.2), Control(net, OTHER, guess=True)]
    recipe = sd.steps("a horse", steps=4, seed=1, controls=controls).recipes[0]
    first, second = recipe["control"]
    assert first["picture"] == "edges.png"
    assert (first["hash"], first["weight"], first["low"]) == (net.identity, 0.5, 0.2)
    assert (second["picture"], second["guess"]) == (None, True)
    assert first["picture_hash"] != second["picture_hash"]
    again, unknown = parse(recipe, "a.png")
    assert unknown == []
    assert again.to_json() == recipe
    assert "control" not in sd.steps("a horse", steps=4, seed=1).recipes[0]


# --- switches, threads, low memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["net", "adapter"])
def test_switches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal within what a switch may differ by, in threads too, and the plain control again after it."""
    monkeypatch.setattr("minidiff.fast.packed.SMALLEST", 1)
    sd, model = tiny_sd(), tiny_controlnet() if kind == "net" else tiny_adapter()
    controls = [Control(model, EDGES), Control(model, OTHER, 0.5, high=0.7)]
    plain = drawn(sd, *controls)
    same = ("blocks", "inplace", "memory")
    on = fast.optimize(model, same)
    fast.optimize(sd, same)
    assert (sum(on.values()) > 0) == (kind == "net")
    assert torch.equal(drawn(sd, *controls), plain)
    for one in (sd, model):
        fast.optimize(one)
    assert "packed" in model.fast
    assert ("shared_start" in model.fast) == (kind == "net")
    quick = drawn(sd, *controls)
    assert_close(quick, plain, BATCH)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ways = [controls, controls[:1], [], controls[1:]] * 2
        alone = [drawn(sd, *way) for way in ways[:4]]
        together = [pool.submit(drawn, sd, *way) for way in ways]
        for way, wanted in zip(together, alone * 2, strict=True):
            assert_close(way.result(), wanted, BATCH)
    for one in (sd, model):
        fast.restore(one)
    assert model.fast == ()
    assert torch.equal(drawn(sd, *controls), plain)


def test_halves_of_the_batch() -> None:
    sd, net = tiny_sd(), tiny_controlnet()
    plain = drawn(sd, Control(net, EDGES))
    for model in (sd, net):
        assert fast.optimize(model, ("halves",)) == {"halves": 1}
    batches: list[int] = []
    net.net.get_submodule("conv_in").register_forward_hook(lambda _, args, out: batches.append(len(out)))
    assert_close(drawn(sd, Control(net, EDGES)), plain, BATCH)
    assert set(batches) == {1}


def test_an_approximation_runs_whole_under_controls(sd: StableDiffusion, net: ControlModel) -> None:
    """Deep features would be those of another step's control."""
    pipe = tiny_sd()
    wanted = drawn(pipe, Control(net, EDGES))
    fast.approximate(pipe, deep=3)
    assert torch.equal(drawn(pipe, Control(net, EDGES)), wanted)
    assert torch.equal(drawn(pipe, Control(tiny_adapter(), EDGES)), drawn(sd, Control(tiny_adapter(), EDGES)))


@pytest.mark.parametrize("kind", ["net", "adapter"])
def test_low_memory(kind: str, tmp_path: Path) -> None:
    """The same bits; the control's weights are in memory only while it works."""
    model = tiny_controlnet() if kind == "net" else tiny_adapter()
    tiny_sd().save(tmp_path / "sd.safetensors")
    model.save(tmp_path / "control.safetensors")
    sd = StableDiffusion.load(tmp_path / "sd.safetensors", "cpu", low_memory=True)
    control = ControlModel.load(tmp_path / "control.safetensors", "cpu", low_memory=True)

    def there() -> bool:
        return sum(p.untyped_storage().nbytes() for p in control.net.parameters()) > 1000

    assert not there()
    wanted = drawn(tiny_sd(), Control(model, EDGES))
    assert torch.equal(drawn(sd, Control(control, EDGES)), wanted)
    assert not there()
    run = sd.steps("a horse", steps=3, seed=1, controls=[Control(control, EDGES)])
    next(run)
    assert there() == (kind == "net"), "an adapter's features are computed before the first step"
    run.close()
    assert not there()
    fast.optimize(control)
    fast.optimize(sd)
    assert_close(drawn(sd, Control(control, EDGES)), wanted, BATCH)


def test_a_run_that_is_left_is_freed(sd: StableDiffusion, net: ControlModel) -> None:
    control = Control(net, EDGES.clone())
    gone = weakref.ref(control)
    run = sd.steps("a horse", steps=2, seed=1, controls=[control])
    next(run)
    del control, run
    gc.collect()
    assert gone() is None


def test_the_module_that_overflows_is_named() -> None:
    net = tiny_controlnet()
    with torch.no_grad():
        net.net.get_submodule("hint.conv_out").weight.fill_(float("inf"))  # type: ignore[union-attr,operator]
    with pytest.raises(MinidiffError, match=r"first from controls\[0\]\.hint\.conv_out"):
        drawn(tiny_sd(), Control(net, EDGES))


# --- odd configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["net", "adapter"])
def test_a_config_with_odd_values_is_refused_or_built(kind: str, net: ControlModel, adapter: ControlModel) -> None:
    """In the header of a file of unknown origin: any value of any field, one of minidiff's errors or a model."""
    told = json.loads(to_json((net if kind == "net" else adapter).config))
    odd = (None, True, -1, 0, 1, 3, 2**40, 0.5, float("nan"), "x", [], {}, [0], [8, 8, 8], [2**16] * 4, [[1]])
    built, errors = 0, []
    for field in told["control"]:
        for value in odd:
            try:
                config = from_json(ControlConfig, {**told, "control": {**told["control"], field: value}})
                build(config)
                built += 1
            except MinidiffError as e:
                errors.append(str(e))
    assert built > 5
    assert [e for e in errors if "\n" in e] == []
