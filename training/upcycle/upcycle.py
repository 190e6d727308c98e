"""The whole of `moec upcycle`: from a dense checkpoint and a spec to the checkpoint of the spec's mixture.

The dense model's graph runs on the text a stretch at a time (`analysis/calibration/streaming.py`), each block is
made into a mixture as soon as its inputs are known, and its weights are written and dropped: in memory are one layer,
the residual stream of all tokens and the table of the embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.fx import Node

from moec.analysis.calibration.streaming import LayerStream, Stretch
from moec.analysis.calibration.texts import Texts, calibration_texts
from moec.checkpoints.config_json import config_to_json
from moec.checkpoints.folder import CONFIG
from moec.checkpoints.safetensors_file import SafetensorsWriter
from moec.compiler.build import text_encoder
from moec.compiler.errors import SpecError, UserError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.compiler.replacing import replacing
from moec.compiler.source import TOKENIZER
from moec.compiler.spec import Spec
from moec.compiler.spec.quantization import Calibration
from moec.compiler.spec.sources import source_of
from moec.passes.pipelines import fusion
from moec.sources.decoder.config import DecoderConfig, decoder_of
from moec.sources.decoder.layout import parameter_counts, weight_layout
from moec.sources.dense_decoder import DenseDecoder, open_dense_decoder
from moec.training.data.batches import Batches
from moec.training.data.shards import Corpus
from moec.training.upcycle.blocks import DenseBlock, dense_blocks
from moec.training.upcycle.recipe import Recipe, recipe_for
from moec.training.upcycle.split import Block, Mixture, copy, split

TOKENS = 32768  # of text; a refit needs some times as many as a block has neurons
REPORT, SPEC = "upcycle.json", "spec.yaml"
_LENGTH = 512  # tokens of one call
_COMPARED = (
    "layers", "d_model", "heads", "kv_heads", "head_dim", "vocab_size", "norm_eps", "qk_norm", "tied_embeddings",
    "rope", "attention_window",
)  # fmt: skip


@dataclass(frozen=True)
class Upcycled:
    """What was made: the folder, the recipe, and the report that lies in it."""

    out: Path
    recipe: Recipe
    report: dict[str, Any] = field(default_factory=dict)


def upcycle(
    spec: Spec,
    dense: Path,
    out: Path,
    *,
    text: Path | None = None,
    data: Path | None = None,
    tokens: int = TOKENS,
    refit: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Upcycled:
    """Write `out`: the checkpoint of the spec's mixture, made of the dense model in `dense`.

    text: a file, or JSON lines, that the model reads; data: a corpus that `moec data` built, read instead, its domains
    alike; default: the shipped prompts. tokens: at most so many of it.
    refit: whether second products are fitted to the experts that are chosen. UserError, before anything is written,
    for a spec or a model that no recipe fits.
    """
    progress = progress or Progress(quiet=True)
    target = decoder_of(spec, "upcycled")
    if target.moe is None:
        raise SpecError(
            "model: is dense", place=spec.name, remedy="write `architecture: mobilemoe` and a `moe:` section"
        )
    source = open_dense_decoder(dense)
    _check_same(spec.name, target, source.config, dense)
    assert source.config.ffn_width is not None
    recipe = recipe_for(target.moe, source.config.ffn_width, spec.name)
    program = _program(spec.name, source, dense)
    blocks = dense_blocks(program)
    if len(blocks) != target.layers:
        raise UserError(f"{len(blocks)} blocks were found in {target.layers} layers", place=str(dense))
    texts = _texts(program, source, text, tokens) if data is None else _rows(data, source, tokens)
    least = max(target.d_model, target.moe.experts)
    if texts.tokens < least:
        raise UserError(
            f"{texts.tokens} tokens of text are too few to fit routers of {target.d_model} inputs",
            remedy=f"give --text with at least {least} tokens, better ten times as many",
        )
    work = _Work(program, source, target, recipe, blocks, texts.sequences, refit, seed, progress)
    with replacing(out, kind="a checkpoint") as folder:
        layers = _write(folder, spec, target, source, work)
        report = _report(recipe, target, source, texts, layers, dense)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return Upcycled(out, recipe, report)


def _check_same(name: str, target: DecoderConfig, dense: DecoderConfig, place: Path) -> None:
    """SpecError for every key, beside the blocks, in which the spec's model is not the dense one."""
    wrong = [key for key in _COMPARED if getattr(target, key) != getattr(dense, key)]
    if not wrong:
        if target.context > dense.context:
            raise SpecError(f"model.context is {target.context}, {place} was trained for {dense.context}", place=name)
        return
    said = "; ".join(
        f"model.{key} is {_plain(getattr(target, key))}, it has {_plain(getattr(dense, key))}" for key in wrong
    )
    raise SpecError(
        f"is not a mixture of {place}: {said}", place=name, remedy="all but the feed-forward blocks must be as they are"
    )


