"""Train the bundled model from scratch to `minidiff/assets/shapes.safetensors`, on two CPU cores.

    python scripts/train_shapes.py                   # everything; can be stopped, and goes on where it was
    python scripts/train_shapes.py --out out/shapes  # where the runs are kept (this is the default)
    python scripts/train_shapes.py --begin 18-loose --model FILE   # the stages from one on, from a model that is there

An autoencoder learns to repeat the pictures of the procedural data set through 16 x 16 x 4 latents; a UNet and a text
encoder learn to denoise those latents given the captions, and in between the text encoder learns, as CLIP's did, which
words look like what. What is shipped are the averaged weights in float16. `scripts/eval_shapes.py` scores them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _contrast import teach
from torch import Tensor

from minidiff.config import (
    CLIPTextConfig,
    Level,
    ModelConfig,
    ScheduleConfig,
    TokenizerConfig,
    UNetConfig,
    VAEConfig,
    text,
)
from minidiff.errors import MinidiffError
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline import StableDiffusion, load, random_model
from minidiff.storage import checkpoint
from minidiff.storage.files import lazy
from minidiff.training import scenes, shapes
from minidiff.training.batch import Data
from minidiff.training.captions import PLURALS, SHAPES, loose_vocabulary, vocabulary
from minidiff.training.data import ShapesStream
from minidiff.training.loop import Trainer
from minidiff.training.run import MODEL, STATE, train
from minidiff.training.scenes import Scene, Thing
from minidiff.training.settings import TrainConfig
from minidiff.training.zero_init import zero_residual_branches

ROOT = Path(__file__).resolve().parent.parent
ASSET = ROOT / "minidiff" / "assets" / "shapes.safetensors"
WIDTH = 128  # of a text token
LENGTH = 32  # of a prompt in tokens: the longest caption has 19, and 77 would cost a twentieth more

VAE = TrainConfig(
    parts=("vae",), steps=1000, batch=16, rate=1.5e-3, warmup=30, decay=0.0, ema=0.99, kl=1e-3, samples=32
)
UNET = TrainConfig(
    parts=("unet", "text_encoder"),
    steps=5000,
    batch=32,
    rate=1e-3,
    curve="constant",
    warmup=100,
    betas=(0.9, 0.99),
    ema=0.997,
    save_every=200,
    sample_every=1000,
    samples=36,
)
LOOSE_STEPS = 14000


Stage = Callable[[StableDiffusion, Path], StableDiffusion]  # a model and a folder for the run -> the model trained


def stages() -> dict[str, Stage]:
    """Return the trainings in their order, by folder; each starts from the averaged weights of the one before.

    What each was for, as it was found: 4, UNet and text encoder together, learned shapes and backgrounds, and none of
    the words for the thing in front. 5 taught the words. 6 and 7 began to use them, for colours. 8, one thing at a
    time, learned shapes by name: with two in every other picture there are too many ways to misunderstand. 9 has pairs
    again, and a learning rate that falls. 10 to 12 are the same once more, begun at the full rate; strong guidance made
    pictures worse, so from 11 on one caption in five is dropped instead of one in ten, for a better notion of what
    there is without a prompt. Where the rate stays, one can decide late how long to go on. 13 and 14 are that, longer,
    and in bfloat16, on a processor that has it; elsewhere that is much slower, and float32 does as well. What was wrong
    then were pictures of one thing, small ones in their shape and others drawn twice: 15 has more of them. Of what
    failed after 15, nearly all had no place in the caption, something small, a shape with corners or a hole, or green
    or purple: 16 has more of those. Guidance darkened colours in the last third of the way, where the model had had
    little practice without a prompt: 16 draws the timesteps almost alike, and drops one caption in four.
    17 is that again, shorter and at a lower rate. 18 learns captions with parts left out and a few new words, so the
    text encoder is trained again, too.
    """
    alone = replace(UNET, parts=("unet",), warmup=20)
    noisy = replace(alone, noisy=2.0)
    dropping = replace(noisy, drop_prompt=0.2)
    short = replace(dropping, precision="bfloat16")
    even = replace(short, noisy=1.2, drop_prompt=0.25)
    return {
        "1-vae": partial(run, VAE, Crowd(1)),
        "2-vae": partial(run, replace(VAE, steps=800, rate=1e-3), Crowd(2)),
        "3-vae": partial(run, replace(VAE, steps=1200, rate=6e-4), Crowd(3)),
        "4-unet": partial(run, UNET, ShapesStream(0)),
        "5-text": words,
        "6-unet": partial(run, replace(alone, warmup=100, steps=600, seed=1), ShapesStream(1)),
        "7-unet": partial(run, replace(noisy, steps=2000, seed=2), ShapesStream(2)),
        "8-unet": partial(run, replace(noisy, steps=3600, seed=4), Singles(4)),
        "9-unet": partial(run, replace(noisy, steps=3400, curve="linear", seed=5), ShapesStream(5)),
        "10-unet": partial(run, replace(noisy, steps=600, seed=6), ShapesStream(6)),
        "11-unet": partial(run, replace(dropping, steps=1600, seed=7), ShapesStream(7)),
        "12-unet": partial(run, replace(dropping, steps=2000, curve="linear", seed=8), ShapesStream(8)),
        "13-unet": partial(run, replace(short, steps=9000, seed=9), ShapesStream(9)),
        "14-unet": partial(run, replace(short, steps=4000, curve="linear", ema=0.999, seed=10), ShapesStream(10)),
        "15-unet": partial(run, replace(short, steps=12000, curve="linear", ema=0.999, seed=11), MostlySingles(11)),
        "16-unet": partial(run, replace(even, steps=13000, curve="linear", ema=0.999, seed=32), HardSingles(32)),
        "17-unet": partial(
            run,
            replace(even, noisy=1.5, steps=5500, rate=6e-4, curve="linear", ema=0.999, seed=33),
            HardSingles(33),
        ),
        "18-loose": loosely,
    }


class Singles:
    """Pictures of one thing, from which a UNet learns the words."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Return pictures ``start`` .. ``start + count - 1``, none of them of a held-out triple."""
        return shapes.drawn(shapes.items(self.seed, start, count, "single"))


