"""Views of a run that ``minidiff generate`` writes beside its pictures: strips, films, a preview."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.config import check
from minidiff.console.progress import Counter
from minidiff.errors import ConfigError
from minidiff.pipeline.metadata import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.denoise import Run, Step
    from minidiff.pipeline.film import Film
    from minidiff.storage.writing import Existing

STEPS, FRAMES = 8, 24  # of a strip and of a film, at most


@dataclass
class Views:
    """Views that were asked for. ``watchers`` are called with each step; ``films``: kind of file and its collector."""

    watchers: list[Callable[[Step], object]] = field(default_factory=list)
    films: dict[str, Film] = field(default_factory=dict)
    no_mark: bool = False

    def follow(self, run: Run, show: bool) -> None:
        """Run all steps, with a progress bar if ``show``."""
        with Counter(len(run), "step", show=show) as counter:
            for step in run:
                for watcher in self.watchers:
                    watcher(step)
                counter.count()

    def save(self, k: int, path: Path, force: bool) -> Iterator[Path]:
        """Write the views of picture ``k``, which was written to ``path``; yield their paths."""
        from minidiff.pipeline.montage import save_film
        from minidiff.pipeline.png import marked, save_png
        from minidiff.storage.writing import atomic

        existing: Existing = "replace" if force else "next"
        for kind, film in self.films.items():
            if kind == "strip":
                strip = marked(film.strips()[k])
                yield save_png(strip, path.with_name(f"{path.stem}-steps.png"), existing, not self.no_mark)
            else:
                name, format = ((f"{path.stem}.gif", "GIF"), (f"{path.stem}-film.png", "PNG"))[kind == "apng"]
                with atomic(path.with_name(name), existing) as file:
                    save_film(film.frames()[k], file, format, not self.no_mark)
                yield file.path


def of(pipe: StableDiffusion | Unconditional, args: Namespace, run: Run) -> Views:
    """Return the views that the command line asks for. Raises :class:`ConfigError` for a preview that cannot be."""
    from minidiff.pipeline.film import Film
    from minidiff.pipeline.preview import Preview

    found = Views(no_mark=args.no_mark)
    for kind, count in (("strip", STEPS), ("gif", FRAMES), ("apng", FRAMES)):
        if getattr(args, kind):
            found.films[kind] = Film(pipe, run, count)
    found.watchers += found.films.values()
    if args.preview_vae is not None and args.preview is None:
        raise ConfigError("--preview-vae decodes a preview; name its file with --preview")
    if args.preview is not None:
        suffix = Path(args.preview).suffix.lower()
        check(suffix in FORMATS, f"--preview {args.preview}: end it in one of {', '.join(FORMATS)}")
        there = Path(args.preview).parent
        check(there.is_dir(), f"--preview {args.preview}: there is no folder {there}; create it first")
        found.watchers.append(Preview(pipe, args.preview, _decode(pipe, args), not args.no_mark))
    return found


def _decode(pipe: StableDiffusion | Unconditional, args: Namespace) -> Callable[[Tensor], Tensor] | None:
    """Open the decoder of --preview-vae, beside the VAE of the model."""
    if args.preview_vae is None:
        return None
    import weights_convert

    return weights_convert.open_decoder(args.preview_vae, pipe.config, pipe.device, pipe.dtype)
