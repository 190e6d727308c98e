"""`.pte` files: opened by the native runtime and, if it accepts them, run."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.mutate import fields, flip, renumber

_KERNEL_TYPES = {
    1: "Null", 2: "Int", 3: "Bool", 4: "Double", 5: "Tensor", 6: "String", 7: "Longs", 8: "Longs", 9: "Bools",
    10: "Ints", 11: "Ints",
}  # fmt: skip
PROGRAM = {
    "Program": {0: "4", 1: ["Plan"], 2: ["Buffer"], 3: ["Buffer"], 4: ["Segment"], 5: "Offsets", 6: ["Offsets"],
                7: ["Named"]},
    "Plan": {0: "s", 2: ["Value"], 3: ["4"], 4: ["4"], 5: ["Chain"], 6: ["Operator"], 7: ["Delegate"], 8: ["8"]},
    "Value": {0: ("union", _KERNEL_TYPES)},
    "Null": {}, "Int": {0: "8"}, "Bool": {0: "1"}, "Double": {0: "8"}, "String": {0: "s"}, "Longs": {0: ["8"]},
    "Bools": {0: ["1"]}, "Ints": {0: ["4"]},
    "Tensor": {0: "1", 1: "4", 2: ["4"], 3: ["1"], 4: "1", 5: "4", 6: "Place", 7: "1", 8: "1", 9: "Extra"},
    "Place": {0: "4", 1: "4", 2: "4"}, "Extra": {0: "8", 1: "s", 2: "1", 3: "1", 4: "1"},
    "Chain": {0: ["4"], 1: ["4"], 2: ["Instruction"]},
    "Instruction": {0: ("union", dict.fromkeys(range(1, 3), "Call") | dict.fromkeys(range(3, 6), "Move"))},
    "Call": {0: "4", 1: ["4"]}, "Move": {0: "4", 1: "4"}, "Operator": {0: "s", 1: "s"},
    "Delegate": {0: "s", 1: "Reference", 2: ["Spec"]}, "Reference": {0: "1", 1: "4"}, "Spec": {0: "s", 1: ["1"]},
    "Buffer": {0: ["1"]}, "Segment": {0: "8", 1: "8"}, "Offsets": {0: "4", 1: ["8"]}, "Named": {0: "s", 1: "4"},
}  # fmt: skip
_PAYLOAD = 2048  # bytes; more than the graph of a delegate takes in the seeds
_NODE = dict.fromkeys(range(6), "4")
GRAPH = {
    "Graph": {0: "s", 1: ["Node"], 2: ["Value"], 3: "4", 4: ["4"], 5: ["4"], 8: ["Constant"]},
    "Node": {0: ("union", dict.fromkeys(range(1, 48), "Ids")), 2: "4"}, "Ids": _NODE,
    "Value": {0: ("union", {1: "Tensor", 2: "Quantized"})},
    "Tensor": {0: "2", 1: "4", 2: ["4"], 3: "4", 4: "4", 5: "4", 6: "4", 7: "2"},
    "Quantized": {0: "Tensor", 1: ("union", {1: "Channel", 2: "Whole", 3: "Token", 4: "Group"})},
    "Channel": {0: ["4"], 1: "4", 2: "4", 3: "4"}, "Whole": {0: "4", 1: "4"}, "Token": {0: "4"},
    "Group": {0: ["4"], 1: "4", 2: "4", 4: "4", 5: "4"}, "Constant": {0: "8", 1: "8", 2: "s"},
}  # fmt: skip


class Pte:
    name = "pte"

    def __init__(self) -> None:
        self._places: dict[bytes, list[tuple[int, int]]] = {}

    def seeds(self, folder: Path) -> Sequence[bytes]:
        from moec.targets.xnnpack.session import _runtime
        from tests.runtime import runtime_model as m

        found = []
        for name, options in {"int8": {"int8_cache": True}, "delegated": {"delegate": True}}.items():
            file = folder / f"{name}.pte"
            if not file.exists():
                m.write_pte(file, **options)  # type: ignore[arg-type]
            found.append(file.read_bytes())
        _runtime()
        return found

    def parts(self, folder: Path) -> Sequence[bytes]:
        """The seeds without their weights: program, payloads of delegates, and where these lie (program_fuzz.cpp)."""
        found = []
        for data in self.seeds(folder):
            first, last = data.find(b"XH00"), data.rfind(b"XH00")
            piece = data[first - 4 : last + _PAYLOAD] if first >= 0 else b""
            found.append(data[: struct.unpack_from("<Q", data, 16)[0]] + piece + struct.pack("<I", max(first - 4, 0)))
        return found

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        if rng.random() < 0.85:
            return renumber(rng, data, self._numbers(data))
        program = struct.unpack_from("<Q", data, 16)[0]
        if rng.random() < 0.7:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 2, 8))):
                changed[rng.randrange(program)] ^= 1 << rng.randrange(8)
            return bytes(changed)
        return flip(rng, data)

    def _numbers(self, data: bytes) -> list[tuple[int, int]]:
        if data not in self._places:
            places = fields(data, PROGRAM, "Program") + [(offset, 8) for offset in (16, 24, 32)]
            start = 0
            while (start := data.find(b"XH00", start)) >= 0:  # payloads of delegates: four times as likely
                head = start - 4
                graph = struct.unpack_from("<I", data, head + 10)[0]
                inside = fields(data, GRAPH, "Graph", head + graph) + [(head + at, 4) for at in (10, 14, 18)]
                places += inside * 4
                start += 4
            self._places[data] = places
        return self._places[data]

    def run(self, data: bytes, folder: Path) -> None:
        from moec.targets.xnnpack.session import _Info, _runtime

        runtime, file = _runtime(), folder / "mutant.pte"
        file.write_bytes(data)
        model = runtime.moec_model_open(str(file).encode(), 1)
        try:
            if runtime.moec_model_error(model):
                return
            info = _Info()
            runtime.moec_model_get_info(model, ctypes.byref(info))
            vocabulary = min(int(info.vocab_size), 1 << 16)
            logits = (ctypes.c_float * (vocabulary * 5))()
            for count, start, every in ((5, 0, 0), (1, 5, 0), (2, 6, 1)):
                ids = (ctypes.c_int64 * count)(*[(7 * start + i) % vocabulary for i in range(count)])
                runtime.moec_model_forward(model, ids, count, start, every, logits, len(logits))
        finally:
            runtime.moec_model_close(model)


TARGET = Pte()
