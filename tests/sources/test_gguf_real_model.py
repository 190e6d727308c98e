"""SmolLM2's GGUF, its matrices in Q4_0 and in Q8_0: codes of the file, logits of transformers and of llama.cpp.

The package's file holds Q4_1, which is not carried; the format's own library quantizes its values again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.checkpoints.spec_from_gguf import spec_from_gguf
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.source import CHAT_TEMPLATE, TOKENIZER
from moec.compiler.spec.loader import parse_spec
from moec.passes.pipelines import pipeline
from moec.sources.gguf_source import GgufSource
from tests.conftest import Moec, refused
from tests.interpreter import Interpreter
from tests.test_real_model import TEXT

gguf = pytest.importorskip("gguf", reason="the file is requantized with the format's own library: pip install gguf")
pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
# slow: tests/sources/test_gguf_source.py does the same with small files
pytestmark = [pytest.mark.real_model, pytest.mark.slow]

HEADS, KV_HEADS = 9, 3
TEXTS = (
    TEXT,
    "In 1789 there were 12 of them.",
    "  leading spaces\t\ttabs\n\n\nx",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "na\u00efve caf\u00e9 \u2014 \u65e5\u672c\u8a9e \U0001f642 \u0437\u0438\u043c\u0430",
    "don't I'LL we've 3.14159 1,000,000",
)


def rewritten(source: Path, out: Path, change: Callable[[Any], tuple[np.ndarray, Any]]) -> Path:
    """The file with its metadata, each tensor as `change` says: (data, type or None)."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        data, kind = change(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def as_type(kind: str) -> Callable[[Any], tuple[np.ndarray, Any]]:
    number = gguf.GGMLQuantizationType[kind]

    def change(tensor: Any) -> tuple[np.ndarray, Any]:
        if tensor.tensor_type.name != "Q4_1":
            return tensor.data, tensor.tensor_type
        return gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), number), number

    return change


def as_floats(tensor: Any) -> tuple[np.ndarray, Any]:
    shape = [int(size) for size in tensor.shape[::-1]]
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape), None


@pytest.fixture(scope="module")
def original() -> Path:
    from bench import real_model

    try:
        return real_model.gguf_file()
    except real_model.NotReached as error:
        pytest.skip(f"the weights of a real model are not here and cannot be fetched: {error}")


@pytest.fixture(scope="module", params=["Q4_0", "Q8_0"])
def file(request: pytest.FixtureRequest, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(original, tmp_path_factory.mktemp("smollm2") / f"{request.param}.gguf", as_type(request.param))


@pytest.fixture(scope="module")
def program(file: Path) -> Program:
    """In codes, activations and cache in float32."""
    text = spec_from_gguf(file).replace("group_size: 32", "group_size: 32, activations: fp32, kv_cache: fp32")
    spec = parse_spec(text.replace("context: 4096", "context: 256"))
    exported = GgufSource().export(spec, GgufSource().open(spec, None), max_tokens=256)
    return run_passes(exported, pipeline(spec.quantization))


@pytest.fixture(scope="module")
def ids(file: Path) -> list[int]:
    from tokenizers import Tokenizer

    spec = parse_spec(spec_from_gguf(file))
    tokenizer = Tokenizer.from_str(GgufSource().open(spec, None).companions()[TOKENIZER].decode())
    return list(tokenizer.encode(TEXT).ids)


@pytest.fixture(scope="module")
def logits(program: Program, ids: list[int]) -> np.ndarray:
    return Interpreter(program)(torch.tensor([ids]), torch.tensor([0]))[0].numpy()  # type: ignore[no-any-return]


def cosines(a_TV: np.ndarray, b_TV: np.ndarray) -> np.ndarray:
    a, b = a_TV.astype(np.float64), b_TV.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)  # type: ignore[no-any-return]


def test_codes_of_every_matrix_are_those_of_the_file(file: Path, program: Program) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    seen = set()
    for held in program.quantized.values():
        layer = re.fullmatch(r"model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight", held.name)
        part = {"o": "attn_output"} | {n: f"attn_{n}" for n in "qkv"} | {n: f"ffn_{n}" for n in ("gate", "up", "down")}
        name = f"blk.{layer[1]}.{part[layer[2]]}.weight" if layer else "token_embd.weight"
        seen.add(name)
        tensor = tensors[name]
        blocks = np.array(tensor.data).reshape(
            tensor.data.shape[0], -1, {"Q4_0": 18, "Q8_0": 34}[tensor.tensor_type.name]
        )
        body = blocks[..., 2:]
        if tensor.tensor_type.name == "Q4_0":
            codes = np.concatenate((body & 15, body >> 4), -1).astype(np.int8) - 8
        else:
            codes = body.view(np.int8)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.uint16).reshape(len(blocks), -1)
        codes = codes.reshape(len(blocks), -1)
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # rows lie for interleaved rotation
            heads = HEADS if name.endswith("q.weight") else KV_HEADS
            order = np.arange(len(codes)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
            codes, scales = codes[order], scales[order]
        found = held.tensor(program.weights)
        assert np.array_equal(found.unpacked().numpy(), codes), name
        assert np.array_equal(found.scales.view(torch.int16).numpy().view(np.uint16), scales), name
        assert str(held.provenance) == f"carried: GGUF {tensor.tensor_type.name}"
    assert len(seen) == 7 * 30 + 1
    assert seen == {n for n, t in tensors.items() if t.tensor_type.name in ("Q4_0", "Q8_0")}


def test_logits_are_those_of_transformers(file: Path, logits: np.ndarray, ids: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    # float32 in another order: 1 - 1e-11 was seen; rounding activations to 8 bits gives 0.99, rows out of order less
    assert cosines(logits, expected).min() > 0.999999
    np.testing.assert_allclose(logits, expected, atol=5e-3, rtol=0)  # of logits up to 40; 1e-4 was seen


def test_logits_and_ids_are_those_of_llama_cpp(file: Path, logits: np.ndarray, ids: list[int], tmp_path: Path) -> None:
    """On the file's values: with quantized types llama.cpp rounds activations to 8 bits, which moves it to 0.988 from
    its own float logits at the worst of 512 positions, so that it is given the file's values as floats."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama.cpp: pip install llama-cpp-python")
    from tokenizers import Tokenizer

    floats = rewritten(file, tmp_path / "floats.gguf", as_floats)
    count = len(ids) + 8
    model = llama_cpp.Llama(
        str(floats), n_ctx=count, n_batch=count, n_ubatch=count, logits_all=True, verbose=False, n_threads=2,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    model.eval(ids)
    assert cosines(logits, np.array(model.scores[: len(ids)])).min() > 0.9999
    tokenizer = Tokenizer.from_str(
        GgufSource().open(parse_spec(spec_from_gguf(file)), None).companions()[TOKENIZER].decode()
    )
    for text in TEXTS:
        assert list(tokenizer.encode(text).ids) == model.tokenize(text.encode(), add_bos=True, special=True)


def test_the_package_s_file_is_refused_by_the_name_of_its_type(original: Path, moec: Moec, tmp_path: Path) -> None:
    refused(moec("compile", original, "--out", tmp_path / "art"), "210 of Q4_1", "--dequantize Q4_1")
    spec = parse_spec(spec_from_gguf(original, ("Q4_1",)))
    store = GgufSource().open(spec, None)
    assert store.notes[0] == "GGUF tensors carried bit for bit: 1 Q8_0"
    assert "named SmolLM" in store.companions()[CHAT_TEMPLATE].decode()
    assert spec.quantization is not None
    assert spec.quantization.scheme_of("embedding").bits == 8  # type: ignore[union-attr]
