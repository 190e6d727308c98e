"""`model: {gguf: FILE}`: logits of transformers on the dequantized weights, codes of the file, and what is refused.

Files are written by `tests/sources/gguf_files.py` with the format's own library, which quantizes and dequantizes.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.checkpoints.spec_from_gguf import spec_from_gguf
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import CheckpointError, CompileError, SpecError
from moec.compiler.ops import fused_moe_q
from moec.compiler.pipeline import run_passes
from moec.compiler.spec.loader import parse_spec
from moec.passes.pipelines import pipeline
from moec.sources.gguf_model import open_gguf
from moec.sources.gguf_source import GgufSource
from tests.conftest import Moec, refused
from tests.interpreter import Interpreter
from tests.sources import gguf_files
from tests.sources.gguf_files import FAMILIES, Written, with_experts

gguf = pytest.importorskip("gguf", reason="files are written with the format's own library: pip install gguf")
pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")

# fp32 sums in another order: at most 1e-6 was seen on logits up to 5; rows out of order give more than 0.1
ATOL, RTOL = 1e-5, 1e-4
KINDS_OF_K = {"attn": "IQ4_NL", "ffn": "Q4_K", "output": "Q6_K"}
MIXED = {"attn": "Q4_0", "exps": "Q4_0", "output": "Q8_0"}
FLOAT = "activations: fp32, kv_cache: fp32"
MIXTURES = ("gpt-oss", "mixtral", "qwen2moe", "qwen3moe", "olmoe", "granitemoe", "granitemoeshared")


def spec_of(file: Path, dequantize: tuple[str, ...] = (), *, rounded: bool = False) -> Any:
    text = spec_from_gguf(file, dequantize)
    return parse_spec(text if rounded else text.replace("group_size: 32", f"group_size: 32, {FLOAT}"))


def expected(written: Written, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return written.model(torch.tensor([ids])).logits[0]


def ids_of(count: int) -> list[int]:
    return [int(i) for i in torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(5))]


def integers(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [R, K] and scales [R, B] as the specification of a type says, an element at a time."""
    size = {"Q4_0": 18, "Q8_0": 34, "Q5_0": 22, "IQ4_NL": 18, "MXFP4": 17}[kind]
    rows = blocks.reshape(-1, blocks.shape[-1])
    codes = np.zeros((len(rows), rows.shape[1] // size * 32), np.int32)
    scales = np.zeros((len(rows), rows.shape[1] // size), np.uint16)
    powers = (0, 1, 2, 3, 4, 6, 8, 12)  # MXFP4's levels, twice their values
    doubled = (*powers, *(-power for power in powers))
    table = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    for row, block in itertools.product(range(len(rows)), range(scales.shape[1])):
        raw = rows[row, block * size : (block + 1) * size].tobytes()
        scales[row, block] = int.from_bytes(raw[:2], "little")
        if kind == "MXFP4":
            scales[row, block] = np.float16(2.0 ** (raw[0] - 128)).view(np.uint16)
        for element in range(32):
            if kind == "Q8_0":
                code = int.from_bytes(raw[2 + element : 3 + element], "little", signed=True)
            else:
                byte = raw[len(raw) - 16 + element % 16]
                nibble = byte & 15 if element < 16 else byte >> 4
                fifth = (int.from_bytes(raw[2:6], "little") >> element) & 1
                code = {
                    "Q4_0": nibble - 8,
                    "Q5_0": nibble + 16 * fifth - 16,
                    "IQ4_NL": table[nibble],
                    "MXFP4": doubled[nibble],
                }[kind]
            codes[row, block * 32 + element] = code
    return codes, scales


# --- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_0", "IQ4_NL", "MXFP4"])
def test_codes_are_those_of_the_format(kind: str) -> None:
    """Every nibble and bit at its place, scales of either sign bit for bit, values those of the library."""
    from moec.checkpoints.gguf_codes import carried_codes

    number = gguf.GGMLQuantizationType[kind]
    generator = np.random.default_rng(1)
    for rows, blocks in ((1, 1), (7, 3), (64, 2)):
        raw = generator.integers(0, 256, (rows, blocks, gguf.GGML_QUANT_SIZES[number][1]), np.uint8)
        raw[..., :2] = generator.normal(size=(rows, blocks)).astype(np.float16)[..., None].view(np.uint8)
        if kind == "MXFP4":
            raw[..., 0] = generator.integers(104, 144, (rows, blocks))
        raw = raw.reshape(rows, -1)
        found = carried_codes(kind, raw, "w", "here")
        codes, scales = integers(kind, raw)
        assert np.array_equal(found.unpacked().numpy(), codes)
        assert np.array_equal(found.scales.view(torch.int16).numpy(), scales.view(np.int16))
        assert np.array_equal(found.dequantize().numpy(), gguf.dequantize(raw, number))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(bad: float) -> None:
    from moec.checkpoints.gguf_codes import carried_codes

    raw = np.zeros((2, 36), np.uint8)
    raw[1, 18:20] = np.array([bad], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match="tensor w has scales that are not finite"):
        carried_codes("Q4_0", raw, "w", "here")


@pytest.mark.parametrize(("byte", "says"), [(255, "is NaN"), (90, r"is 2\^-37, outside"), (160, r"is 2\^33, outside")])
def test_powers_of_two_that_no_scale_holds(byte: int, says: str) -> None:
    """Unless all codes of the block are zero, of either sign."""
    from moec.checkpoints.gguf_codes import carried_codes

    raw = np.full((2, 34), 120, np.uint8)
    raw[1, 17] = byte
    with pytest.raises(CheckpointError, match=f"a scale of w {says}"):
        carried_codes("MXFP4", raw, "w", "here")
    raw[1, 18:] = 0x80
    found = carried_codes("MXFP4", raw, "w", "here")
    assert torch.isfinite(found.scales).all()
    assert (found.dequantize()[1, 32:] == 0).all()


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    """A prompt and two steps, in codes: the logits of transformers with the values that the codes stand for."""
    written = gguf_files.write(tmp_path / "m.gguf", FAMILIES[name], MIXED)
    spec = spec_of(written.file)
    store = GgufSource().open(spec, None)
    program = run_passes(GgufSource().export(spec, store, max_tokens=16), pipeline(spec.quantization))
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is fused_moe_q]
    assert len(nodes) == (written.model.config.num_hidden_layers if name in MIXTURES else 0)
    ids, run = ids_of(12), Interpreter(program)
    found = torch.cat([run(torch.tensor([ids[a:b]]), torch.tensor([a])) for a, b in ((0, 10), (10, 11), (11, 12))], 1)
    torch.testing.assert_close(found[0], expected(written, ids), atol=ATOL, rtol=RTOL)
    matrices = [kind for kind, _ in written.stored.values() if kind != "F32"]
    carried = {note.split(": ")[0]: note.split(": ")[1] for note in store.notes if "carried" in note}
    assert sum(int(part.split()[0]) for note in carried.values() for part in note.split(", ")) == len(matrices)


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), pytest.param(64, 8, marks=pytest.mark.slow)])
def test_artifact(experts: int, chosen: int, tmp_path: Path, moec: Moec) -> None:
    """`moec compile FILE.gguf`: logits are transformers', a layer's experts are one node."""
    family = with_experts(FAMILIES["qwen3moe"], experts, chosen)
    written = gguf_files.write(tmp_path / "tiny-moe.gguf", family, MIXED)
    text = tmp_path / "float.yaml"
    text.write_text(spec_from_gguf(written.file).replace("group_size: 32", f"group_size: 32, {FLOAT}"))
    status, out, err = moec("compile", text, "--out", tmp_path / "art")
    assert status == 0, err
    layers = written.model.config.num_hidden_layers
    assert f"GGUF tensors carried bit for bit: {7 * layers} Q4_0, 2 Q8_0" in out
    artifact = Artifact.open(tmp_path / "art")
    assert {"fuse_moe": layers}.items() <= {p.name: p.changed for p in artifact.manifest.passes}.items()
    assert artifact.path("chat_template.jinja").read_text() == gguf_files.TEMPLATE
    ids = ids_of(20)
    session = build.load(artifact)
    try:
        found = [session.prefill(ids[:17], logits="all"), *(session.decode(i)[None] for i in ids[17:])]
    finally:
        session.close()
    wanted = expected(written, ids).numpy()
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=RTOL, atol=ATOL * 4)  # sums of 64 in three stages


