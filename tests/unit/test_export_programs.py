"""Exports of a model's networks: equal programs, complete folders, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minidiff
from minidiff import CheckpointError, ConfigError, UnsupportedError
from minidiff.config import Level
from minidiff.export import export, formats, open_export
from minidiff.export.against import against
from minidiff.export.formats import BOUNDS, measured, traced
from minidiff.export.manifest import digests
from minidiff.export.programs import programs
from minidiff.export.variants import variant
from minidiff.models.tokenizer_files import tokenizer_config
from minidiff.parity.ours import asked
from minidiff.pipeline import StableDiffusion
from tests.support.command import Run, one_error
from tests.support.export_models import FAMILIES, MINI, one_weight_changed
from tests.support.scripts import SCRIPTS, script
from tests.support.tiny import DDPM, drawn


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_are_equal_to_the_networks(family: str) -> None:
    """At every batch and size, also those that the program was not made from."""
    pipe = drawn(FAMILIES[family], 3)
    found = programs(pipe.config, pipe.parts)
    if family in ("inpainting", "lcm", "sd2"):  # their other parts are those of sd1
        found = [p for p in found if p.name == "unet" or (family == "sd2" and p.name == "text_encoder")]
    elif family == "taesd":
        found = [p for p in found if p.name.startswith("vae")]
    assert found
    for program in found:
        module = traced(program).module()
        assert measured(program, lambda inputs, m=module, p=program: p.named(m(**inputs))) == 0, program.name


def test_a_unet_of_four_levels_runs_at_every_size() -> None:
    """As those of Stable Diffusion are. A side of the lowest level is one number in small pictures, which must not be
    taken for its only length."""
    plain, attends = Level(channels=8), Level(channels=8, attention="text", heads=2)
    unet = replace(MINI.unet, levels=(plain, plain, plain, attends), mid=attends)
    pipe = drawn(replace(MINI, unet=unet), 3)
    program = next(p for p in programs(pipe.config, pipe.parts) if p.name == "unet")
    assert [min(size[1:3]) for size in program.sizes] == [16, 16, 17]
    module = traced(program).module()
    assert measured(program, lambda inputs: program.named(module(**inputs))) == 0
    inputs = program.example(1, 2 * program.least, 5 * program.least, 77)
    assert torch.equal(module(**inputs), program.eager(inputs)["out"])


def test_a_text_encoder_for_short_texts_is_made_at_its_own_length() -> None:
    """The bundled model's takes 32 tokens."""
    sd = minidiff.bundled(dtype=torch.float32)
    text = next(p for p in programs(sd.config, sd.parts) if p.name == "text_encoder")
    assert [size[3] for size in text.sizes] == [32, 32, 17]
    module = traced(text).module()
    assert measured(text, lambda inputs: text.named(module(**inputs))) == 0


@pytest.fixture(scope="module")
def mini() -> StableDiffusion:
    pipe = drawn(MINI, 1)
    assert isinstance(pipe, StableDiffusion)
    return pipe


