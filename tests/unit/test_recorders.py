"""The writers of scripts/recorders: each records the tiny SD1 of the goldens, and is held against the golden.

A writer whose program is not installed is skipped, by name.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file as numpy_file
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights_convert
from minidiff.parity import Writer, assert_recording, automap, goldens, theirs
from minidiff.parity.command import run_of
from minidiff.parity.comparing import compare
from minidiff.parity.kernels import machine
from minidiff.parity.ours import Ours, asked
from minidiff.parity.recording import Recording, read_recording, record, write_recording
from minidiff.parity.report import Report
from minidiff.parity.values import open_recording
from minidiff.samplers import sampler_from_config
from tests.tolerances import PORTED, PORTED_RUN, RECORDED

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "recorders"))
import named_modules

ROOT = Path(__file__).resolve().parents[2]
RECORDERS = ROOT / "scripts" / "recorders"
GOLDEN = ROOT / "tests" / "fixtures" / "goldens" / "sd1"
MODEL, RECORDING = GOLDEN / goldens.FOLDER, GOLDEN / goldens.RECORDING
WEIGHTS = MODEL / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def golden() -> Recording:
    return read_recording(RECORDING)


@pytest.fixture(scope="module")
def model() -> Any:
    return weights_convert.load(MODEL, device="cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the goldens were made with; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(goldens.THREADS)
    yield
    torch.set_num_threads(before)


def exact(golden: Recording) -> float:
    """Equal bits where the same kernels ran, otherwise the bound of another processor."""
    return 0.0 if machine().items() <= golden.run.items() else RECORDED.relative


def unet_inputs(golden: Recording) -> list[Tensor]:
    return [golden.tape[f"step.0/{name}"] for name in ("input", "t", "context")]


def stages(report: Report, section: str) -> list[str]:
    return [row.stage for row in report.rows if row.stage.startswith(section)]


def record_modules(model: Any, golden: Recording, path: Path) -> None:
    with torch.no_grad(), Writer(path, "named_modules", dtype="float32") as writer:
        with named_modules.recorded(model.text_encoder, writer, ["prompt/text_encoder/", "negative/text_encoder/"]):
            for section in ("prompt", "negative"):
                named_modules.add(writer, f"{section}/ids", golden.tape[f"{section}/ids"])
                model.text_encoder(golden.tape[f"{section}/ids"])
        with named_modules.recorded(model.unet, writer, ["step.0/unet/"]):
            named_modules.add(writer, "step.0/prediction", model.unet(*unet_inputs(golden)))
            model.unet(*unet_inputs(golden))  # a second call has no section
        with named_modules.recorded(model.vae, writer, ["decode/vae/"]):
            model.vae.decode(golden.tape["step.3/x"] / model.vae.config.scaling_factor)


def test_named_modules(model: Any, golden: Recording, tmp_path: Path) -> None:
    record_modules(model, golden, tmp_path / "mine.safetensors")
    report = assert_recording(tmp_path / "mine.safetensors", RECORDING, exact(golden))
    for section, least in (("prompt/text", 20), ("negative/text", 20), ("step.0/unet/", 140), ("decode/vae/", 40)):
        assert len(stages(report, section)) > least, section
    assert not any(hook for part in model.unet.modules() for hook in part._forward_hooks), "hooks stay"


def test_named_modules_find_a_slip(model: Any, golden: Recording, tmp_path: Path) -> None:
    norm = model.unet.mid.attn[0].norm
    before, norm.eps = norm.eps, 1e-3
    try:
        record_modules(model, golden, tmp_path / "mine.safetensors")
    finally:
        norm.eps = before
    with pytest.raises(AssertionError, match=r"first difference at step\.0/unet/mid\.attn\.0\.norm"):
        assert_recording(tmp_path / "mine.safetensors", RECORDING, RECORDED.relative)


def test_named_modules_widen_bfloat16(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4)).to(torch.bfloat16)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with Writer(tmp_path / "mine.safetensors", "named_modules") as writer:
        hooks = named_modules.recorded(layer, writer, ["a/", "b/"])
        with torch.no_grad(), hooks:
            layer(x)
            want = layer(x)
    found = read_recording(tmp_path / "mine.safetensors")
    assert list(found.tape) == ["a/0", "b/0"]
    assert torch.equal(found.tape["a/0"], want.float())


DIFFUSERS = {
    "prompt": goldens.PROMPT,
    "negative_prompt": goldens.NEGATIVE,
    "num_inference_steps": goldens.STEPS,
    "width": goldens.WIDTH,
    "height": goldens.HEIGHT,
}


def test_diffusers(golden: Recording, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="records diffusers; it is in the `parity` extra")
    import diffusers_pipeline

    pipe = theirs.open_pipeline(MODEL, torch.float32, "cpu")
    names = diffusers_pipeline.minidiff_names(pipe, MODEL)
    for given, file in ((names, "mapped.safetensors"), (None, "own.safetensors")):
        generator = torch.Generator().manual_seed(goldens.SEED)
        diffusers_pipeline.record(pipe, tmp_path / file, given, generator=generator, **DIFFUSERS)
    report = assert_recording(tmp_path / "mapped.safetensors", RECORDING, exact(golden))
    assert not report.only_b, "a stage that the golden does not have"
    assert [stage for stage in report.only_a if not stage.endswith((":in", "/ids", "/context", "plan/timesteps"))] == [
        "plan/init_noise_sigma"
    ]
    with open_recording(RECORDING) as a, open_recording(tmp_path / "own.safetensors") as b:
        pairs = automap.propose(a, b)
    sections = [(section, names[part]) for part, found in diffusers_pipeline.SECTIONS.items() for section in found]
    right = {section + y: section + x for section, layers in sections for y, x in layers.items()}
    wrong = [(pair.a, pair.b) for pair in pairs if right.get(pair.b, pair.a) != pair.a]
    assert wrong == []
    assert sum(pair.b in right for pair in pairs) > 230, "of 237 layers that both show"
    sure = automap.as_names([pair for pair in pairs if pair.confidence == "values"])
    assert sure["step.0/unet/mid.res1.conv1"] == "step.0/unet/mid_block.resnets.0.conv1"
    report = assert_recording(tmp_path / "own.safetensors", RECORDING, exact(golden), names=sure)
    assert len(report.rows) > 200, "--names auto pairs diffusers' own names"
    assert "step" not in vars(pipe.scheduler)


@pytest.fixture(scope="module")
def resblock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, compiled."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler: c++, g++ or clang++")
    program = tmp_path_factory.mktemp("cpp") / "resblock"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, str(RECORDERS / "cpp" / "resblock.cpp"), "-o", str(program)], check=True)
    return program


RESBLOCK = [f"step.0/unet/down.0.res.0{layer}" for layer in (".norm1", ".conv1", ".time", ".norm2", ".conv2", "")]


def test_cpp(resblock: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    subprocess.run([resblock, WEIGHTS, RECORDING, out], check=True)
    report = assert_recording(out, RECORDING, PORTED.relative)
    assert stages(report, "") == RESBLOCK
    assert not report.only_b
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_cpp_finds_a_slip(resblock: Path, tmp_path: Path) -> None:
    weights = load_file(WEIGHTS)
    weights["down_blocks.0.resnets.0.conv2.weight"] *= 1.001
    save_file(weights, tmp_path / "weights.safetensors")
    subprocess.run([resblock, tmp_path / "weights.safetensors", RECORDING, tmp_path / "mine"], check=True)
    with pytest.raises(AssertionError, match=r"first difference at step\.0/unet/down\.0\.res\.0\.conv2"):
        assert_recording(tmp_path / "mine", RECORDING, PORTED.relative)


def test_cpp_refuses_a_file_that_is_none(resblock: Path, tmp_path: Path) -> None:
    """A file that is none is one line of an error, and leaves nothing behind."""
    (tmp_path / "weights").write_bytes(b"no")
    done = subprocess.run(
        [resblock, tmp_path / "weights", RECORDING, tmp_path / "mine"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, f"{tmp_path / 'weights'}: no safetensors file\n")
    assert not (tmp_path / "mine").exists()


def traced_inputs(golden: Recording) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the UNet with a timestep for each picture, as a graph takes it."""
    x, t, context = unet_inputs(golden)
    return x, t.expand(len(x)).contiguous(), context


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_openvino(model: Any, golden: Recording, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="records OpenVINO: pip install openvino")
    import openvino_graph

    inputs = traced_inputs(golden)
    graph = openvino.convert_model(model.unet, example_input=inputs)
    with Writer(tmp_path / "mine.safetensors", "openvino", dtype="float32") as writer:
        openvino_graph.record(graph, [value.numpy() for value in inputs], writer, "step.0/unet/")
    report = assert_recording(tmp_path / "mine.safetensors", RECORDING, PORTED.relative)
    assert len(stages(report, "step.0/unet/")) > 140
    assert {"step.0/unet/conv_out", "step.0/unet/mid.attn.0.blocks.0.attn2"} < set(stages(report, ""))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime(model: Any, golden: Recording, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="records ONNX Runtime: pip install onnx onnxscript onnxruntime")
    import onnx_runtime

    inputs, names = traced_inputs(golden), ["x", "t", "context"]
    torch.onnx.export(model.unet, inputs, str(tmp_path / "unet.onnx"), input_names=names, dynamo=True, verbose=False)
    with Writer(tmp_path / "mine.safetensors", "onnxruntime", dtype="float32") as writer:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        onnx_runtime.record(tmp_path / "unet.onnx", given, writer, "step.0/unet/")
    report = assert_recording(tmp_path / "mine.safetensors", RECORDING, PORTED.relative)
    assert len(stages(report, "step.0/unet/")) > 140
    assert {"step.0/unet/conv_out", "step.0/unet/mid.attn.0.blocks.0.attn2"} < set(stages(report, ""))


