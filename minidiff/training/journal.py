"""Log of a training run: a line of a CSV file for every step, and the same curves for TensorBoard if available."""

from __future__ import annotations

import csv
import dataclasses
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minidiff.storage.reading import open_regular
from minidiff.storage.writing import append, atomic
from minidiff.training.loop import Report

COLUMNS = [field.name for field in dataclasses.fields(Report)]


class Table:
    """CSV file whose first column is the step; a run that resumes from step ``done`` drops the lines after it."""

    def __init__(self, path: Path, columns: list[str], done: int) -> None:
        rows: list[list[str]] = []
        if done and path.exists():
            with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace", newline="") as old:
                # A kill may have truncated the last line; its step is repeated, and so is the line.
                rows = [r for r in csv.reader(old) if len(r) == len(columns) and r[0].isdigit() and int(r[0]) <= done]
        with atomic(path) as file:  # the old lines stay until the new ones are written
            file.write(_lines(columns, *rows))
        self.file = append(path)

    def write(self, *rows: Any) -> None:
        """Write a line that appears in the file at once."""
        self.file.write(_lines(*rows))


def _lines(*rows: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class Journal:
    """``log.csv`` and ``held_out.csv`` in ``folder``, and curves for TensorBoard."""

    def __init__(self, folder: Path, done: int) -> None:
        self.folder, self.done = folder, done
        self.steps = Table(folder / "log.csv", COLUMNS, done)
        self.evaluations: Table | None = None
        self.board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def step(self, report: Report) -> None:
        """Write the result of one step."""
        self.steps.write(dataclasses.astuple(report))
        self._draw(report.step, {name: getattr(report, name) for name in COLUMNS[1:]})

    def held_out(self, step: int, loss: float) -> None:
        """Write the loss on held-out data after ``step``."""
        if self.evaluations is None:
            self.evaluations = Table(self.folder / "held_out.csv", ["step", "loss"], self.done)
        self.evaluations.write((step, loss))
        self._draw(step, {"held_out": loss})

    def _draw(self, step: int, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        for table in (self.steps, self.evaluations):
            if table is not None:
                table.file.close()
        if self.board is not None:
            self.board.close()
