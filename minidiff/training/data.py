"""Sets of pictures, and the endless shuffled streams made of them.

A set is finite and returns any of its pictures by index: a folder (image_folder.py), a torchvision data set, the
beginning of a stream, or a set whose latents were computed beforehand (latents.py). ``Shuffled`` deals every picture
once per epoch, in an order that depends on the seed and the epoch alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minidiff.config import check, quote
from minidiff.errors import ConfigError
from minidiff.models.vae import DiagonalGaussian
from minidiff.training.batch import Batch, Data
from minidiff.training.changes import marks_of
from minidiff.training.image_folder import to_pixels
from minidiff.training.settings import MOST_STEPS


class PictureSet(Protocol):
    """A finite set of pictures of one size, with or without captions."""

    def __len__(self) -> int:
        """Number of items."""

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the given pictures, in the given order."""


class Shuffled:
    """Endless stream over a finite set. Example k is picture k % n in the shuffled order of epoch k // n."""

    def __init__(self, pictures: PictureSet, seed: int = 0) -> None:
        """Raise :class:`ConfigError` for a set of fewer than two pictures: there is nothing to generalise from."""
        n = len(pictures)
        check(n != 0, "there is no picture to train on")
        check(n != 1, "there is only one picture to train on; a model needs at least two, and rather thousands")
        self.pictures, self.seed = pictures, seed
        self.marks = marks_of(pictures)
        self._epoch, self._order = -1, [0]

    def batch(self, start: int, count: int) -> Batch:
        """Examples ``start`` .. ``start + count - 1``."""
        return self.pictures.take([self.index(k) for k in range(start, start + count)])

    def index(self, k: int) -> int:
        """Return the number of the picture in example ``k``."""
        epoch, place = divmod(k, len(self.pictures))
        if epoch != self._epoch:
            g = torch.Generator().manual_seed((self.seed * MOST_STEPS + epoch) % 2**32)
            self._epoch, self._order = epoch, torch.randperm(len(self.pictures), generator=g).tolist()
        return self._order[place]


class FirstOf:
    """Set of the first ``count`` examples of a stream."""

    def __init__(self, stream: Data, count: int) -> None:
        self.stream, self.count = stream, count

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the given examples."""
        return join([Batch(*self.stream.batch(k, 1)) for k in indices])


class ShapesStream:
    """Stream of the procedural data set of shapes.py, 64 x 64 pixels with captions."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, start: int, count: int) -> Batch:
        """Items ``start`` .. ``start + count - 1`` of the seed."""
        from minidiff.training.shapes import batch

        return Batch(*batch(self.seed, start, count))


class TorchvisionSet:
    """Data set of torchvision by name, such as "CIFAR10"; the names of its classes are the captions.

    It is read from ``root``, and downloaded only if ``download`` is true. Raises :class:`ConfigError` for a name that
    torchvision does not know, and for missing data.
    """

    def __init__(self, name: str, size: int, root: str = "data", download: bool = False) -> None:
        from torchvision import datasets  # type: ignore[import-untyped]

        cls = getattr(datasets, name, None)
        known = isinstance(cls, type) and issubclass(cls, datasets.VisionDataset)
        check(known, f"torchvision has no data set {quote(name)}; its documentation lists them, such as CIFAR10")
        assert cls is not None
        takes = inspect.signature(cls).parameters
        options: dict[str, Any] = {"root": root, "download": download}
        try:
            self.source: Any = cls(**{key: value for key, value in options.items() if key in takes})
        except (RuntimeError, OSError, TypeError, ValueError, ImportError) as e:
            hint = "" if download or "download" not in takes else "; --download fetches it"
            raise ConfigError(f"torchvision's {name} in {root}: {' '.join(str(e).split())}{hint}") from None
        self.size = size
        self.classes: Sequence[str] = getattr(self.source, "classes", ())

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the given pictures, resized."""
        rows = [self.source[i] for i in indices]
        pixels = torch.stack([to_pixels(row[0], self.size) for row in rows])
        captions = [self.caption(row[1] if isinstance(row, tuple) and len(row) > 1 else None) for row in rows]
        known = [text for text in captions if text is not None]
        return Batch(normalised(pixels), known if len(known) == len(rows) else None)

    def caption(self, label: Any) -> str | None:
        """Return the caption for a label: the text itself, or the name of a numbered class."""
        if isinstance(label, str):
            return label
        named = isinstance(label, int) and 0 <= label < len(self.classes)
        return str(self.classes[label]) if named else None


def normalised(pixels: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 in [-1, 1], as models see pictures."""
    return pixels.float() / 127.5 - 1


def join(batches: Sequence[Batch]) -> Batch:
    """Join batches into one."""
    captions = [text for b in batches for text in b.captions or ()]
    latents = [b.latents for b in batches if b.latents is not None]
    both = None
    if latents:
        both = DiagonalGaussian(torch.cat([g.mean for g in latents]), torch.cat([g.logvar for g in latents]))
    has_captions = all(b.captions is not None for b in batches)
    return Batch(torch.cat([b.pixels for b in batches]), captions if has_captions else None, both)
