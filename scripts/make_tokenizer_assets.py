"""Make the two tables of the tokenizer in ``minidiff/assets``; run it again only to follow a newer reference.

    python scripts/make_tokenizer_assets.py merges bpe_simple_vocab_16e6.txt.gz
    python scripts/make_tokenizer_assets.py unicode

``merges`` cuts the public CLIP table (Radford et al. 2021, in the clip-anytorch package under ``clip/``) down to the
48,894 merges in use. ``unicode`` asks the ``tokenizers`` library itself, one code point at a time, what it takes for
a letter, a number and white space, how it writes lower case, and which characters its NFC knows: its parts follow
three different versions of Unicode, and Python's own tables a fourth that changes with Python.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Callable, Iterable
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "minidiff" / "assets"
MERGES_IN_USE = 49152 - 256 - 2  # the public file is longer; CLIP was trained with this many
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]

# One character that each version of Unicode brought, of the kind that the named part looks at.
LETTER_OF = {"13.0": 0x10FB0, "14.0": 0x10570, "15.0": 0x11F04, "15.1": 0x2EBF0, "16.0": 0x105C0, "17.0": 0x16EA0}
CAPITAL_OF = {"12.0": 0xA7C2, "13.0": 0xA7C7, "14.0": 0x10570, "16.0": 0x10D50, "17.0": 0x16EA0}
MARK_OF = {"8.0": 0xA69E, "9.0": 0x1DFB, "10.0": 0x1DF6, "11.0": 0x7FD, "12.0": 0x1E130, "13.0": 0x1ABF, "14.0": 0x1AC1}


def newest(sentinels: dict[str, int], known: Callable[[str], bool]) -> str:
    """Return the newest version of Unicode of which a character is ``known``."""
    return [version for version, c in sentinels.items() if known(chr(c))][-1]


def ranges(chars: Iterable[str]) -> str:
    """Format characters as a line of hexadecimal ranges: ``41-5a 61-7a aa``."""
    runs: list[list[int]] = []
    for c in sorted(map(ord, chars)):
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return " ".join(f"{a:x}" if a == b else f"{a:x}-{b:x}" for a, b in runs)


def lower_runs(lower: dict[int, int]) -> str:
    """Format one-to-one lower cases as runs ``first-last/step:target of the first``; capitals are often two apart."""
    runs: list[list[int]] = []  # first, last, step (0: not known yet), target of the first
    for c, to in sorted(lower.items()):
        if runs:
            first, last, step, target = runs[-1]
            if to - c == target - first and c - last in ((1, 2) if step == 0 else (step,)):
                runs[-1] = [first, c, c - last, target]
                continue
        runs.append([c, c, 0, to])
    return " ".join(f"{a:x}:{to:x}" if a == b else f"{a:x}-{b:x}/{step}:{to:x}" for a, b, step, to in runs)


def in_class(pattern: str) -> set[str]:
    """Return every character that the library's regular expressions find in ``pattern``."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return {c for piece, _ in split.pre_tokenize_str("".join(CODE_POINTS)) for c in piece}


def composing() -> set[str]:
    """Return every character that the library's NFC can move, take apart or put together.

    A mark of combining class above 1 goes behind U+0334 (class 1), one of class 1 to 229 goes before U+0300 (class
    230). All that composes stands in some decomposition.
    """
    from tokenizers import normalizers

    nfd = normalizers.NFD().normalize_str
    found: set[str] = set()
    for c in CODE_POINTS:
        apart = nfd(c)
        if apart != c:
            found.update(c, apart)
        elif nfd(c + "\u0334") != c + "\u0334" or nfd("\u0300" + c) != "\u0300" + c:
            found.add(c)
    return found


def write_unicode() -> None:
    """Probe the library and write ``unicode.txt``."""
    import tokenizers
    from tokenizers import normalizers

    letters, numbers, spaces = in_class(r"\p{L}"), in_class(r"\p{N}"), in_class(r"\s")
    lower = {c: normalizers.Lowercase().normalize_str(c) for c in CODE_POINTS}
    lower = {c: to for c, to in lower.items() if to != c}
    single = {ord(c): ord(to) for c, to in lower.items() if len(to) == 1}
    several = " ".join(f"{ord(c):x}:{'.'.join(f'{ord(x):x}' for x in to)}" for c, to in lower.items() if len(to) > 1)
    movable = composing()
    classes = newest(LETTER_OF, letters.__contains__)
    capitals = newest(CAPITAL_OF, lower.__contains__)
    marks = newest(MARK_OF, movable.__contains__)
    text = f"""\
# Unicode as tokenizers {tokenizers.__version__} sees it, in hexadecimal; written by scripts/make_tokenizer_assets.py.
# letters ({len(letters)}), numbers ({len(numbers)}) and spaces ({len(spaces)}): Unicode {classes}
# lower ({len(lower)} capitals, first-last/step:lower case of the first): Unicode {capitals}
# composing ({len(movable)} characters that NFC can change, move or join): Unicode {marks}
letters {ranges(letters)}
numbers {ranges(numbers)}
spaces {ranges(spaces)}
lower {lower_runs(single)} {several}
composing {ranges(movable)}
"""
    (ASSETS / "unicode.txt").write_text(text, encoding="ascii", newline="\n")
    print("\n".join(text.splitlines()[:4]))


def write_merges(public: Path) -> None:
    """Write the merges in use, one ``left right`` a line in order of rank, as ``clip_merges.txt.gz``."""
    lines = gzip.decompress(public.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 1 + MERGES_IN_USE]
    if len(merges) != MERGES_IN_USE or any(len(line.split(" ")) != 2 for line in merges):
        raise SystemExit(f"{public} does not hold {MERGES_IN_USE} merges of two tokens after its first line")
    packed = gzip.compress("\n".join(merges).encode("utf-8"), compresslevel=9, mtime=0)
    (ASSETS / "clip_merges.txt.gz").write_bytes(packed)
    print(f"{len(merges)} merges, {len(packed)} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tables of the tokenizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("merges", help="cut down the public CLIP table").add_argument("public", type=Path)
    commands.add_parser("unicode", help="probe the tokenizers library")
    arguments = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    if arguments.command == "merges":
        write_merges(arguments.public)
    else:
        write_unicode()


if __name__ == "__main__":
    main()