@pytest.mark.parametrize("rows", ["MXFP4", "Q8_0"])
def test_gpt_oss_as_it_is_released(rows: str, tmp_path: Path, moec: Moec) -> None:
    """Experts whose gate and up projections are apart in the file, alternate in the model, and are one node here."""
    family = FAMILIES["gpt-oss"]
    written = gguf_files.write(tmp_path / "oss.gguf", family, {"exps": rows})
    text = tmp_path / "float.yaml"
    text.write_text(spec_from_gguf(written.file).replace("group_size: 32", f"group_size: 32, {FLOAT}"))
    status, out, err = moec("compile", text, "--out", tmp_path / "art")
    assert status == 0, err
    layers = family.config["num_hidden_layers"]
    held = {"MXFP4": f"{3 * layers} MXFP4, {4 * layers + 2} Q8_0", "Q8_0": f"{7 * layers + 2} Q8_0"}[rows]
    assert f"GGUF tensors carried bit for bit: {held}" in out
    artifact = Artifact.open(tmp_path / "art")
    assert {"fuse_moe": layers}.items() <= {p.name: p.changed for p in artifact.manifest.passes}.items()
    ids = ids_of(30)  # beyond the window of every other layer
    with build.load(artifact) as session:
        found = [session.prefill(ids[:17], logits="all"), *(session.decode(i)[None] for i in ids[17:])]
    wanted = expected(written, ids).numpy()
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=RTOL, atol=ATOL * 4)


