"""Specs: YAML text, as `moec compile` reads it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from moec.compiler.errors import UserError
from moec.compiler.spec import load_spec
from tests.fuzz.mutate import flip

SPECS = Path(__file__).parents[3] / "specs"


class SpecText:
    name = "spec"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        return [file.read_bytes() for file in sorted([*SPECS.glob("models/*.yaml"), *SPECS.glob("families/*.yaml")])]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        if rng.random() < 0.5:
            return flip(rng, data)
        lines = data.splitlines(keepends=True)
        at, other = rng.randrange(len(lines)), rng.choice(rng.choice(seeds).splitlines(keepends=True))
        lines[at : at + rng.randrange(3)] = [other] * rng.choice((1, 1, 2, 40))
        return b"".join(lines)

    def run(self, data: bytes, folder: Path) -> None:
        file = folder / "mutant.yaml"
        file.write_bytes(data)
        try:
            load_spec(file)
        except UserError:
            return


TARGET = SpecText()
