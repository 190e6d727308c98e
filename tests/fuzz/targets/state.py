"""The state of a training run, as `--resume` reads it. One file of it is changed at a time, and the digests are
recomputed, as an attacker would."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from moec.compiler.errors import UserError
from moec.training.parallel import World
from moec.training.state import FOLDER, LATEST, Position, StateStore, _digests
from tests.fuzz.mutate import flip

TENSORS = {"model.w": (4, 3), "moment.w": (4, 3), "bias": (5,)}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in TENSORS.items()}


class State:
    """A mutant is the number of a file in `_names` and its bytes."""

    name = "state"

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def seeds(self, folder: Path) -> Sequence[bytes]:
        out = folder / "whole"
        shutil.rmtree(out, ignore_errors=True)
        tensors = {name: torch.arange(t.numel()).view(t.shape).float() for name, t in empty().items()}
        StateStore(out, World()).save(Position("pretrain", 4, 1.5, 100, "pretrain-4"), tensors)
        files = sorted(file for file in (out / FOLDER).rglob("*") if file.is_file())
        self._files = {str(file.relative_to(out / FOLDER)): file.read_bytes() for file in files}
        assert len(self._files) == 3, "latest.json, metadata, tensors"
        return [bytes([i]) + data for i, data in enumerate(self._files.values())]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        return data[:1] + flip(rng, data[1:])

    def run(self, data: bytes, folder: Path) -> None:
        state = folder / "run" / FOLDER
        changed = list(self._files)[data[0]]
        for name, content in self._files.items():
            (state / name).parent.mkdir(parents=True, exist_ok=True)
            (state / name).write_bytes(data[1:] if name == changed else content)
        store = StateStore(folder / "run", World())
        try:
            position = store.latest()
            assert position is not None
            if changed != LATEST:
                position = replace(position, digests=_digests(state / str(position.folder)))
                (state / LATEST).write_text(json.dumps(asdict(position)), encoding="utf-8")
            store.load(position, empty())
        except UserError:
            return


TARGET = State()