@pytest.fixture(scope="module")
def made(mini: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the mini model, and its file, which no test changes."""
    folder = tmp_path_factory.mktemp("export")
    mini.save(folder / "mini.safetensors")
    export(mini, folder / "out", plans=[("euler", 3), ("pndm", 2)])
    return folder / "out"


def test_the_folder_has_all_that_a_caller_needs(mini: StableDiffusion, made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert list(manifest["programs"]) == ["unet", "vae_encoder", "vae_decoder", "text_encoder"]
    assert manifest["programs"]["unet"]["inputs"]["x"] == {"axes": ["batch", 4, "height", "width"], "dtype": "float32"}
    assert manifest["programs"]["text_encoder"]["inputs"]["ids"] == {"axes": ["batch", "length"], "dtype": "int64"}
    assert manifest["programs"]["unet"]["measured"] == manifest["programs"]["unet"]["bound"] == 0
    assert (manifest["model"], manifest["factor"]) == (mini.identity, 2)
    assert manifest["scaling_factor"] == mini.vae.config.scaling_factor
    assert {"unet.pt2", "schedule.json", "tokenizer/vocab.json", "plans/euler-3.json"} < manifest["files"].keys()
    assert tokenizer_config(made / "tokenizer") == mini.config.tokenizer
    plan = json.loads((made / manifest["plans"][0]).read_text())
    assert [row["timestep"] for row in plan["rows"]] == [999, 499.5, 0]
    alpha_bar = torch.tensor(json.loads((made / "schedule.json").read_text())["alpha_bar"])
    assert torch.equal(alpha_bar, mini.schedule.alphas_cumprod)


def test_what_was_exported_runs_a_whole_pipeline(mini: StableDiffusion, made: Path) -> None:
    report = against(mini, str(made), asked("a star", steps=2, height=16, width=16))
    assert report.equal
    stages = [row.stage for row in report.rows]
    assert {"unet/unet.down.0.res.0.conv1", "vae_decoder/vae.decoder.conv_out", "step.1/x", "decode/pixels"} < {*stages}
    assert len(stages) > 200


def test_a_changed_weight_is_found(mini: StableDiffusion, made: Path) -> None:
    with one_weight_changed(mini, made) as stage:
        report = against(mini, str(made), asked("a star", steps=1, height=16, width=16), judge=False)
    assert report.first is not None
    assert report.first.stage == stage


@pytest.mark.parametrize(
    "what", ["a hash", "a missing file", "a path outside", "a format", "a kind", "no manifest", "an entry"]
)
def test_a_folder_that_was_changed_is_refused(made: Path, tmp_path: Path, what: str) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    for name in ("unet.pt2", "vae_encoder.pt2", "vae_decoder.pt2", "text_encoder.pt2"):
        os.link(made / name, tmp_path / name)
    words = {"a hash": "its content is not what manifest.json tells", "a missing file": r"decoder.pt2' is missing"}
    words |= {"a path outside": "is missing", "a format": "format='minidiff export 2'", "a kind": "to='tflite'"}
    words |= {"no manifest": "no export: there is no manifest.json", "an entry": "entries are missing"}
    manifest["files"] = {
        name: hash for name, hash in manifest["files"].items() if "/" not in name and name != "schedule.json"
    }
    if what == "a hash":
        manifest["files"]["unet.pt2"] = "0" * 64
    if what == "a missing file":
        (tmp_path / "vae_decoder.pt2").unlink()
    if what == "a path outside":
        manifest["programs"]["unet"]["file"] = "../unet.pt2"
    if what == "a format":
        manifest["format"] = "minidiff export 2"
    if what == "a kind":
        manifest["to"] = "tflite"
    if what == "an entry":
        del manifest["files"]
    if what != "no manifest":
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words[what]):
        open_export(tmp_path)


def test_an_export_of_another_model(made: Path, run: Run) -> None:
    one_error(run("parity", "text", "--against", made), "an export of another model", "('tiny sd')")
    one_error(run("parity", "text", "--against", "nowhere"), "nowhere: no export: there is no manifest.json in it")
    one_error(run("parity", "text", "--against", "no.such:function"), "No module named 'no'")


def changed(made: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Return a copy of an export after ``change`` of its manifest, with the hashes that its files have."""
    manifest = json.loads((made / "manifest.json").read_text())
    for name in manifest["files"]:
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            os.link(made / name, folder / name)
    change(manifest)
    manifest["files"] = digests(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def lie(program: str, *path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["programs"][program]
        for name in path[:-1]:
            entry = entry[name]
        entry[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lie("unet", "inputs", "x", "axes", value=["batch", 9, "height", "width"]),
            r"unet: inputs: 'x' {'axes': \['batch', 9, .*, and the model's {\"axes\": \[\"batch\", 4, ",
        ),
        (
            lie("text_encoder", "inputs", "ids", "dtype", value="float32"),
            r"text_encoder: inputs: 'ids' .*, and the model",
        ),
        (lie("vae_encoder", "outputs", value=["mean"]), r"vae_encoder: outputs \['mean'\], and the model"),
        (
            lambda manifest: manifest["programs"].pop("vae_decoder"),
            r"an export of \['unet', 'vae_encoder', 'text_encoder'\]; the",
        ),
        (
            lie("vae_decoder", "file", value="unet.pt2"),
            r"unet.pt2: can't be run as the model's vae_decoder \(.+\); export",
        ),
        (
            lie("vae_decoder", "file", value="identity.pt2"),
            r"its 'pixels' has the shape .*, and the model's has \(2, 3, 16, 24",
        ),
        (lie("vae_decoder", "file", value="other.pt2"), r"other.pt2: can't be read \(.+\); export the model again"),
    ],
    ids=["shapes", "dtypes", "outputs", "a part less", "another program", "a program of another size", "no program"],
)
def test_a_manifest_that_lies_about_programs_with_hashes_that_fit(
    mini: StableDiffusion, made: Path, tmp_path: Path, change: Any, words: str
) -> None:
    (tmp_path / "other.pt2").write_bytes(b"PK not a program")

    class Same(nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    torch.export.save(torch.export.export(Same(), (), {"latents": torch.zeros(2, 4, 8, 12)}), tmp_path / "identity.pt2")
    folder = changed(made, tmp_path, change)
    with pytest.raises(CheckpointError, match=words) as found:
        against(mini, folder, asked("a star", steps=1, height=16, width=16), judge=False)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 1000


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(format=LONG), "format='xxx"),
        (lambda manifest: manifest.update(to=LONG), "to='xxx"),
        (lambda manifest: manifest.update(model=LONG), "an export of another model, 'xxx"),
        (lambda manifest: manifest["programs"].update({LONG: manifest["programs"]["unet"]}), "an export of "),
        (lie("unet", "file", value=LONG), r"its file 'xxx.* is missing"),
        (lie("unet", "inputs", "x", "dtype", value=LONG), r"unet: inputs: 'x' .*, and the model's {\"axes\""),
        (lie("unet", "inputs", value=[LONG]), r"unet: inputs \['xxx.*, and the model's {\"x\""),
        (lie("unet", "inputs", LONG, value=0), r"unet: inputs: 'xxx.* 0, and the model's null"),
    ],
)
def test_what_a_manifest_says_at_length_is_cut(
    mini: StableDiffusion, made: Path, tmp_path: Path, change: Any, words: str
) -> None:
    folder = changed(made, tmp_path, change)
    with pytest.raises(CheckpointError, match=words) as found:
        against(mini, folder, asked("a star", steps=1, height=16, width=16), judge=False)
    assert len(str(found.value)) < 600 + len(folder)