def hold_blocks(path: Path, writer: Writer, blocks: Any, array: Callable[[Any], Any]) -> None:
    """Record a ResBlock and a transformer block of a module like ``tinygrad_blocks``, and compare with the golden.

    ``array`` makes a value of the program from one of numpy.
    """
    weights, tape, section = numpy_file(WEIGHTS), numpy_file(RECORDING), "step.0/unet/down.0."

    def below(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): array(v) for k, v in weights.items() if k.startswith(prefix)}

    with writer:
        show = blocks.shower(writer, section + "res.0.")
        x = tape["step.0/unet/conv_in"]
        given = [array(x if writer.layout == "NCHW" else x.transpose(0, 2, 3, 1)), array(tape["step.0/unet/time"])]
        blocks.resblock(below("down_blocks.0.resnets.0."), *given, show, groups=4)
        show = blocks.shower(writer, section + "attn.0.blocks.0.")
        given = [array(tape[name]) for name in (section + "attn.0.blocks.0:in", "step.0/context")]
        block = below("down_blocks.0.attentions.0.transformer_blocks.0.")
        blocks.transformer_block(block, *given, show, heads=2)
    report = assert_recording(path, RECORDING, PORTED.relative)
    assert not report.only_b
    assert set(RESBLOCK) < set(stages(report, ""))
    assert len(stages(report, section + "attn.0.blocks.0")) == 17


