"""GGUF files that are damaged or lie: one line that names the file, whatever of it is wrong; otherwise weights load."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moec.checkpoints.gguf_file import read_gguf
from moec.checkpoints.spec_from_gguf import spec_from_gguf
from moec.compiler.errors import CheckpointError, UserError
from moec.compiler.spec.loader import parse_spec
from moec.sources import gguf_config
from moec.sources.gguf_source import GgufSource
from tests.conftest import Moec, refused
from tests.sources import gguf_files
from tests.sources.gguf_files import FAMILIES

gguf = pytest.importorskip("gguf", reason="files are written with the format's own library: pip install gguf")
pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")

Pair = tuple[int, Any]  # type of GGUF, and the value as Python's
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass
class Parts:
    """A file taken apart. tensors: name -> (dimensions, the fastest first; number of the type; bytes)."""

    pairs: dict[str, Pair]
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]]

    @staticmethod
    def of(file: Path) -> Parts:
        reader = gguf.GGUFReader(file)
        pairs: dict[str, Pair] = {}
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                kinds = tuple(int(kind) for kind in field.types)
                pairs[key] = (kinds[0], field.contents() if kinds[0] != 9 else (kinds[-1], field.contents()))
        tensors = {
            t.name: (tuple(int(d) for d in t.shape), int(t.tensor_type), bytes(t.data.tobytes()))
            for t in reader.tensors
        }
        return Parts(pairs, tensors)

    def copy(self) -> Parts:
        return Parts(dict(self.pairs), dict(self.tensors))

    def content(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.pairs))
        for key, (kind, value) in self.pairs.items():
            head += _text(key) + struct.pack("<I", kind) + _value(kind, value)
        data = b""
        for name, (dims, kind, raw) in self.tensors.items():
            head += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
            data += raw + b"\0" * (-len(raw) % 32)
        return head + b"\0" * (-len(head) % 32) + data


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _text(value)
    if kind == 9:
        return struct.pack("<IQ", value[0], len(value[1])) + b"".join(_value(value[0], item) for item in value[1])
    return struct.pack(f"<{_NUMBERS[kind]}", value)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return Parts.of(gguf_files.write(file, FAMILIES["mixtral"], {"attn": "Q4_0", "exps": "Q4_0"}).file)


def use(file: Path) -> None:
    """Everything that a compile reads of a file, the weights themselves included; UserError for what is wrong."""
    spec = parse_spec(spec_from_gguf(file))
    store = GgufSource().open(spec, None)
    store.companions()
    for name, shape in store.names.items():  # type: ignore[attr-defined]
        weight = store.weight(name, shape)
        assert tuple(weight.load().shape) == shape
        if weight.stored is not None:
            assert weight.stored.load().shape == shape
    store.digest()


def refusal(file: Path, parts: Parts) -> str:
    file.write_bytes(parts.content())
    with pytest.raises(CheckpointError) as caught:
        use(file)
    line = caught.value.line()
    assert "\n" not in line
    assert line.isprintable()
    assert str(file) in line
    return line


def test_what_is_taken_apart_is_the_same_file(parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(parts.content())
    use(file)


def pair(key: str, kind: int, value: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.pairs[key] = (kind, value)

    return change


def without(*names: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for name in names:
            if parts.pairs.pop(name, None) is None:
                del parts.tensors[name]

    return change


def floats(name: str, *dims: int, value: float = 1.0) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensors[name] = (dims, 0, np.full(int(np.prod(dims)), value, np.float32).tobytes())

    return change


def scales(name: str, value: float) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        dims, kind, raw = parts.tensors[name]
        parts.tensors[name] = (dims, kind, raw[:-18] + np.array([value], np.float16).tobytes() + raw[-16:])

    return change


def moved(name: str, to: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensors[to] = parts.tensors.pop(name)

    return change


TOKENS = "tokenizer.ggml.tokens"


def types_of_nan(parts: Parts) -> None:
    pair("tokenizer.ggml.token_type", 9, (6, [np.nan] * len(parts.pairs[TOKENS][1][1])))(parts)


CHANGES: dict[str, tuple[Callable[[Parts], None], str]] = {
    "no architecture": (without("general.architecture"), "names no architecture"),
    "a number as architecture": (pair("general.architecture", 4, 7), "names no architecture"),
    "another architecture": (pair("general.architecture", 8, "mamba\x1b[31m"), "not read from GGUF"),
    "an unknown key": (pair("llama.attention.sinks_of_mine", 7, True), "llama.attention.sinks_of_mine, not known"),
    "no layers": (without("llama.block_count"), "block_count is missing"),
    "more layers than tensors": (pair("llama.block_count", 4, 1000), "speaks of 1000 layers"),
    "absurd layers": (pair("llama.block_count", 10, 1 << 62), "block_count is"),
    "negative layers": (pair("llama.block_count", 5, -1), "block_count is -1"),
    "no heads": (pair("llama.attention.head_count", 4, 0), "head_count is 0"),
    "heads that do not divide": (pair("llama.attention.head_count", 4, 3), "rows for 3 heads"),
    "heads as text": (pair("llama.attention.head_count", 8, "4"), "head_count is"),
    "other heads in each layer": (pair("llama.attention.head_count", 9, (4, [4, 2])), "from layer to layer"),
    "an empty list of heads": (pair("llama.attention.head_count", 9, (4, [])), "from layer to layer"),
    "more keys than queries": (pair("llama.attention.head_count_kv", 4, 8), "heads of 8 keys"),
    "keys of another width": (pair("llama.attention.head_count_kv", 4, 1), "attn_k.weight is [32, 64]"),
    "rows for another permutation": (pair("llama.attention.head_count", 4, 8), "key_length is 16, its tensors say 8"),
    "another layout of rows": (pair("llama.tensor_data_layout", 8, "HF"), "tensor_data_layout is HF"),
    "another rotary width": (pair("llama.rope.dimension_count", 4, 8), "rope.dimension_count is 8"),
    "no context": (pair("llama.context_length", 4, 0), "context_length is 0"),
    "an absurd context": (pair("llama.context_length", 10, 1 << 40), "context_length is"),
    "NaN as epsilon": (pair("llama.attention.layer_norm_rms_epsilon", 6, np.nan), "epsilon is nan"),
    "infinity as base": (pair("llama.rope.freq_base", 6, np.inf), "freq_base is inf"),
    "an unknown scaling": (pair("llama.rope.scaling.type", 8, "longrope"), "scaled by longrope"),
    "more experts than tensors": (pair("llama.expert_count", 4, 5), "5 experts, its tensors are of 4"),
    "absurd experts": (pair("llama.expert_count", 4, (1 << 32) - 1), "expert_count is"),
    "more experts chosen than there are": (pair("llama.expert_used_count", 4, 5), "expert_used_count is 5"),
    "none chosen": (pair("llama.expert_used_count", 4, 0), "expert_used_count is 0"),
    "a sigmoid router": (pair("llama.expert_gating_func", 4, 2), "router's function is number 2"),
    "experts denied": (pair("llama.expert_count", 4, 0), "no tensor blk.0.ffn_gate.weight"),
    "a window": (pair("llama.attention.sliding_window", 4, 16), "last 16 positions"),
    "no table": (without("token_embd.weight"), "no tensor token_embd.weight"),
    "no norm": (without("output_norm.weight"), "lacks a tensor of the model: output_norm.weight"),
    "no ups of experts": (without("blk.0.ffn_up_exps.weight"), "lacks a tensor of the model: blk.0.ffn_up_exps"),
    "no queries": (without("blk.0.attn_q.weight"), "no tensor blk.0.attn_q.weight"),
    "a table of one dimension": (floats("token_embd.weight", 64), "2 dimensions are expected"),
    "a norm of another width": (floats("output_norm.weight", 32), "output_norm.weight is [32]"),
    "keys of another input": (floats("blk.0.attn_k.weight", 32, 32), "attn_k.weight is [32, 32]"),
    "a router of another count": (floats("blk.0.ffn_gate_inp.weight", 64, 5), "ffn_gate_inp.weight is [5, 64]"),
    "ups of another count": (floats("blk.0.ffn_up_exps.weight", 64, 32, 3), "ffn_up_exps.weight is [3, 32, 64]"),
    "a tensor that the model does not have": (floats("blk.0.attn_sinks.weight", 4), "blk.0.attn_sinks.weight"),
    "a layer beyond the last": (floats("blk.7.attn_norm.weight", 64), "1 layers, its tensors are of 2"),
    "a tensor under another name": (moved("blk.0.attn_v.weight", "blk.0.attn_w.weight"), "blk.0.attn_v.weight"),
    "NaN as a scale": (scales("blk.0.attn_q.weight", np.nan), "blk.0.attn_q.weight has scales that are not finite"),
    "infinity as an expert's scale": (scales("blk.0.ffn_up_exps.weight", np.inf), "scales that are not finite"),
    "NaN in a norm": (floats("output_norm.weight", 64, value=np.nan), "output_norm.weight"),
    "infinity in a router": (floats("blk.0.ffn_gate_inp.weight", 64, 4, value=np.inf), "ffn_gate_inp.weight"),
    "factors of no known scaling": (floats("rope_freqs.weight", 8, value=3.0), "not those of Llama 3"),
    "factors of NaN": (floats("rope_freqs.weight", 8, value=np.nan), "rope_freqs"),
    "more tokens than rows": (pair(TOKENS, 9, (8, [f"t{i}" for i in range(97)])), "97 tokens for a vocabulary of 96"),
    "no tokens": (without(TOKENS), "no list tokenizer.ggml.tokens"),
    "numbers as tokens": (pair(TOKENS, 9, (4, list(range(95)))), "no list tokenizer.ggml.tokens"),
    "a token twice": (pair(TOKENS, 9, (8, ["a"] * 95)), "a token occurs twice"),
    "types of fewer tokens": (pair("tokenizer.ggml.token_type", 9, (5, [1, 2])), "not a number for each token"),
    "types of NaN": (types_of_nan, "token_type is not a number for each token"),
    "a merge of no tokens": (pair("tokenizer.ggml.merges", 9, (8, ["x yzw"])), "the merge"),
    "a merge without a space": (pair("tokenizer.ggml.merges", 9, (8, [""])), "the merge"),
    "a flag that is none": (pair("tokenizer.ggml.add_bos_token", 4, 9), "neither true nor false"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_thing_wrong(name: str, parts: Parts, tmp_path: Path) -> None:
    change, says = CHANGES[name]
    changed = parts.copy()
    change(changed)
    assert says in refusal(tmp_path / "m.gguf", changed)


@pytest.mark.parametrize(("said", "kind"), [({}, "linear"), ({"type": (8, "none")}, "default")])
def test_a_rotary_factor_alone_is_linear(said: dict[str, Pair], kind: str, parts: Parts, tmp_path: Path) -> None:
    """As llama.cpp has it, whose default type that is."""
    changed = parts.copy()
    for key, value in {"factor": (6, 4.0), **said}.items():
        changed.pairs[f"llama.rope.scaling.{key}"] = value
    (tmp_path / "m.gguf").write_bytes(changed.content())
    found = gguf_config.config_of(read_gguf(tmp_path / "m.gguf"))[0]["rope_parameters"]
    assert (found["rope_type"], found.get("factor")) == (kind, 4.0 if kind == "linear" else None)


def test_the_command_line_says_one_line_and_writes_nothing(parts: Parts, tmp_path: Path, moec: Moec) -> None:
    changed, file, out = parts.copy(), tmp_path / "m.gguf", tmp_path / "art"
    without("output_norm.weight")(changed)
    for content in (changed.content(), parts.content()[:-40], parts.content()[:700], b"GGUF", b""):
        file.write_bytes(content)
        refused(moec("compile", file, "--out", out, "-q"), str(file))
        assert moec("checkpoint", "inspect", file)[0] == 1
        assert not out.exists()
    file.unlink()
    refused(moec("compile", file, "--out", out, "-q"), str(file))
    file.mkdir()
    refused(moec("compile", file, "--out", out, "-q"))


def test_a_file_that_changes_while_it_is_read(parts: Parts, tmp_path: Path) -> None:
    """Cut off or written again after it was opened: no weight of another file, and no signal."""
    file = tmp_path / "m.gguf"
    file.write_bytes(parts.content())
    store = GgufSource().open(parse_spec(spec_from_gguf(file)), None)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = store.weight(name, store.names[name])  # type: ignore[attr-defined]
    weight.load()
    file.write_bytes(parts.content()[:-2000])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        weight.load()


# --- properties -----------------------------------------------------------------------------------------------------

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars: st.SearchStrategy[Pair] = st.one_of(
    st.tuples(st.just(11), st.integers(-(1 << 63), (1 << 63) - 1)),
    st.tuples(st.just(4), st.integers(0, 8)),
    st.tuples(st.just(12), st.floats()),
    st.tuples(st.just(7), st.booleans()),
    st.tuples(st.just(8), st.text(max_size=6)),
    st.tuples(st.just(9), st.tuples(st.just(5), st.lists(st.integers(-3, 100), max_size=4))),
    st.tuples(st.just(9), st.tuples(st.just(8), st.lists(st.text(max_size=3), max_size=4))),
)


def survives(file: Path, content: bytes) -> None:
    """The file is used whole, or refused with messages of printable lines that name it."""
    file.write_bytes(content)
    try:
        use(file)
    except UserError as error:
        lines = str(error).splitlines()
        assert all(line.isprintable() for line in lines)
        assert any(str(file) in line for line in lines)


@many
@given(st.data())
def test_any_value_of_any_key(parts: Parts, tmp_path: Path, data: st.DataObject) -> None:
    changed = parts.copy()
    for key in data.draw(st.lists(st.sampled_from(sorted(parts.pairs)), min_size=1, max_size=2)):
        changed.pairs[key] = data.draw(scalars)
    survives(tmp_path / "m.gguf", changed.content())


@pytest.mark.parametrize("value", [(9, (5, [])), (9, (5, [1, 2])), (9, (8, ["a"])), (8, ""), (7, True)])
def test_every_key_that_is_read(parts: Parts, tmp_path: Path, value: tuple[int, object]) -> None:
    """Arrays where one number is meant, also under keys that this file does not have."""
    architecture = parts.pairs["general.architecture"][1]
    names = [f"{architecture}.{key}" for key in sorted(gguf_config._READ)]
    for key in (*names, "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"):
        changed = parts.copy()
        changed.pairs[key] = value
        survives(tmp_path / "m.gguf", changed.content())


def test_gate_and_up_of_unlike_heights(parts: Parts, tmp_path: Path) -> None:
    """Together they have the rows of both; eight of the gate's would have become the up projection's."""
    changed = parts.copy()
    for part, more in (("gate", 8), ("up", -8)):
        name = f"blk.0.ffn_{part}_exps.weight"
        (columns, rows, experts), kind, raw = parts.tensors[name]
        size = len(raw) // (rows * experts) * (rows + more) * experts
        changed.tensors[name] = ((columns, rows + more, experts), kind, (2 * raw)[:size])
    assert "ffn_gate_exps" in refusal(tmp_path / "m.gguf", changed)


@many
@given(st.data())
@example(None)
def test_any_shape_of_any_tensor(parts: Parts, tmp_path: Path, data: st.DataObject | None) -> None:
    for name in sorted(parts.tensors) if data is None else [data.draw(st.sampled_from(sorted(parts.tensors)))]:
        dims, kind, raw = parts.tensors[name]
        orders: Iterator[tuple[int, ...]] = (
            itertools.permutations(dims)
            if data is None
            else iter([tuple(data.draw(st.lists(st.sampled_from([1, 2, 32, 64, 96, 128]), max_size=4)))])
        )
        for other in orders:
            changed = parts.copy()
            changed.tensors[name] = (other, kind, raw)
            survives(tmp_path / "m.gguf", changed.content())


@many
@given(st.integers(0, 1 << 40), st.integers(0, 255))
def test_any_byte(parts: Parts, tmp_path: Path, place: int, value: int) -> None:
    content = bytearray(parts.content())
    content[place % len(content)] = value
    survives(tmp_path / "m.gguf", bytes(content))
