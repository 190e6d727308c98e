"""Small models, corpora and specs that the tests of training share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from moec.compiler.spec import Spec
from moec.sources.decoder.config import DecoderConfig
from moec.training.checkpoints import load_weights
from moec.training.data.shards import Corpus, write_tokens
from moec.training.model import TrainingDecoder
from moec.training.rounding import Rounding

MOE: dict[str, Any] = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "vocab_size": 300, "context": 80, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 8, "top_k": 3, "expert_width": 32, "shared_width": 64, "scale": 2.5},
    "bos_id": 0, "eos_ids": [1],
}  # fmt: skip
DENSE: dict[str, Any] = {
    "architecture": "mobilellm", "layers": 4, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 111, "context": 60, "tied_embeddings": False, "ffn_width": 96,
    "rope": {"theta": 500.0, "interleaved": False}, "attention_window": {"size": 7, "every_nth_global": 3},
}  # fmt: skip
INT4 = {"weights": "int4", "group_size": 32, "embedding": "int4"}
STAGE: dict[str, Any] = {
    "context": 32, "batch_tokens": 256, "learning_rate": {"peak": 3e-3, "warmup": 512},
    "mixture": {"web": 2, "code": 1}, "eval_tokens": 256, "log_every": 1, "checkpoint_every": 4, "eval_every": 5,
}  # fmt: skip
PRETRAIN = STAGE | {
    "name": "pretrain", "tokens": 256 * 12, "dispatch": {"kind": "drop_and_pad", "capacity_factor": 1.2}
}  # fmt: skip
SFT = STAGE | {"name": "sft", "tokens": 256 * 5, "mixture": {"chat": 1}}
QAT = STAGE | {"name": "qat", "tokens": 256 * 6, "quantization": "from_spec", "precision": "fp32"}


def spec_of(*stages: dict[str, Any], model: dict[str, Any] = MOE, quantization: Any = INT4, **training: Any) -> Spec:
    section = {"stages": list(stages), "seed": 5, **training} if stages else None
    return Spec.model_validate({"name": "small", "model": model, "quantization": quantization, "training": section})


def config_of(model: dict[str, Any] = MOE, **changes: Any) -> DecoderConfig:
    return DecoderConfig.model_validate(model | changes)


def random_weights(config: DecoderConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that use everything: norms off one, biases that change choices, logits of order one."""
    from moec.sources.decoder.layout import weight_layout

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, info in weight_layout(config).items():
        value = torch.randn(info.shape, generator=generator)
        if len(info.shape) == 1:
            found[name] = 0.1 * value + (0.0 if name.endswith("bias") else 1.0)
        else:
            found[name] = value * (info.shape[-2] if len(info.shape) == 3 else info.shape[-1]) ** -0.5
    return found


def model_of(
    config: DecoderConfig, weights: dict[str, torch.Tensor], rounding: Rounding | None = None, **options: Any
) -> TrainingDecoder:
    model = TrainingDecoder(config, rounding, **options)
    load_weights(model, weights.items())
    return model.eval()


def documents_of(count: int, seed: int, factor: int, vocab: int = 300, longest: int = 40) -> list[list[int]]:
    """Documents with something to learn: each id decides the next, but for one in ten."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        ids, last = [0], source.randrange(2, vocab)
        for _ in range(source.randint(3, longest)):
            last = source.randrange(2, vocab) if source.random() < 0.1 else 2 + (last * factor + 7) % (vocab - 2)
            ids.append(last)
        found.append([*ids, 1])
    return found


def corpus_of(folder: Path, vocab: int = 300) -> Corpus:
    """Text domains web and code, and chat, whose responses are the second half of an example."""
    texts = {
        name: {"train": documents_of(90, i, 3 + 2 * i, vocab), "heldout": documents_of(9, 50 + i, 3 + 2 * i, vocab)}
        for i, name in enumerate(("web", "code", "chat"))
    }
    for split in texts["chat"].values():
        split[:] = [ids[:30] for ids in split]  # an example must fit into a row
    masks = {
        split: [[int(i >= len(ids) // 2) for i in range(len(ids))] for ids in documents]
        for split, documents in texts["chat"].items()
    }
    return write_tokens(folder, texts, vocab_size=vocab, eos_id=1, masks={"chat": masks})