@pytest.mark.slow
def test_tinygrad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEV", "PYTHON")  # its interpreter, which needs no compiler
    monkeypatch.setenv("CACHELEVEL", "0")
    tinygrad = pytest.importorskip("tinygrad", reason="records tinygrad: pip install tinygrad")
    import tinygrad_blocks

    path = tmp_path / "mine.safetensors"
    hold_blocks(path, Writer(path, "tinygrad", dtype="float32"), tinygrad_blocks, tinygrad.Tensor)


def test_mlx(tmp_path: Path) -> None:
    mlx = pytest.importorskip("mlx.core", reason="records MLX: pip install mlx, or mlx[cpu] where there is no Mac")
    import mlx_blocks

    path = tmp_path / "mine.safetensors"
    hold_blocks(path, Writer(path, "mlx", layout="NHWC", dtype="float32"), mlx_blocks, mlx.array)


@pytest.fixture
def k_diffusion() -> Any:
    for name in ("k_diffusion", "scipy", "torchsde"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install scipy torchsde, pip install --no-deps k-diffusion")
    import k_diffusion_samplers

    return k_diffusion_samplers


def hold_k_diffusion(k_diffusion: Any, model: Any, sampler: str, folder: Path) -> Report:
    """Let k-diffusion repeat a run of minidiff with a sampler, and compare the two."""
    request = asked(**K_DIFFUSION_RUN, sampler=sampler_from_config({"name": sampler}))
    ours, theirs_ = folder / "minidiff.safetensors", folder / "k_diffusion.safetensors"
    found = record(Ours(model, request, deep=lambda scope: False), run_of(model, request))
    write_recording(ours, found)
    k_diffusion.record(model.unet, model.schedule.alphas_cumprod, ours, theirs_)
    with open_recording(ours) as a, open_recording(theirs_) as b:
        return compare(a, b, PORTED_RUN.relative)


# 5 steps: timesteps between those of the table, which minidiff interpolates in sigma and k-diffusion in its logarithm
K_DIFFUSION_RUN = {"prompt": "a red fox", "negative_prompt": "blurry", "steps": 5, "width": 16, "height": 8}


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 5), ("euler_ancestral", 5), ("heun", 9), ("lms", 5)])
def test_k_diffusion(k_diffusion: Any, model: Any, tmp_path: Path, sampler: str, calls: int) -> None:
    report = hold_k_diffusion(k_diffusion, model, sampler, tmp_path)
    assert report.equal, str(report)
    assert not report.only_b
    steps = [f"step.{i}/{name}" for i in range(calls) for name in ("input", "t", "prediction", "x")]
    assert stages(report, "step.") == steps
    assert "start/x" in stages(report, "")


def test_k_diffusion_with_another_sampler(
    k_diffusion: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMS begins as Euler does; its second step, which remembers the first, is the one that differs."""
    monkeypatch.setitem(k_diffusion.SAMPLERS, "euler", "sample_lms")
    report = hold_k_diffusion(k_diffusion, model, "euler", tmp_path)
    assert report.first is not None
    assert report.first.stage == "step.1/x"