def _plain(value: Any) -> str:
    dumped = value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
    return json.dumps(dumped)


def _program(name: str, source: DenseDecoder, dense: Path) -> Program:
    """The dense model's graph at stage FUSED, whose one call takes as many tokens as a text has."""
    length = min(_LENGTH, source.config.context)
    if source.own:
        model: dict[str, Any] = source.config.model_copy(update={"context": length}).model_dump(mode="json")
    else:
        model = {"transformers": str(dense), "context": length}
    spec = Spec.model_validate({"name": name, "model": model, "quantization": "none", "targets": ["xnnpack"]})
    return run_passes(source_of(spec.model).export(spec, source.store, max_tokens=length), fusion())


def _texts(program: Program, source: DenseDecoder, text: Path | None, tokens: int) -> Texts:
    lines = text is not None and text.suffix.lower() in (".jsonl", ".json", ".ndjson")
    given = Calibration(tokens=tokens, text=None if lines else text, jsonl=text if lines else None)
    encode = text_encoder(source.store)(program)
    return calibration_texts(given, encode, bos_id=None, context=program.info.context)


def _rows(data: Path, source: DenseDecoder, tokens: int) -> Texts:
    """Rows of a corpus's training text, domains in turn."""
    corpus = Corpus.open(data)
    corpus.check()
    own = source.store.companions().get(TOKENIZER)
    if own is not None and hashlib.sha256(own).hexdigest() != corpus.index["tokenizer_sha256"]:
        what = f"its tokenizer is not that of {source.store.folder}"
        raise UserError(what, place=str(data), remedy="build the corpus with --tokenizer of the dense model")
    length = min(_LENGTH, source.config.context)
    shares = dict.fromkeys((d for d in corpus.domains if corpus.shard(d, "train").documents), 1.0)
    batches = Batches(corpus, shares, length, length, seed=0)
    sequences: list[tuple[int, ...]] = []
    counts = dict.fromkeys(shares, 0)
    for step in range(max(1, tokens // length)):
        batch = batches.batch(step)
        sequences.append(tuple(batch.tokens_BT[0].tolist()))
        counts[batch.domains_B[0]] += length
    return Texts(tuple(sequences), {domain: n for domain, n in counts.items() if n})


@dataclass
class _Work:
    """The dense model on the text, giving the mixture of each layer in turn."""

    program: Program
    source: DenseDecoder
    target: DecoderConfig
    recipe: Recipe
    blocks: Sequence[DenseBlock]
    texts: Sequence[Sequence[int]]
    refit: bool
    seed: int
    progress: Progress

    def mixtures(self) -> Iterator[Mixture]:
        """Each layer's, in order; the inputs of a block are dropped with it."""
        gates = [b.gate for b in self.blocks]
        stream = LayerStream(self.program, self.texts, gates)
        seen: dict[Node, list[Tensor]] = {}

        def observe(node: Node, args: tuple[Any, ...]) -> None:
            seen.setdefault(node, []).append(args[0].flatten(0, -2).to(torch.float32))

        waiting = list(self.blocks)
        stretches: list[Stretch] = list(stream)
        with self.progress.stage(
            f"{self.recipe.kind} {len(waiting)} blocks on {stream.tokens} tokens", len(waiting)
        ) as step:
            for stretch in stretches:
                stream.run(stretch, observe)
                while waiting and waiting[0].gate in seen and waiting[0].gate in stretch.nodes:
                    block = waiting.pop(0)
                    number = len(self.blocks) - len(waiting) - 1
                    yield self._mixture(block, torch.cat(seen.pop(block.gate)), number)
                    step(f"layer {number}")

    @torch.no_grad()
    def _mixture(self, block: DenseBlock, x_TD: Tensor, number: int) -> Mixture:
        load = self.program.weights
        dense = Block(*(load[n].load().to(torch.float32) for n in (block.gate_name, block.up_name, block.down_name)))
        assert self.target.moe is not None
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
        if self.recipe.kind == "copy":
            return copy(dense, x_TD, self.target.moe, generator)
        return split(dense, x_TD, self.target.moe, generator, refit=self.refit)


def _write(folder: Path, spec: Spec, target: DecoderConfig, source: DenseDecoder, work: _Work) -> list[dict[str, Any]]:
    """The checkpoint, in float32; the report of each layer."""
    (folder / CONFIG).write_text(json.dumps(config_to_json(target, packed=False), indent=2) + "\n", "utf-8")
    for name, content in source.store.companions().items():
        (folder / name).write_bytes(content)
    (folder / SPEC).write_text(_spec_text(spec), encoding="utf-8")
    layout = weight_layout(target)
    layers: list[dict[str, Any]] = []
    mixtures, held = work.mixtures(), dict[str, Tensor]()
    stored = [(info.name, torch.float32, info.shape) for info in layout.values()]
    with SafetensorsWriter(folder / "model.safetensors", stored) as writer:
        for name, info in layout.items():
            at = f"model.layers.{info.layer}.feed_forward."
            if not name.startswith(at):
                writer.write(name, [source.weight(name).load().to(torch.float32)])
                continue
            if not held:
                made = next(mixtures)
                held = {part: value for part, value in made.weights().items() if at + part in layout}
                layers.append(made.report)
            value = held.pop(name.removeprefix(at))
            writer.write(name, value.unbind(0) if info.name.endswith("_proj") else [value])
    assert next(mixtures, None) is None
    return layers


def _spec_text(spec: Spec) -> str:
    """The spec that compiles the folder it lies in."""
    dumped: dict[str, Any] = spec.model_dump(mode="json", exclude_none=True)
    wanted = ("name", "model", "quantization", "targets", "training")
    kept: dict[str, Any] = {"quantization": "none"} | {key: dumped[key] for key in wanted if key in dumped}
    return "# Of the checkpoint beside it.\n" + yaml.dump(kept | {"checkpoint": "."}, sort_keys=False, width=110)


def _report(
    recipe: Recipe,
    target: DecoderConfig,
    source: DenseDecoder,
    texts: Texts,
    layers: list[dict[str, Any]],
    dense: Path,
) -> dict[str, Any]:
    tokens = [n for layer in layers for n in layer["tokens_per_expert"]]
    even = texts.tokens * recipe.moe.top_k / recipe.moe.experts
    return {
        "recipe": recipe.kind,
        "dense": str(dense.absolute()),
        "neurons_active": recipe.active,
        "parameters": {"dense": parameter_counts(source.config)["total"], **parameter_counts(target)},
        "text": {"tokens": texts.tokens, "domains": texts.domains},
        "tokens_per_expert": {"least": min(tokens), "even": even, "most": max(tokens)},
        "layers": layers,
    }
