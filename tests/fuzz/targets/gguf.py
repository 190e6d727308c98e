"""GGUF: header, implied spec, config, tokenizer and codes of a one-layer mixture, without building its module."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

from moec.checkpoints.gguf_codes import CARRIED, carried_codes, float_values
from moec.checkpoints.gguf_file import read_gguf
from moec.checkpoints.spec_from_gguf import spec_from_gguf
from moec.compiler.errors import UserError
from moec.sources.gguf_config import config_of
from moec.sources.gguf_tokenizer import companions_of, tokenizer_notes
from tests.fuzz.mutate import flip

_COUNTS = {
    "block_count": 1, "context_length": 16, "embedding_length": 32, "attention.head_count": 2, "expert_count": 3,
    "expert_used_count": 2, "feed_forward_length": 32,
}  # fmt: skip
# name -> (dimensions, the fastest first; type; bytes): F32 is 0, Q4_0 is 2, Q8_0 is 8
_TENSORS = {
    "token_embd.weight": ((32, 5), 8, 5 * 34),
    "output_norm.weight": ((32,), 0, 128),
    "blk.0.attn_norm.weight": ((32,), 0, 128),
    "blk.0.ffn_norm.weight": ((32,), 0, 128),
    **{f"blk.0.attn_{part}.weight": ((32, 32), 2, 32 * 18) for part in ("q", "k", "v", "output")},
    "blk.0.ffn_gate_inp.weight": ((32, 3), 0, 384),
    **{f"blk.0.ffn_{part}_exps.weight": ((32, 32, 3), 2, 96 * 18) for part in ("gate", "up", "down")},
}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _pairs(model: str) -> list[bytes]:
    def texts(*values: str) -> bytes:
        return struct.pack("<IQ", 8, len(values)) + b"".join(map(_text, values))

    found = [_text("general.architecture") + struct.pack("<I", 8) + _text("llama")]
    found += [_text(f"llama.{key}") + struct.pack("<II", 4, count) for key, count in _COUNTS.items()]
    found.append(_text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    found.append(_text("tokenizer.ggml.model") + struct.pack("<I", 8) + _text(model))
    found.append(_text("tokenizer.ggml.tokens") + struct.pack("<I", 9) + texts("<s>", "a", "b", "ab", "\u2581ab"))
    found.append(_text("tokenizer.ggml.merges") + struct.pack("<I", 9) + texts("a b"))
    found.append(_text("tokenizer.ggml.scores") + struct.pack("<IIQ5f", 9, 6, 5, *range(5)))
    found.append(_text("tokenizer.ggml.bos_token_id") + struct.pack("<II", 4, 0))
    return found


def _content(model: str) -> bytes:
    pairs = _pairs(model)
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(_TENSORS), len(pairs)) + b"".join(pairs), b""
    for name, (dims, kind, size) in _TENSORS.items():
        head += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += b"\x11" * (size + -size % 32)
    return head + b"\0" * (-len(head) % 32) + data


class Gguf:
    name = "gguf"

    def seeds(self, folder: Path) -> Sequence[bytes]:
        return [_content("gpt2"), _content("llama")]

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        data = rng.choice(seeds)
        end = len(data) - sum(size + -size % 32 for _, _, size in _TENSORS.values())
        return flip(rng, data) if rng.random() < 0.2 else flip(rng, data[:end]) + data[end:]

    def run(self, data: bytes, folder: Path) -> None:
        path = folder / "model.gguf"
        path.write_bytes(data)
        try:
            file = read_gguf(path)
            spec_from_gguf(path, ("Q4_1",))
            config, _ = config_of(file)
            list(tokenizer_notes(file))
            companions_of(file, config["vocab_size"])
            for tensor in file.tensors.values():
                if tensor.type in CARRIED:
                    carried_codes(tensor.type, file.blocks(tensor), tensor.name, str(path)).dequantize()
                elif tensor.type in ("F32", "F16", "BF16", "F64"):
                    float_values(tensor.type, file.blocks(tensor), tensor.shape[-1])
        except UserError:
            return


TARGET = Gguf()
