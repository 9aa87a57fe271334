"""Latents computed once instead of at every step: the autoencoder is frozen, so they do not change.

The Gaussian that the encoder returns is kept, mean and log-variance, so that training still sees a new sample of it
every time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from minidiff.config import to_json
from minidiff.models.vae import VAE, DiagonalGaussian
from minidiff.storage.files import TensorFile, lazy, write_tensors
from minidiff.training.batch import Batch
from minidiff.training.changes import marks_of
from minidiff.training.data import PictureSet

KEY = "minidiff.latents"
PART = 16  # pictures encoded, or read for the fingerprint, at a time


class CachedLatents:
    """Set of ``pictures`` with their latents under ``vae``; its pixels are empty, since they are no longer needed.

    ``path``: file that keeps the latents for the next run; rewritten if it belongs to other pictures or weights.
    """

    def __init__(self, pictures: PictureSet, vae: VAE, path: str | os.PathLike[str] | None = None) -> None:
        self.marks = marks_of(pictures)
        mark = fingerprint(pictures, vae)
        latents = None if path is None else load(Path(path), mark)
        self.latents = encode(pictures, vae) if latents is None else latents
        if path is not None and latents is None:
            tensors = {"mean": lazy(self.latents.mean), "logvar": lazy(self.latents.logvar)}
            write_tensors(path, tensors, {"format": "pt", KEY: mark})
        texts = [batch.captions for batch in parts(pictures)]
        self.captions = None if None in texts else [text for part in texts for text in part or ()]

    def __len__(self) -> int:
        return len(self.latents.mean)

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the given latents with their captions."""
        chosen = list(indices)
        latents = DiagonalGaussian(self.latents.mean[chosen], self.latents.logvar[chosen])
        captions = None if self.captions is None else [self.captions[i] for i in chosen]
        return Batch(torch.empty(len(chosen), 3, 0, 0), captions, latents)


def parts(pictures: PictureSet) -> Iterator[Batch]:
    """Yield all pictures, a few at a time."""
    for k in range(0, len(pictures), PART):
        yield pictures.take(range(k, min(k + PART, len(pictures))))


@torch.no_grad()
def encode(pictures: PictureSet, vae: VAE) -> DiagonalGaussian:
    """Compute the latents of a whole set, float32 on the CPU."""
    like = next(vae.parameters())
    found = [vae.encode(batch.pixels.to(like)) for batch in parts(pictures)]
    mean, logvar = torch.cat([g.mean for g in found]), torch.cat([g.logvar for g in found])
    return DiagonalGaussian(mean.float().cpu(), logvar.float().cpu())


def load(path: Path, mark: str) -> DiagonalGaussian | None:
    """Read the latents in ``path``; None if it does not exist or belongs to other pictures or weights."""
    if not path.is_file():
        return None
    file = TensorFile(path)
    try:
        if file.metadata.get(KEY) != mark or file.lazy.keys() != {"mean", "logvar"}:
            return None
        return DiagonalGaussian(file.lazy["mean"].load().clone(), file.lazy["logvar"].load().clone())
    finally:
        file.close()


def fingerprint(pictures: PictureSet, vae: VAE) -> str:
    """Return a hash of everything that the latents depend on, as 64 hex digits: all pixels, all weights, the config."""
    digest = hashlib.sha256(to_json(vae.config).encode())
    for tensor in (*vae.state_dict().values(), *(batch.pixels for batch in parts(pictures))):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
