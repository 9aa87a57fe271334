"""``--help`` of every command, compared with tests/fixtures/help.txt so that a review shows every change.

python -m tests.unit.test_help      # writes the file anew
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from minidiff.cli import COMMANDS, parser

FILE = Path(__file__).parents[1] / "fixtures" / "help.txt"
PYTHON = (3, 11)  # argparse lays its text out anew with every version


def helps(columns: str = "80") -> str:
    """The help of the program and of every command, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", columns)
        patch.setenv("NO_COLOR", "1")
        patch.setenv("PYTHON_COLORS", "0")
        top = parser()
        texts = {"minidiff": top.format_help()}
        (commands,) = (action for action in top._actions if hasattr(action, "choices") and action.choices)
        texts |= {f"minidiff {name}": commands.choices[name].format_help() for name in COMMANDS}  # type: ignore[index]
    return "\n".join(f"$ {name} --help\n{text}" for name, text in texts.items())


def options(text: str) -> dict[str, list[str]]:
    """The options of each command."""
    pages = re.split(r"^\$ ", text, flags=re.M)[1:]
    return {page.split("\n")[0]: sorted(set(re.findall(r"^  (--[\w-]+)", page, re.M))) for page in pages}


def test_the_help_is_as_it_was_read() -> None:
    stored, now = FILE.read_text(encoding="utf-8"), helps()
    assert options(now) == options(stored)
    assert len(options(now)["minidiff generate --help"]) > 40
    if sys.version_info[:2] == PYTHON:
        assert now == stored


def test_no_line_of_help_is_longer_than_the_terminal() -> None:
    for line in helps().split("\n"):
        assert len(line) <= 80 or line.startswith("  minidiff ") or line[:1] not in (" ",), line


if __name__ == "__main__":
    FILE.write_text(helps(), encoding="utf-8")
