"""Time that a prompt takes to become chunks, for each dialect: at most 5 ms.

    python scripts/bench_dialects.py [--times N]

The text encoder is not part of it. "new" is a text whose words the tokenizer has not seen yet, "again" the same once
more: the tokenizer remembers words. The long prompts have 150 words and every sign that their dialect gives a meaning.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minidiff.models.tokenizer import Tokenizer, clip_table
from minidiff.pipeline.dialects import DIALECTS

LIMIT = 5.0  # ms
STEPS = 50
WORDS = [token[:-4] for token in clip_table()[0] if re.fullmatch("[a-z]{3,}</w>", token)]
SIGNS = {
    "a1111": "{0}, ({1}:1.3) [{2}] (({3})), [{4}|{5}] ",
    "comfyui": "{0}, ({1}:1.3) ({2} ({3}:0.7)) {4} {5} ",
    "compel": "{0}, ({1})1.3 {2}++ ({3} {4}-)0.8 {5} ",
    "sd_embed": "{0}, ({1}:1.3) [{2}] (({3})), {4} {5} ",
}


def text(name: str, clauses: int, rng: random.Random) -> str:
    """Return a prompt of ``clauses`` times six words."""
    return "".join(SIGNS[name].format(*rng.sample(WORDS, 6)) for _ in range(clauses))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50, metavar="N", help="prompts of each kind (default: 50)")
    args = parser.parse_args()
    rng, slowest = random.Random(0), 0.0
    print(f"{'':<10}{'tokens':>8}{'new, ms':>10}{'again, ms':>11}   processor time, medians of {args.times} prompts")
    for name, dialect in DIALECTS.items():
        for clauses in (3, 25):
            tokenizer, taken, tokens = Tokenizer(), [[], []], 0
            for _ in range(args.times):
                prompt = text(name, clauses, rng)
                for kind in taken:
                    start = time.thread_time()
                    readings = list(dialect.readings(prompt, tokenizer, STEPS))
                    kind.append(1000 * (time.thread_time() - start))
                tokens = sum(len(chunk.ids) for reading in readings for chunk in reading.chunks)
            new, again = map(statistics.median, taken)
            slowest = max(slowest, new)
            print(f"{name:<10}{tokens:>8}{new:>10.2f}{again:>11.2f}")
    print(f"slowest: {slowest:.2f} ms, of {LIMIT:g} ms")
    return int(slowest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