class MostlySingles:
    """Training data with three pictures of four of one thing, instead of two."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Return pictures ``start`` .. ``start + count - 1``: even ones from the data set, odd ones of one thing."""
        mixed, alone = (shapes.items(self.seed, start, count, kind) for kind in ("train", "single"))
        return shapes.drawn([(alone if (start + k) % 2 else mixed)[k] for k in range(count)])


class HardSingles:
    """Training data as :class:`MostlySingles`; each picture of one thing has the hardest of three captions.

    What is hard is told by the caption alone, so that pictures of a caption stay as likely as they were.
    """

    CANDIDATES = 3

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Return pictures ``start`` .. ``start + count - 1``: even ones from the data set, odd ones of one thing."""
        n = self.CANDIDATES
        mixed, alone = shapes.items(self.seed, start, count), shapes.items(self.seed, n * start, n * count, "single")
        hardest = [max(alone[n * k : n * (k + 1)], key=self.hardness) for k in range(count)]
        return shapes.drawn([(hardest if (start + k) % 2 else mixed)[k] for k in range(count)])

    def hardness(self, item: shapes.Item) -> int:
        """Return the number of the most error-prone features in the caption of one thing."""
        (thing,) = item.facts.things
        anywhere, small = item.facts.place is None, thing.size == "small"
        return anywhere + small + (thing.shape in ("star", "triangle", "ring")) + (thing.colour in ("green", "purple"))


class HalfLoose:
    """Training data of which the odd items are loose; the even ones are those of :class:`HardSingles`.

    Of every other loose item there are two candidates, and the one with more, and more different, things is taken.
    From item ``ORDERED`` on, things that are joined by "and" are named in the order in which one reads. With either
    order, the model drew one shape twice: nothing told the two places apart.
    """

    CANDIDATES = 2
    ORDERED = 16 * 6400

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.whole = HardSingles(seed)

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Return pictures ``start`` .. ``start + count - 1``."""
        first, pairs = start // 2, count // 2 + 1
        sources = self.whole.batch(first, pairs), shapes.drawn([self.loose(k) for k in range(first, first + pairs)])
        chosen = [(sources[k % 2], k // 2 - first) for k in range(start, start + count)]
        return torch.stack([source[0][i] for source, i in chosen]), [source[1][i] for source, i in chosen]

    def loose(self, k: int) -> shapes.Item:
        """Return loose item ``k``: an odd one is the harder of two."""
        n = self.CANDIDATES
        candidates = shapes.items(self.seed, n * k, n, "ordered" if k >= self.ORDERED else "loose")
        return max(candidates, key=self.hardness) if k % 2 else candidates[0]

    def hardness(self, item: shapes.Item) -> int:
        """Return 2 for a caption of one thing, 3 for a plural and 4 for two things that differ."""
        things = item.facts.things
        return len(things) + len(set(things))


class Crowd:
    """Training data of the autoencoder: half of it the data set's pictures, half crowds of the same shapes.

    In the data set nine pixels of ten are background, and an autoencoder is content for a long time to get that right.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str]]:
        """Return pictures ``start`` .. ``start + count - 1``, the even ones from the data set."""
        pixels, captions = shapes.batch(self.seed, start, count)
        rng = np.random.default_rng((self.seed, start))
        odd = [k for k in range(count) if (start + k) % 2]
        pixels[odd] = scenes.draw([self.crowd(rng) for _ in odd])
        return pixels, captions

    def crowd(self, rng: np.random.Generator) -> Scene:
        """Draw a dozen things anywhere, covering one another."""
        colours = list(scenes.PALETTE)
        things = [
            Thing(
                str(rng.choice(SHAPES)), str(rng.choice(colours)), "any", *rng.uniform((0, 0, 5), (64, 64, 14)).tolist()
            )
            for _ in range(12)
        ]
        return Scene(str(rng.choice(colours)), tuple(things))


def known_tokens(words: Collection[str]) -> tuple[int, ...]:
    """Return the ids of the tokens of captions made of these ``words``, ascending."""
    tokenizer = Tokenizer()
    known = {i for word in (*words, ",") for i in tokenizer.encode(word)}
    return tuple(sorted(known | {tokenizer.start, tokenizer.end}))


def config() -> ModelConfig:
    """Return the config: Stable Diffusion's parts at a hundredth of the size, with only the tokens of the captions."""
    return ModelConfig(
        family="shapes",
        unet=UNetConfig(
            levels=(Level(channels=48), text(96, 3), text(128, 4)),
            mid=text(128, 4),
            context_dim=WIDTH,
            layers=1,
            groups=16,
            sample_size=16,
        ),
        vae=VAEConfig(channels=(16, 32, 64), layers=1, groups=8, mid_attention=False, sample_size=64),
        text_encoder=CLIPTextConfig(
            width=WIDTH, layers=2, heads=4, mlp=3 * WIDTH, positions=LENGTH, kept=known_tokens(vocabulary())
        ),
        tokenizer=TokenizerConfig(length=LENGTH),
        schedule=ScheduleConfig(prediction="v_prediction"),
        sampler={"name": "ddim"},
    )


def new_model() -> StableDiffusion:
    """Build the model before any training."""
    pipe = random_model(config(), seed=0)
    assert isinstance(pipe, StableDiffusion)
    for part in pipe.parts.values():
        zero_residual_branches(part)
    # Latents begin with little noise in them, or the decoder would first learn to do without them.
    torch.nn.init.constant_(pipe.vae.quant.bias[pipe.vae.config.latent_channels :], -6)
    return pipe


def run(settings: TrainConfig, data: Data, pipe: StableDiffusion, folder: Path) -> StableDiffusion:
    """Run one training, or the rest of one, in ``folder``; return the model with its averaged weights."""
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(f"{'+'.join(settings.parts)}: {settings.steps} steps of {settings.batch} in {folder}", flush=True)
    train(Trainer(pipe, data, settings), folder, resume=(folder / STATE).exists())
    trained = load(folder / MODEL)
    assert isinstance(trained, StableDiffusion)
    return trained


def loosely(pipe: StableDiffusion, folder: Path) -> StableDiffusion:
    """Train the UNet and the text encoder on loose captions, after giving new words their first vectors."""
    settings = replace(
        UNET,
        steps=LOOSE_STEPS,
        rate=8e-4,
        curve="linear",
        noisy=1.5,
        drop_prompt=0.2,
        ema=0.999,
        seed=34,
    )
    return run(settings, HalfLoose(34), widened(pipe), folder)


def widened(pipe: StableDiffusion) -> StableDiffusion:
    """Return the model with every token of loose captions: a plural begins as its singular, other new ones as "and"."""
    old = pipe.config.text_encoder
    assert old is not None
    assert old.kept is not None
    kept = known_tokens(loose_vocabulary())
    if kept == old.kept:
        return pipe
    wide = random_model(replace(pipe.config, text_encoder=replace(old, kept=kept)), seed=0)
    assert isinstance(wide, StableDiffusion)
    encode, row = Tokenizer().encode, {token: k for k, token in enumerate(old.kept, start=1)}
    like = {token: row[encode(one)[0]] for one, many in PLURALS.items() for token in encode(many)}
    rows = [0] + [row.get(token, like.get(token, row[encode("and")[0]])) for token in kept]
    for name, part in wide.parts.items():
        weights = pipe.parts[name].state_dict()
        if name == "text_encoder":
            weights["token.weight"] = weights["token.weight"][rows]
        part.load_state_dict(weights)
    return wide


def words(pipe: StableDiffusion, folder: Path) -> StableDiffusion:
    """Train the text encoder on what words look like (see _contrast.py), from the start if it was stopped."""
    path = folder / MODEL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for part in pipe.parts["text_encoder"].parameters():
            part.data = part.data.clone()  # what is going to change gets memory of its own, apart from the file
        for report in teach(pipe, ShapesStream(7), steps=400, batch=256, rate=1e-3):
            if report.step % 20 == 0:
                print(f"text: step {report.step}, loss {report.loss:.3f}, found {report.found:.0%}", flush=True)
        pipe.save(path)
    trained = load(path)
    assert isinstance(trained, StableDiffusion)
    return trained


def ship(pipe: StableDiffusion, path: Path) -> None:
    """Write the model in float16: half the size, and a tenth of a level of the 255 at most in the pictures."""
    tensors = {
        f"{name}.{key}": lazy(weight.half().contiguous())
        for name, part in pipe.parts.items()
        for key, weight in part.state_dict().items()
    }
    checkpoint.write_checkpoint(path, pipe.config, tensors)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def begun(model: str | None) -> StableDiffusion:
    """Return the model that the first stage starts from, its weights in float32 and in memory of their own."""
    if model is None:
        return new_model()
    pipe = load(model, dtype=torch.float32)
    assert isinstance(pipe, StableDiffusion)
    return pipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/shapes", metavar="FOLDER", help="(default: out/shapes)")
    parser.add_argument(
        "--asset", default=str(ASSET), metavar="FILE", help="where the model goes (default: the package)"
    )
    parser.add_argument("--begin", choices=stages(), default="1-vae", metavar="STAGE", help="the first stage that runs")
    parser.add_argument("--model", metavar="FILE", help="the model it starts from (default: random weights)")
    args = parser.parse_args()
    folder = Path(args.out)
    try:
        pipe = begun(args.model)
        print("".join(f"{n}: {sum(p.numel() for p in m.parameters()):,} parameters\n" for n, m in pipe.parts.items()))
        chain = stages()
        for name in list(chain)[list(chain).index(args.begin) :]:
            pipe = chain[name](pipe, folder / name)
        ship(pipe, Path(args.asset))
    except (MinidiffError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
