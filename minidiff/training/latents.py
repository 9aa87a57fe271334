"""Latents computed once instead of at every step: the autoencoder is frozen, so it would always say the same.

What is kept is the Gaussian that the encoder gives, mean and log-variance, so that training still sees another sample
of it at every visit.
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
PART = 16  # pictures that are encoded, or read for the fingerprint, at a time


class CachedLatents:
    """``pictures`` with their latents under ``vae``; its pixels have no width, for nobody needs them any more.

    ``path``: a file that keeps the latents for the next run; made anew if it belongs to other pictures or weights.
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
    """All pictures, a few at a time."""
    for k in range(0, len(pictures), PART):
        yield pictures.take(range(k, min(k + PART, len(pictures))))


@torch.no_grad()
def encode(pictures: PictureSet, vae: VAE) -> DiagonalGaussian:
    """The latents of a whole set, float32 on the CPU."""
    like = next(vae.parameters())
    found = [vae.encode(batch.pixels.to(like)) for batch in parts(pictures)]
    mean, logvar = torch.cat([g.mean for g in found]), torch.cat([g.logvar for g in found])
    return DiagonalGaussian(mean.float().cpu(), logvar.float().cpu())


def load(path: Path, mark: str) -> DiagonalGaussian | None:
    """The latents in ``path``, or None if it does not exist or belongs to something else."""
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
    """Return a hash of everything that latents depend on, as 64 hex digits: every pixel, every weight, the config."""
    digest = hashlib.sha256(to_json(vae.config).encode())
    for tensor in (*vae.state_dict().values(), *(batch.pixels for batch in parts(pictures))):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