@pytest.mark.parametrize("others", ["F16", "Q4_0"])
@pytest.mark.parametrize("first", ["gate", "up"])
def test_projections_that_are_stored_differently(first: str, others: str, tmp_path: Path) -> None:
    """They are one tensor of the model, whose codes nobody rounds anew."""
    kinds = {f"ffn_{first}_exps": "MXFP4", "exps": others}
    written = gguf_files.write(tmp_path / "oss.gguf", FAMILIES["gpt-oss"], kinds)
    text = spec_from_gguf(written.file).replace("weights: int8", "weights: int8, experts: fp4")
    if others == "F16":
        store = open_gguf(written.file, parse_spec(text).quantization, ())
        weight = store.weight(name := "model.layers.0.mlp.experts.gate_up_proj", store.names[name])
        assert weight.stored is not None
        with pytest.raises(CompileError, match="stored differently: only one of them is stored as codes"):
            weight.stored.load()
    else:
        with pytest.raises(CheckpointError, match="is Q4_0, INT4 codes in groups of 32 along in; the spec stores"):
            open_gguf(written.file, parse_spec(text).quantization, ())


def test_gpt_oss_without_a_window(tmp_path: Path) -> None:
    """The window is no guess: a file that does not state it is refused."""
    written = gguf_files.write(tmp_path / "oss.gguf", FAMILIES["gpt-oss"], {"exps": "MXFP4"})
    data = written.file.read_bytes()
    key = b"gpt-oss.attention.sliding_window"
    assert data.count(key) == 1
    written.file.write_bytes(data.replace(key, b"gpt-oss.attention.causal_windows"[: len(key)]))
    with pytest.raises(CheckpointError, match=r"gpt-oss\.attention\.causal_windows, not known"):
        open_gguf(written.file, None, ())


def test_the_file_alone_is_a_spec(tmp_path: Path, moec: Moec) -> None:
    """The spec is printed, the artifact says where its codes are from, verify finds the file again."""
    written = gguf_files.write(tmp_path / "tiny.gguf", FAMILIES["llama-tied"], MIXED)
    status, out, err = moec("compile", written.file, "--out", tmp_path / "art")
    assert status == 0, err
    assert "model: {gguf: " in err
    assert "INT4" not in out
    manifest = json.loads((tmp_path / "art" / "manifest.json").read_text())
    assert manifest["name"] == "tiny"
    assert str(tmp_path) not in json.dumps(manifest)
    origins = {h["origin"] for h in manifest["codes"]}
    assert origins == {"carried: GGUF Q4_0", "carried: GGUF Q8_0"}
    status, out, err = moec("verify", tmp_path / "art")
    assert status == 0, out + err
    status, out, err = moec("checkpoint", "spec", written.file)
    assert (status, out) == (0, spec_from_gguf(written.file))


# --- what a file may hold beside ------------------------------------------------------------------------------------


