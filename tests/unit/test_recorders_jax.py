"""The port to JAX in scripts/recorders: held against the golden of SD1, without and with mistakes that were reported.

The mistakes are the rows of a table in the README there: its last column is the stage that the comparison must name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minidiff.parity import comparing, goldens
from minidiff.parity.formats import formatted
from minidiff.parity.report import Report
from minidiff.parity.values import open_recording
from tests.tolerances import PORTED_LAYER, PORTED_RUN

ROOT = Path(__file__).resolve().parents[2]
RECORDERS = ROOT / "scripts" / "recorders"
GOLDEN = ROOT / "tests" / "fixtures" / "goldens" / "sd1"
RECORDING = GOLDEN / goldens.RECORDING
ROWS = dict(
    re.findall(r"^\| `([\w ]+)` \|.*\| `(\S+)` \|$", (RECORDERS / "README.md").read_text("utf-8"), re.MULTILINE)
)
# Stages of the golden that the port does not have: the norm in the VAE is of a picture there, in diffusers of tokens.
NOT_HELD = {
    *(f"{section}/text_encoder/token:in" for section in ("prompt", "negative")),
    "plan/init_noise_sigma",
    *(f"decode/vae/decoder.mid.attn.norm{end}" for end in ("", ":in")),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port() -> Any:
    jax = pytest.importorskip("jax", reason="records a port to JAX: pip install jax")
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes into compiling small functions
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    sys.path.append(str(RECORDERS))
    import jax_sd1

    return jax_sd1


@pytest.fixture
def compare(port: Any, tmp_path: Path) -> Callable[..., Report]:
    """A function that runs the port with some choices and compares it with the golden."""

    def run(choices: Any, *, local: bool) -> Report:
        mine = tmp_path / "mine.safetensors"
        port.record(GOLDEN / goldens.FOLDER, RECORDING, mine, choices, local=local)
        bound = PORTED_LAYER if local else PORTED_RUN
        with open_recording(RECORDING) as a, open_recording(mine) as b:
            return comparing.compare(a, b, bound.relative, local=b if local else None)

    return run


@pytest.mark.parametrize("local", [True, False])
def test_the_port(port: Any, compare: Callable[..., Report], local: bool) -> None:
    report = compare(port.RIGHT, local=local)
    assert report.equal, str(report)
    assert not report.causes
    assert set(report.only_a) == NOT_HELD
    assert len(report.rows) == 381
    names = {row.stage for row in report.rows}
    assert {"prompt/ids", "step.0/unet/mid.attn.0.blocks.0.attn2", "step.3/x", "decode/pixels"} < names


def test_the_table_has_every_slip(port: Any) -> None:
    assert len(ROWS) >= 6
    assert {name: stage for name, (stage, _) in port.SLIPS.items()} == ROWS
    assert all(choices != port.RIGHT for _, choices in port.SLIPS.values())


@pytest.mark.parametrize("slip", ROWS)
def test_a_slip_is_named(port: Any, compare: Callable[..., Report], slip: str) -> None:
    """On equal inputs, the first cause is where the slip is, and so are all the others."""
    stage, choices = port.SLIPS[slip]
    report = compare(choices, local=True)
    verdict = json.loads(formatted(report, "json"))
    assert (verdict["first"], verdict["equal"]) == (stage, False)
    # the layers of later steps are not recorded, so their predictions stand for them
    causes = {re.split(r"[./]", cause)[-1] for cause in verdict["causes"] if not re.match(r"step\.[123]/pred", cause)}
    assert causes == {re.split(r"[./]", stage)[-1]}

    alone = compare(choices, local=False)
    largest = max(row.local.max_rel for row in report.causes if row.local is not None)
    assert alone.first is not None or largest < PORTED_RUN.relative, "a run by itself shows it, unless it is tiny"
    assert alone.first is None or alone.first.stage == stage
