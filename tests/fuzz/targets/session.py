"""Saved sessions, as `Session.restore` reads them. Most mutants have valid digests: an attacker can compute them."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

from moec.compiler.errors import RunError
from tests.fuzz.mutate import flip
from tests.runtime.test_sessions import HEADER, file_digest, xxh64

_ARTIFACT = "fuzz"


class SavedSession:
    """The first byte of a mutant says whether its digests are recomputed."""

    name = "session"

    def __init__(self) -> None:
        self._model: Path | None = None

    def seeds(self, folder: Path) -> Sequence[bytes]:
        from moec.targets.xnnpack.session import CpuSession
        from tests.runtime import runtime_model as m

        self._model = folder / "model.pte"
        if not self._model.exists():
            m.write_pte(self._model)
        found = []
        with CpuSession(self._model, threads=1, artifact=_ARTIFACT) as session:
            for count in (0, 1, 9, 190):  # the last one makes 200: pages of the file are mapped
                if count:
                    session.prefill([i % m.V for i in range(count)])
                session.save(folder / "seed")
                found.append((folder / "seed").read_bytes())
        return found

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        if rng.random() < 0.5:  # numbers of the header, and ids
            changed = bytearray(data)
            place = rng.choice((*range(80, 112, 8), *range(HEADER, min(len(data), HEADER + 36), 4)))
            struct.pack_into(
                "<q", changed, min(place, len(data) - 8), rng.choice((0, 1, -1, 255, 256, 1 << 31, 1 << 62))
            )
            data = bytes(changed)
        else:
            data = flip(rng, data)
        return bytes([rng.random() < 0.8]) + data

    def run(self, data: bytes, folder: Path) -> None:
        from moec.targets.xnnpack.session import CpuSession

        fits, saved = data[:1] == b"\1", bytearray(data[1:])
        if fits and len(saved) >= HEADER:
            saved[104:112] = struct.pack("<Q", file_digest(bytes(saved)))
            saved[112:120] = struct.pack("<Q", xxh64(bytes(saved[:112])))
        (folder / "mutant").write_bytes(saved)
        assert self._model is not None
        with CpuSession(self._model, threads=1, artifact=_ARTIFACT) as session:
            session.prefill([5, 6, 7])
            try:
                session.restore(folder / "mutant")
            except RunError:
                assert session.tokens == [5, 6, 7]
            session.rewind(min(session.position, 2))
            try:
                session.decode(4)
            except RunError as error:  # the bytes of the states are arbitrary: values may be NaN
                if "not numbers" not in str(error):
                    raise AssertionError("another refusal than of NaN") from error


TARGET = SavedSession()