def test_experts_in_tensors_of_their_own(tmp_path: Path) -> None:
    """Files of early 2024: the stack is made of them, and its codes."""
    family = with_experts(FAMILIES["mixtral"], 4, 2)
    stacked = gguf_files.write(tmp_path / "stacked.gguf", family, MIXED)
    single = gguf_files.write(tmp_path / "single.gguf", family, MIXED, experts_apart=True)
    stores = [open_gguf(w.file, spec_of(w.file).quantization, ()) for w in (stacked, single)]
    assert len(single.stored) > len(stacked.stored)
    for name, shape in stores[0].names.items():
        one, other = (store.weight(name, shape) for store in stores)
        assert torch.equal(one.load(), other.load())
        assert (one.stored is None) == (other.stored is None)
        if one.stored is not None and other.stored is not None:
            assert torch.equal(one.stored.load().codes, other.stored.load().codes)
            assert torch.equal(one.stored.load().scales, other.stored.load().scales)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats(kind: str, tmp_path: Path) -> None:
    written = gguf_files.write(tmp_path / "m.gguf", FAMILIES["qwen3"], kind)
    store = open_gguf(written.file, spec_of(written.file).quantization, ())
    for name, value in written.model.state_dict().items():
        weight = store.weight(name, tuple(value.shape))
        assert weight.stored is None
        assert torch.equal(weight.load(), value)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_types_that_are_not_carried(kind: str, tmp_path: Path, moec: Moec) -> None:
    """Refused by name; with `--dequantize` their values are those of the format's own library."""
    written = gguf_files.write(tmp_path / "m.gguf", FAMILIES["llama"], {"ffn": kind, "attn": "Q4_0"})
    result = moec("compile", written.file, "--out", tmp_path / "art")
    refused(result, str(written.file), f"6 of {kind}", f"--dequantize {kind}")
    assert not (tmp_path / "art").exists()
    status, out, _ = moec("checkpoint", "spec", written.file, "--dequantize", kind.lower())
    assert status == 0
    assert f"dequantize: [{kind}]" in out
    spec = parse_spec(out)
    store = GgufSource().open(spec, None)
    assert f"GGUF tensors dequantized, as `dequantize` says: 6 {kind}" in store.notes
    for name, value in written.model.state_dict().items():
        weight = store.weight(name, tuple(value.shape))
        assert torch.equal(weight.load(), value)
        assert (weight.stored is None) == ("mlp" in name or "norm" in name)


def test_k_quants(tmp_path: Path, moec: Moec) -> None:
    """Super-blocks of 256: refused, or dequantized as the format's own library does."""
    config = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    family = gguf_files.Family("llama", "llama", config, permuted=True)
    written = gguf_files.write(tmp_path / "m.gguf", family, KINDS_OF_K)
    refused(moec("compile", written.file, "--out", tmp_path / "art"), "3 of Q4_K, 1 of Q6_K", "--dequantize Q4_K,Q6_K")
    spec = spec_of(written.file, ("Q4_K", "Q6_K"))
    assert (spec.quantization.scheme_of("head").bits, spec.quantization.scheme_of("ffn").bits) == (8, 4)
    store = GgufSource().open(spec, None)
    for name, value in written.model.state_dict().items():
        assert torch.equal(store.weight(name, tuple(value.shape)).load(), value)
    assert "GGUF tensors carried bit for bit: 4 IQ4_NL, 1 Q8_0" in store.notes


def test_names_that_are_no_types(tmp_path: Path, moec: Moec) -> None:
    written = gguf_files.write(tmp_path / "m.gguf", FAMILIES["llama"])
    refused(moec("compile", written.file, "--dequantize", "Q4_X", "--out", tmp_path / "a"), "Q4_X")
    with pytest.raises(SpecError, match="F16 is no quantized type"):
        parse_spec(f"name: x\nmodel: {{gguf: {written.file}, dequantize: [F16]}}\nquantization: {{weights: int8}}\n")
    text = tmp_path / "s.yaml"
    text.write_text(spec_from_gguf(written.file))
    refused(
        moec("compile", text, "--dequantize", "Q4_K", "--out", tmp_path / "a"),
        "--dequantize is for a checkpoint, not for a spec",
    )


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ("{weights: int4, group_size: 32, expert_group_axis: in}", "Q8_0"),
        ("{weights: int8, group_size: 64, expert_group_axis: in}", "groups of 64"),
        ("{weights: int8, group_size: 32, expert_group_axis: out}", "along out"),
    ],
)
def test_a_spec_that_would_quantize_twice(quantization: str, says: str, tmp_path: Path) -> None:
    """Nothing is rounded again without a word."""
    written = gguf_files.write(tmp_path / "m.gguf", FAMILIES["olmoe"], "Q8_0")
    spec = parse_spec(f"name: x\nmodel: {{gguf: {written.file}}}\nquantization: {quantization}\n")
    with pytest.raises(CheckpointError, match=says) as caught:
        GgufSource().open(spec, None)
    assert "dequantize" in str(caught.value)
    again = parse_spec(f"name: x\nmodel: {{gguf: {written.file}, dequantize: [Q8_0]}}\nquantization: {quantization}\n")
    assert not any("carried" in note for note in GgufSource().open(again, None).notes)


def test_inspect_and_plan(tmp_path: Path, moec: Moec) -> None:
    written = gguf_files.write(tmp_path / "m.gguf", FAMILIES["qwen2moe"], MIXED)
    status, out, err = moec("checkpoint", "inspect", written.file, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["parameters"]["total"] == sum(p.numel() for p in written.model.parameters())
    assert found["problems"] == []
    text = tmp_path / "s.yaml"
    text.write_text(spec_from_gguf(written.file))
    status, out, err = moec("inspect", text)
    assert status == 0, err
    status, out, err = moec("plan", text, "--json")
    assert status == 0, err