def test_a_program_that_fails_is_one_line(
    mini: StableDiffusion, made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither torch's own remarks on a damaged archive are printed, nor what its interpreter says of a layer."""
    model, said = tmp_path / "mini.safetensors", logging.getLogger("torch.export")
    mini.save(model)
    (tmp_path / "damaged").mkdir()
    with zipfile.ZipFile(tmp_path / "damaged" / "empty.pt2", "w") as archive:
        archive.writestr("a/version", "x")
    folder = changed(made, tmp_path / "damaged", lie("unet", "file", value="empty.pt2"))
    level, records = said.level, list[Any]()
    monkeypatch.setattr(said, "handle", records.append)
    try:
        one_error(run("parity", model, "--against", folder, "--quiet"), "empty.pt2: can't be read (")
        assert records == []
    finally:
        said.setLevel(level)

    def fails(program: Any) -> None:
        raise RuntimeError("first" + 1000 * "." + "\nsecond")

    monkeypatch.setattr(torch.export, "unflatten", fails)
    with pytest.raises(CheckpointError, match=r"unet.pt2: can't be run layer by layer as the model's unet") as found:
        against(mini, str(made), asked("a star", steps=1, height=16, width=16), judge=False)
    assert len(str(found.value)) < 500 + len(str(made))


def refused(pipe: Any, out: Path, words: str, kind: type[Exception], **options: Any) -> None:
    before = sorted(out.parent.parent.rglob("*"))
    with pytest.raises(kind, match=words):
        export(pipe, out, **options)
    assert sorted(out.parent.parent.rglob("*")) == before


def test_what_cannot_be_exported_leaves_nothing(
    mini: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refused(mini, out, "to='tflite': known are torch, onnx, aoti", ConfigError, to="tflite")
    refused(mini, out, "CM with clip=1.0 clamps x0", UnsupportedError, plans=[("cm", 2)])
    refused(mini, tmp_path / "no" / "out", "the folder .* does not exist", CheckpointError)
    half = drawn(MINI, 1).to(dtype=torch.float16)
    refused(half, out, "the model is in float16 on cpu; an export is made of float32", ConfigError)
    fast = drawn(MINI, 1)
    fast.fast = ("packed",)
    refused(fast, out, "changed by packed: load it anew", ConfigError)
    monkeypatch.setattr(formats, "measured", lambda *given: 1e-3)
    refused(mini, out, "unet: torch is 0.001 of the largest value from the model, beyond 0", UnsupportedError)
    out.mkdir()
    (out / "mine").write_text("mine")
    refused(mini, out, "not replaced; name a folder that is new or empty", CheckpointError)


def test_missing_packages_and_compilers(
    mini: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(__import__("sys").modules, name, nn)
    one_error(run("export", "text", "out", "--to", "onnx"), "for ONNX: onnxruntime", "pip install 'minidiff[export]'")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    one_error(run("export", "text", "out", "--to", "aoti"), "needs a C++ compiler", "install g++")
    assert not (tmp_path / "out").exists()


def test_an_onnx_export_where_onnx_runtime_is_missing(
    mini: StableDiffusion, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    folder = changed(made, tmp_path, lambda manifest: manifest.update(to="onnx"))
    with pytest.raises(ConfigError, match=r"for ONNX: onnxruntime .*; pip install 'minidiff\[export\]'"):
        against(mini, folder, asked("a star", steps=1, height=16, width=16))


class Slipped(nn.GroupNorm):
    """A norm with an eps of its own."""


def slipped(pipe: Any) -> dict[str, nn.Module]:
    """A variant for ``--against``: the decoder with one slip."""
    vae = type(pipe.vae)(pipe.vae.config).requires_grad_(False)
    vae.load_state_dict(pipe.vae.state_dict())
    vae.decoder.mid.res2.norm1.eps = 1e-2
    return {"vae": vae}


def test_a_variant_is_compared_layer_by_layer(run: Run, tmp_path: Path) -> None:
    name = f"{__name__}:slipped"
    ended = run("parity", "text", "--against", name, "--steps", 1, "--size", "32x32", "--no-judge", "--quiet")
    assert ended.status == 1
    assert "first difference at vae_decoder/vae.decoder.mid.res2.norm1" in "\n".join(ended.out)
    (tmp_path / "names.json").write_text(json.dumps({"vae": {"decoder.conv_in": "decoder.conv_inn"}}))
    one_error(run("parity", "text", "--against", name, "--names", "names.json"), "no module 'decoder.conv_inn'")
    (tmp_path / "names.json").write_text(json.dumps({"vae": ["decoder"]}))
    one_error(run("parity", "text", "--against", name, "--names", "names.json"), "'vae' should be an object of names")
    one_error(run("parity", "text", "--against", f"{__name__}:no_such"), "has no function no_such")


def quantised(pipe: Any) -> dict[str, nn.Module]:
    """A variant whose linear layers multiply in 8 bits, and hold what is no tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = {nn.Linear}
        return {"unet": torch.ao.quantization.quantize_dynamic(pipe.unet, kind, dtype=torch.qint8)}  # type: ignore[no-untyped-call]


def compiled(pipe: Any) -> dict[str, nn.Module]:
    """A variant that torch.compile made, without a compiler of C++; not what it made for another test."""
    torch.compiler.reset()
    made: Any = torch.compile(pipe.unet, backend="eager")
    return {"unet": made}


def test_a_quantised_variant(run: Run) -> None:
    command = ("parity", "text", "--against", f"{__name__}:quantised", "--steps", 1, "--size", "32x32", "--quiet")
    ended = run(*command)
    assert ended.status == 1
    told = "\n".join(ended.out)
    assert "first difference at unet/unet.time.linear1" in told
    assert "operation aten.addmm() in A, quantized.linear_dynamic(" in " ".join(told.split())
    assert "0x" not in told
    assert "only one side can run in it" in told, "8 bits are not judged in float64"
    assert any(line.startswith("decode") for line in ended.out), "and then the whole run"
    assert run(*command, "--tolerance", 1).status == 0


def test_a_compiled_variant_and_a_list_of_names(run: Run, tmp_path: Path) -> None:
    command = ("parity", "text", "--against", f"{__name__}:compiled", "--steps", 1, "--size", "32x32", "--quiet")
    ended = run(*command, "--all")
    assert ended.status == 0, ended
    assert not any("conv_in" in line for line in ended.out)
    (tmp_path / "names.json").write_text(json.dumps({"unet": {"conv_in": "_orig_mod.conv_in"}}))
    ended = run(*command, "--all", "--names", "names.json")
    assert ended.status == 0, ended
    assert any(line.startswith("unet/unet.conv_in ") for line in ended.out)


def itself(pipe: Any) -> dict[str, nn.Module]:
    """A variant that is none."""
    return {"text_encoder": pipe.text_encoder}


def test_the_bundled_model_by_its_name(run: Run) -> None:
    ended = run("parity", "bundled", "--against", f"{__name__}:itself", "--steps", 1, "--size", "16x16", "--quiet")
    assert ended.status == 0, ended
    assert run("parity", "record", "bundled", "out.safetensors", "--steps", 1, "--size", "16x16", "--quiet").status == 0


VARIANT = """
import sys
from pathlib import Path
PATH = list(sys.path)
{first}

def unchanged(pipe):
    Path("seen").write_text("it ran")
    return {{"vae": pipe.vae}}
"""


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("own_file.py", "own_file"),
        ("own_package/__init__.py", "own_package"),
        ("own_folder/inside.py", "own_folder.inside"),
    ],
)
def test_a_variant_is_found_in_this_folder_and_the_path_of_imports_stays(
    file: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while the module is read: other threads import by it."""
    pipe, before = drawn(MINI, 1), list(sys.path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(VARIANT.format(first=""))
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        assert variant(pipe, f"{name}:unchanged") == {"vae": pipe.parts["vae"]}, k
    assert (tmp_path / "seen").read_text() == "it ran"
    assert sys.modules[name].PATH == sys.path == before


def test_a_variant_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = drawn(MINI, 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needy.py").write_text(VARIANT.format(first="import no_such_helper"))
    with pytest.raises(
        ConfigError, match=r"'no_such_helper'; needy needs it; .* in a package with it, or where Python"
    ):
        variant(pipe, "needy:unchanged")
    assert "needy" not in sys.modules
    (tmp_path / "needy.py").write_text(VARIANT.format(first=""))
    assert variant(pipe, "needy:unchanged"), "a module that failed is read again"
    with pytest.raises(ConfigError, match=r"needy.more.*; it is looked for in this folder and where Python looks"):
        variant(pipe, "needy.more:unchanged")
    (tmp_path / "torch").mkdir()
    with pytest.raises(ConfigError, match="torch has no function no_such"):
        variant(pipe, "torch:no_such")
    (tmp_path / "email").mkdir()
    monkeypatch.delitem(sys.modules, "email")
    with pytest.raises(ConfigError, match="email has no function no_such"):
        variant(pipe, "email:no_such")
    assert sys.modules["email"].__file__ is not None, "a folder without __init__.py stands back for a module"


def test_the_command(mini: StableDiffusion, made: Path, run: Run, tmp_path: Path) -> None:
    ended = run("export", "plain", "out", "--plan", "ddim:3", "--quiet")
    assert (ended.status, ended.out, ended.err) == (0, ["out"], [])
    assert json.loads((tmp_path / "out/manifest.json").read_text())["plans"] == ["plans/ddim-3.json"]
    ended = run("parity", "plain", "--against", "out", "--steps", 2, "--quiet")
    assert ended.status == 0, ended
    one_error(run("export", "plain", "out"), "out: is a folder with files in it, which is not replaced")
    one_error(run("export", "plain", "other", "--plan", "ddim"), "'ddim' should be SAMPLER:STEPS")
    assert BOUNDS["torch"].relative == 0


def test_a_tolerance_of_0_is_honoured_beside_a_bound(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of a format stands in only where no tolerance is given."""
    assert run("export", "plain", "out", "--quiet").status == 0
    monkeypatch.setitem(BOUNDS, "torch", formats.Bound(0.25, "planted"))
    for given, wanted in (((), 0.25), (("--tolerance", "0"), 0.0), (("--tolerance", "0.5"), 0.5)):
        ended = run("parity", "plain", "--against", "out", "--steps", 1, "--quiet", "--format", "json", *given)
        assert ended.status == 0, ended
        assert json.loads("\n".join(ended.out))["tolerance"] == wanted


@pytest.mark.slow
def test_the_script_that_measures_full_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    given = ["check_export", "--family", "ddpm", "--to", "torch", "--divide", "16"]
    monkeypatch.setattr(sys, "argv", given)
    script("check_export").main()
    heading, row = capsys.readouterr().out.splitlines()
    told = dict(zip(heading.split(), row.replace("MB", "").split(), strict=True))
    assert (told["family"], told["program"], told["to"], told["gap"]) == ("ddpm", "unet", "torch", "0")
    assert float(told["made"]) * float(told["weights"]) < 200, "what is imported does not count"


def test_networks_of_many_levels_are_run_at_sizes_that_they_can_halve() -> None:
    """Six levels, as the ddpm models of 256 pixels have: 8 pixels would be gone before the last."""
    level = Level(channels=16)
    config = replace(DDPM, unet=replace(DDPM.unet, levels=(level,) * 6, mid=level))
    pipe = drawn(config, 1)
    (program,) = programs(config, pipe.parts)
    assert {size[0] for size in program.sizes} == {1, 2, 3}
    for size in program.sizes:
        inputs = program.example(*size)
        assert program.eager(inputs)["out"].shape == inputs["x"].shape
