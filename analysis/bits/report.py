"""The result of `moec quantize`: the text of the spec, figures by kind of weight, the measured divergence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from moec.analysis.bits.choose import Chosen
from moec.analysis.verify.foreign import before_target
from moec.analysis.verify.prompts import TextEncoder
from moec.analysis.verify.quality.divergence import Divergence, Rows, compare
from moec.analysis.verify.quality.fidelity import FloatModel, TokenizerEncoder
from moec.analysis.verify.quality.streamed import stream_logits
from moec.analysis.verify.quality.texts import LENGTH, held_out
from moec.compiler import build
from moec.compiler.progress import Progress
from moec.compiler.source import CHAT_TEMPLATE, TOKENIZER, Checkpoint
from moec.compiler.spec import Spec, parse_spec
from moec.compiler.tokenizer import TextTokenizer
from moec.compiler.word_hash import WordHashEncoder


def spec_text(chosen: Chosen, said: str) -> str:
    """The spec as YAML that can be read and compiled; `said` is its first comment. It is read back before it is given.

    Paths are absolute, so that the file can lie anywhere.
    """
    spec = chosen.spec
    raw = spec.model_dump(mode="json", exclude_unset=True)
    assert spec.quantization is not None
    raw["quantization"] = spec.quantization.model_dump(mode="json", exclude_defaults=True)
    raw["quantization"]["weights"] = spec.quantization.weights
    raw = _absolute({key: value for key, value in raw.items() if value is not None}, spec)
    text = f"# {said}\n" + yaml.safe_dump(raw, sort_keys=False, width=110, default_flow_style=None)
    read: Spec = parse_spec(text, file=spec.name)
    assert read.quantization == spec.quantization, "the spec does not say what was chosen"
    return text


def _absolute(raw: dict[str, Any], spec: Spec) -> dict[str, Any]:
    if spec.checkpoint is not None:
        raw["checkpoint"] = str(Path(spec.checkpoint).absolute())
    return raw


def by_kind(chosen: Chosen) -> list[tuple[str, str, int, float]]:
    """For the weights of one kind in all layers: their formats with counts, bytes, and expected divergence."""
    kinds: dict[str, list[Any]] = {}
    for names, choice in zip(chosen.costs.names, chosen.choices, strict=True):
        kind = ".".join("*" if word.isdigit() else word for word in names[0].split("."))
        kinds.setdefault(kind, []).append(choice)
    rows = []
    for kind, choices in kinds.items():
        counted = Counter(str(c) for c in choices)
        formats = ", ".join(f"{n} {name}" if len(choices) > 1 else name for name, n in counted.most_common())
        rows.append((kind, formats, sum(c.bytes for c in choices), sum(c.kld for c in choices)))
    return rows


def divergence(spec: Spec, store: Checkpoint, target: str, tokens: int, progress: Progress) -> Divergence:
    """The chosen spec's graph, its rounding of activations and cache included, against the float model on held-out
    text. Nothing is compiled; an artifact's kernels compute the same up to rounding in the last place."""
    model = FloatModel(spec, store)
    coded = before_target(*build.program_and_passes(spec, store, target, progress))
    files = store.companions()
    template = files[CHAT_TEMPLATE].decode("utf-8") if CHAT_TEMPLATE in files else None
    encoder: TextEncoder = WordHashEncoder(coded.info.vocab_size)
    if TOKENIZER in files and files[TOKENIZER].strip() != b"{}":
        encoder = TokenizerEncoder(TextTokenizer(files[TOKENIZER], TOKENIZER))
    longest = min(LENGTH, model.longest, coded.info.max_tokens)
    chunks = held_out(encoder, template=template, tokens=tokens, longest=longest)
    rows: list[Rows] = []
    count = sum(len(c.ids) for c in chunks)
    with progress.stage(f"compare with the float model on {count} tokens", len(chunks)) as step:
        pairs = zip(chunks, model.logits(chunks), stream_logits(coded, [c.ids for c in chunks]), strict=True)
        for chunk, wanted, found in pairs:
            rows.append(compare(chunk.domain, chunk.ids, wanted, found))
            step(chunk.domain)
    return Divergence.of(rows)
