"""manifest.json of an artifact, read as `moec inspect` and `moec run` do."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from moec.compiler.artifact import read_manifest
from moec.compiler.errors import UserError
from tests.fuzz.mutate import flip

CORPUS = Path(__file__).parents[1] / "corpus" / "manifest"


class ManifestFile:
    name = "manifest"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        return [file.read_bytes() for file in sorted(CORPUS.glob("*.json"))]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        if rng.random() < 0.5:
            return flip(rng, data)
        tree = json.loads(data)
        node = tree
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if rng.random() < 0.4 or not isinstance(node[key], dict | list):
                node[key] = rng.choice(
                    (None, -1, 1 << 70, 1e400, "", "../x", "/", [], {}, True, ["a"] * 1000, "\x1b[2J")
                )
                break
            node = node[key]
        return json.dumps(tree).encode()

    def run(self, data: bytes, folder: Path) -> None:
        (folder / "manifest.json").write_bytes(data)
        try:
            read_manifest(folder)
        except UserError:
            return


TARGET = ManifestFile()
