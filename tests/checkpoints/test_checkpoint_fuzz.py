"""Damaged files: whatever is done to the bytes, opening gives weights that can be read, or a CheckpointError."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moec import checkpoints
from moec.checkpoints.safetensors_file import read_header
from moec.checkpoints.store import open_store
from moec.compiler.errors import CheckpointError
from moec.compiler.spec.model import Spec

MODEL = {
    "architecture": "mobilemoe", "layers": 1, "d_model": 32, "heads": 2, "kv_heads": 1, "head_dim": 16,
    "vocab_size": 40, "context": 8, "rope": {"theta": 1e4, "interleaved": True},
    "moe": {"experts": 3, "top_k": 2, "expert_width": 32},
}  # fmt: skip
SPEC = Spec.model_validate({"name": "fuzz", "model": MODEL, "quantization": {"weights": "int4"}})
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.synthesize(SPEC, tmp_path_factory.mktemp("fuzz") / "c", qat=True)


class Bytes:
    """Contents that a failing example does not print."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.header = 8 + struct.unpack("<Q", content[:8])[0]


@pytest.fixture(scope="module")
def good(folder: Path) -> Bytes:
    return Bytes((folder / "model.safetensors").read_bytes())


def survives(folder: Path, content: bytes) -> bool:
    """Whether the checkpoint opens; then every weight must load. Anything but a CheckpointError escapes."""
    (folder / "model.safetensors").write_bytes(content)
    try:
        store = open_store(folder, SPEC.model)  # type: ignore[arg-type]
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert all(line.isprintable() and str(folder) in line for line in message.split("\n") if line[:3] != "...")
        return False
    for weight in store.weights.values():
        assert tuple(weight.load().shape) == weight.shape
    return True


def test_untouched(folder: Path, good: Bytes) -> None:
    assert survives(folder, good.content)


@many
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_flipped_header_bits(folder: Path, good: Bytes, seed: int, flips: int) -> None:
    content, generator = bytearray(good.content), random.Random(seed)
    for _ in range(flips):
        content[generator.randrange(good.header)] ^= 1 << generator.randrange(8)
    survives(folder, bytes(content))


@many
@given(st.data())
def test_truncated(folder: Path, good: Bytes, data: st.DataObject) -> None:
    assert not survives(folder, good.content[: data.draw(st.integers(0, len(good.content) - 1))])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@many
@given(st.sampled_from(["dtype", "shape", "data_offsets", None]), json_values, st.integers(0, 10**6))
@example("shape", [2**62, 2**62], 0)
@example("shape", [-1, 32], 0)
@example("data_offsets", [2**64, 2**64 + 1], 3)
@example("dtype", "F4", 1)
@example(None, [[[]]], 1)
def test_changed_descriptions(folder: Path, good: Bytes, key: str | None, value: Any, which: int) -> None:
    header = json.loads(good.content[8 : good.header])
    names = [name for name in header if name != "__metadata__"]
    name = names[which % len(names)]
    if key is None:
        header[name] = value
    else:
        header[name][key] = value
    text = json.dumps(header).encode()
    survives(folder, struct.pack("<Q", len(text)) + text + good.content[good.header :])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[" * 200_000,
        b'{"a": ' * 100_000,
        b'{"a": 1e999}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}',
        b'{"a": {"dtype": "U8", "shape": [' + b"1," * 10_000 + b'1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}',
        b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a\\u0000\\n": {"dtype": "U8", "shape": [1], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}',
    ],
)
def test_hostile_headers(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(file)


def test_overlapping_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for offsets, what in (([1, 3], "overlaps"), ([3, 5], "gap of 1 bytes")):
        header = {
            "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
            "b": {"dtype": "U8", "shape": [2], "data_offsets": offsets},
        }
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offsets[1]))
        with pytest.raises(CheckpointError, match=what):
            read_header(file)
