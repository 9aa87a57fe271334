"""Sharded training (FSDP: Zhao et al. 2023, by torch's ``fully_shard``): the model is spread over the processes.

Each process keeps a slice of every weight, of its average and of its moments. The weights of a block are gathered just
before it runs and released afterwards; its gradients are averaged and sliced during the backward pass. Checkpoints are
written in slices as well (torch.distributed.checkpoint), and can be read by any number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.config import check, quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.blocks import ResBlock
from minidiff.models.vae import VAE
from minidiff.storage.reading import read_text
from minidiff.storage.writing import atomic
from minidiff.training.distributed import Replicas, is_main
from minidiff.training.loop import Trainer
from minidiff.training.state import Keeper, compare, contents, facts, parse_facts
from minidiff.training.task import Task

FACTS = "run.json"


class Shards(Replicas):
    """Processes with a slice of the model each."""

    def wrap(self, task: nn.Module) -> nn.Module:
        """Slice the parts of ``task`` block by block, so that only one block is whole at a time."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        assert isinstance(task, Task)
        old = not hasattr(torch.cpu.Stream, "record_event")
        if old and task.device.type == "cpu":
            raise UnsupportedError(
                f"torch {torch.__version__} can slice a model on GPUs only; update it, or leave out --fsdp"
            )
        layout = "--fsdp slices weights in their plain layout: leave out --channels-last"
        check(not task.settings.channels_last, layout)
        for part in task.children():
            for block in part.modules():
                if isinstance(block, ResBlock):
                    fully_shard(block)
            fully_shard(part)
            if isinstance(part, VAE):
                for method in ("encode", "decode"):
                    register_fsdp_forward_method(part, method)
        return task

    @contextmanager
    def quiet(self, task: nn.Module, last: bool) -> Iterator[None]:
        """Add up whole gradients locally for all parts of a batch but the last: one exchange per step, more memory."""
        from torch.distributed.fsdp import FSDPModule

        for part in task.children():
            assert isinstance(part, FSDPModule)
            part.set_requires_gradient_sync(last)
        yield

    def whole(self, tensor: Tensor) -> Tensor:
        """Assemble a sliced tensor, in every process."""
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardKeeper(Keeper):
    """State of a run as a folder of slices: each process writes its own, and any number of processes can read them.

    The folder is written under another name and renamed as a whole; ``exists`` repairs what a kill left half done.
    """

    name = "state"

    def exists(self, folder: Path) -> bool:
        """Return True if ``folder`` holds a run, after finishing a renaming that was interrupted."""
        place, new, old = (folder / name for name in (self.name, ".state.new", ".state.old"))
        if not place.exists():  # killed between the two renames of save
            for candidate in (new, old):
                if (candidate / ".metadata").is_file() and is_main():
                    candidate.rename(place)
                    break
        return (place / ".metadata").is_file()

    def facts(self, folder: Path) -> dict[str, Any]:
        """Return the facts of the run in ``folder``, see :func:`minidiff.training.state.facts`."""
        path = folder / self.name / FACTS
        try:
            return parse_facts(read_text(path), path)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write the run; called by every process, and returns when it is written."""
        from torch.distributed.checkpoint.state_dict_saver import save

        place, new, old = (folder / name for name in (self.name, ".state.new", ".state.old"))
        if trainer.ranks.main:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            new.mkdir()
            with atomic(new / FACTS) as file:
                file.write(json.dumps(facts(trainer)).encode())
        trainer.ranks.wait()
        save(contents(trainer), checkpoint_id=str(new))  # ".metadata" comes last: with it, the folder is complete
        if trainer.ranks.main:
            if place.exists():
                place.rename(old)
            new.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        trainer.ranks.wait()

    def resume(self, trainer: Trainer, folder: Path) -> None:
        """Restore the trainer of this process from ``folder``, whatever the number of processes that wrote it."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        path = folder / self.name
        found = self.facts(folder)
        compare(trainer, found, path)
        there = set(FileSystemReader(str(path)).read_metadata().state_dict_metadata)
        for (
            name,
            w,
        ) in trainer.weights.items():  # memory for the moments, which the optimiser would create in its first step
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{name}.{key}" in there]
            if keys:
                trainer.optimizer.state[w] = {k: torch.zeros(()) if k == "step" else torch.zeros_like(w) for k in keys}
        tensors = contents(trainer)
        wrong = sorted(there ^ tensors.keys())
        if wrong:
            raise CheckpointError(f"{path}: tensor {quote(wrong[0])} is missing or does not belong to this model")
        load(tensors, checkpoint_id=str(path))
        trainer.scaler.load_state_dict(found["scaler"])
        trainer.done = found["done"]
