"""A model of any shape whose routers repeat a recorded trace: the routing of a trained model on a large one's weights.

    make replayed-routing BENCH_ARGS="ARTIFACT --ids FILE --checkpoint DIR --out trace.json.gz"
    make bench-flash BENCH_ARGS="--prepare --model mobilemoe-l --trace trace.json.gz"

The first runs an artifact over a text and keeps which experts each token selected. With `--checkpoint` it also measures
how often the next layer's router, applied to this layer's router input, selects the experts that the next layer then
does: what a cache could read ahead.

The second synthesizes a packed checkpoint of the spec and changes a few of its tensors, so that the artifact, its
kernels and its sizes are those of the spec. The text is the ids 0 to T - 1, each once:

- The outputs of attention, experts and shared experts are scaled by 1/50: the stream of a token stays its embedding
  within a few percent. T random embeddings in more than T dimensions are linearly independent.
- Each router is the least-squares solution (of least norm, exact since T + R < D) of logits 2 for the experts that the
  trace names and -2 for all others. Selection biases are 0.
- The gains of the norm in front of the router differ at random between layers, by `exp(s * normal)`. The next router on
  this layer's input is then wrong by an amount that s decides; s is set so that it is right as often as `--ahead` says.
  (Who divides by one layer's gains and multiplies by the next one's sees the next layer's input as it will be, which no
  trained model grants: such a lookahead cannot be judged here.)

The ids behind the trace, T to T + R - 1, select experts at random, all alike and independently: the routing of a model
that was not trained. (Ids that no router was solved for prefer few experts: embeddings share directions.)
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moec.assistant.load import load
from moec.checkpoints import synthesize
from moec.checkpoints.store import WeightStore, open_store, packed_names
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import UserError
from moec.compiler.files import read_bytes, read_text
from moec.compiler.progress import Progress
from moec.compiler.quant import QuantizedTensor
from moec.compiler.spec import Spec, load_spec
from moec.compiler.target import MoeTrace
from moec.sources.decoder.config import DecoderConfig, decoder_of

LOGIT = 2.0  # of the experts that a trace names, and minus that of the others
QUIET = 0.02  # of the blocks' outputs
RANDOM = 256  # ids behind a trace whose experts are drawn
_MAX_TRACE = 256 << 20  # bytes, unpacked


@dataclass(frozen=True)
class Recorded:
    """Routing of a text. chosen: int [tokens, layers, k]. ahead: see `lookahead_share`; None if it was not measured."""

    name: str
    experts: int
    chosen: np.ndarray
    ahead: float | None = None

    def write(self, file: Path) -> None:
        fields = {"name": self.name, "experts": self.experts, "ahead": self.ahead, "chosen": self.chosen.tolist()}
        text = json.dumps(fields, separators=(",", ":")).encode()
        file.write_bytes(gzip.compress(text, mtime=0) if file.suffix == ".gz" else text)

    @classmethod
    def read(cls, file: Path) -> Recorded:
        """UserError for a file that is no trace."""
        remedy = "record one with bench/replayed_routing.py"
        try:
            data = read_bytes(file, limit=_MAX_TRACE)
            fields = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
            chosen = np.asarray(fields["chosen"], np.int32)
            found = cls(str(fields["name"]), int(fields["experts"]), chosen, fields.get("ahead"))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a trace of routing: {error}", place=str(file), remedy=remedy) from None
        if chosen.ndim != 3 or not chosen.size or chosen.min() < 0 or chosen.max() >= found.experts:
            raise UserError("not a trace of routing: experts are missing", place=str(file), remedy=remedy)
        return found


def recorded(artifact: Artifact, ids: Sequence[int], *, window: int = 512, keep: int = 256) -> np.ndarray:
    """The experts of every MoE layer for each of `ids` but the first `window - keep`, int32 [tokens, layers, k].

    The context is a window that slides over the text: each call sees `window` tokens and the last `keep` are taken.
    """
    parts = [np.stack([t.indices_TK for t in traces], 1) for traces in _windows(artifact, ids, window, keep)]
    return np.sort(np.concatenate(parts), -1)


@dataclass(frozen=True)
class _Layer:
    """What a layer did with the tokens that are kept."""

    x_TD: np.ndarray
    indices_TK: np.ndarray


def _windows(artifact: Artifact, ids: Sequence[int], window: int, keep: int) -> Iterator[list[_Layer]]:
    """The layers of each window."""
    count = len(artifact.manifest.model.moe_layers)
    with load(artifact) as session:
        session.trace(True)
        for end in range(window, len(ids) + 1, keep):
            session.reset()
            session.prefill(ids[end - window : end])
            found = session.take_traces()
            # a long call may be cut into pieces
            joined = [
                (_joined(found[at::count], "x_TD"), _joined(found[at::count], "indices_TK")) for at in range(count)
            ]
            yield [_Layer(x_TD[-keep:], indices_TK[-keep:]) for x_TD, indices_TK in joined]


def _joined(parts: Sequence[MoeTrace], field: str) -> np.ndarray:
    return np.concatenate([getattr(part, field) for part in parts])


def lookahead_share(inputs: Sequence[np.ndarray], chosen: np.ndarray, routers: Sequence[Any]) -> float:
    """The share of the experts of layers 1, 2, ... that their router selects too from the input of the layer before.

    inputs: [T, D] of each layer's router; chosen: [T, layers, k]; routers: (weight [E, D], bias [E]) of each.
    """
    k, right = chosen.shape[2], []
    for layer in range(1, len(routers)):
        weight, bias = routers[layer]
        scores = 1 / (1 + np.exp(-(inputs[layer - 1] @ weight.T))) + bias
        guess = np.argpartition(-scores, k - 1, axis=-1)[:, :k]
        right.append((guess[:, :, None] == chosen[:, layer, None, :]).any(1).mean())
    return float(np.mean(right))


def mapped(chosen: np.ndarray, layers: int, tokens: int) -> np.ndarray:
    """A trace of another number of layers, [tokens, layers, k]: layer l repeats what layer l % n of the n recorded ones
    did on the tokens from `l // n * tokens` on. UserError for a recording that is too short."""
    recorded_tokens, count, _ = chosen.shape
    stretches = -(-layers // count)
    if stretches * tokens > recorded_tokens:
        raise UserError(
            f"{layers} layers and {tokens} tokens need {stretches * tokens} tokens of a trace of {count} layers, "
            f"and it has {recorded_tokens}",
            remedy="record a longer text, or take fewer tokens",
        )
    parts = [chosen[at // count * tokens :][:tokens, at % count] for at in range(layers)]
    return np.stack(parts, 1)


def drawn(tokens: int, layers: int, experts: int, k: int, seed: int = 0) -> np.ndarray:
    """k different experts of every layer for each token, all sets as likely as any other, int [tokens, layers, k]."""
    keys = np.random.default_rng(seed).random((tokens, layers, experts))
    return np.argsort(keys, -1)[..., :k]


def solved(x_TD: np.ndarray, chosen_TK: np.ndarray, experts: int) -> np.ndarray:
    """The router of least norm, [E, D], that gives x the logits LOGIT for the chosen experts and -LOGIT for others."""
    tokens = len(x_TD)
    wanted_TE = np.full((tokens, experts), -LOGIT)
    wanted_TE[np.arange(tokens)[:, None], chosen_TK] = LOGIT
    x = x_TD.astype(np.float64)
    return (x.T @ np.linalg.solve(x @ x.T, wanted_TE)).T.astype(np.float32)


def gains(strength: float, layers: int, width: int, seed: int = 0) -> np.ndarray:
    """Of the norms in front of the routers, [layers, D]."""
    drawn = np.random.default_rng(seed).standard_normal((layers, width))
    return np.exp(strength * drawn).astype(np.float32)


def tuned(x_TD: np.ndarray, chosen: np.ndarray, experts: int, ahead: float, layers: int = 4) -> float:
    """The strength of `gains` at which the lookahead of the first layers is right for the share `ahead` of experts."""
    few = min(layers, chosen.shape[1])
    solutions = [solved(x_TD, chosen[:, layer], experts) for layer in range(few)]

    def share(strength: float) -> float:
        g = gains(strength, chosen.shape[1], x_TD.shape[1])
        routers = [(solutions[i] / g[i], 0.0) for i in range(few)]
        return lookahead_share([x_TD * g[i] for i in range(few)], chosen[:, :few], routers)

    low, high = 0.0, 2.0  # it falls with the strength
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > ahead else (low, middle)
    return (low + high) / 2


def write_routing(folder: Path, config: DecoderConfig, chosen: np.ndarray, ahead: float) -> dict[str, float]:
    """Change a packed checkpoint in place so that ids 0 ... T - 1 are routed as `chosen`, [T, layers, k], says.

    Returns the strength of the gains and the share of the lookahead that is right with it, by the float model.
    """
    store = open_store(folder, config)
    assert config.moe is not None
    experts, tokens = config.moe.experts, len(chosen)
    if tokens >= config.d_model:
        raise UserError(f"{tokens} tokens in {config.d_model} dimensions", remedy="take fewer tokens than dimensions")
    x_TD = embeddings(store, tokens)
    x_TD = x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + config.norm_eps)
    strength = tuned(x_TD, chosen, experts, ahead)
    # gains are stored as bfloat16
    gains_LD = _bfloat16(gains(strength, config.layers, config.d_model))
    routers = []
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        weight_ED = solved(x_TD, chosen[:, layer], experts) / gains_LD[layer]
        routers.append((weight_ED, 0.0))
        _put(store, f"{prefix}.feed_forward.router.weight", weight_ED)
        bits = gains_LD[layer].view(np.uint32) >> 16
        _put(store, f"{prefix}.post_attention_layernorm.weight", bits.astype(np.uint16))
        if config.moe.selection_bias:
            _put(store, f"{prefix}.feed_forward.expert_bias", np.zeros(experts, np.uint16))
        outputs = [f"{prefix}.self_attn.o_proj.weight", f"{prefix}.feed_forward.experts.down_proj"]
        if config.moe.shared_width:
            outputs.append(f"{prefix}.feed_forward.shared_expert.down_proj.weight")
        for name in outputs:
            scales = _view(store, packed_names(name)[1], np.float16)
            scales[:] = (scales.astype(np.float32) * QUIET).astype(np.float16)
            scales.flush()
    share = lookahead_share([x_TD * g for g in gains_LD], chosen, routers)
    return {"gain_strength": strength, "ahead": share}


def embeddings(store: WeightStore, tokens: int) -> np.ndarray:
    """The first rows of a packed embedding as the kernels see them, float32 [tokens, D]."""
    codes, scales = (store.entries[name].tensor()[:tokens] for name in packed_names("model.embed_tokens.weight"))
    return QuantizedTensor(codes, scales, 4, codes.shape[-1] * 2 // scales.shape[-1]).dequantize().numpy()


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest below in magnitude that is a bfloat16, as float32."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _view(store: WeightStore, name: str, dtype: Any) -> np.memmap[Any, Any]:
    entry = store.entries[name]
    return np.memmap(entry.file, dtype, "r+", entry.begin, entry.shape)


def _put(store: WeightStore, name: str, values: np.ndarray) -> None:
    view = _view(store, name, values.dtype)
    assert view.nbytes == store.entries[name].bytes, name
    view[:] = values
    view.flush()


def make(
    spec: Path, trace: Path, out: Path, tokens: int, ahead: float, progress: Progress, random: int = RANDOM
) -> Path:
    """The artifact of a spec with replayed routing, OUT/artifact; made once, no checkpoint remains.

    OUT/routing.json has what it was made of, the trace of its layers and the share of uses that its runtime repeats.
    """
    artifact, about = out / "artifact", out / "routing.json"
    asked = {"recorded": hashlib.sha256(trace.read_bytes()).hexdigest(), "tokens": tokens, "wanted_ahead": ahead}
    for file in (about, out / "solved.json"):
        before = json.loads(file.read_text()) if file.exists() else {}
        if before and any(before.get(key) != value for key, value in asked.items()):
            raise UserError(
                "made of another trace, or with other options", place=str(out), remedy="choose another --out"
            )
    if about.exists():
        return artifact
    loaded, found = load_spec(spec), Recorded.read(trace)
    config = decoder_of(loaded, "replayed")
    if config.moe is None or (config.moe.experts, config.moe.top_k) != (found.experts, found.chosen.shape[2]):
        raise UserError("the trace is of another number of experts", place=str(trace), remedy="record one that fits")
    chosen = mapped(found.chosen, config.layers, tokens)
    solutions = np.concatenate([chosen, drawn(random, config.layers, found.experts, chosen.shape[2])])
    checkpoint, notes = out / "checkpoint", out / "solved.json"
    out.mkdir(parents=True, exist_ok=True)
    if not artifact.exists():
        if not checkpoint.exists():
            notes.unlink(missing_ok=True)
            synthesize(loaded, checkpoint, qat=True, progress=progress)
        if not notes.exists():  # a checkpoint is changed once
            with progress.stage("solve the routers"):
                solved = write_routing(checkpoint, config, solutions, ahead)
                notes.write_text(json.dumps({**solved, **asked}) + "\n")
        build.compile(loaded, target="xnnpack", checkpoint=checkpoint, out=artifact, progress=progress)
    with progress.stage("compare the routing with the trace"):
        same = repeated(Artifact.open(artifact), solutions)
    fields = {
        "trace": found.name,
        "repeated": same,
        **json.loads(notes.read_text()),
        "chosen": chosen.tolist(),
        "random": random,
    }
    about.write_text(json.dumps(fields, separators=(",", ":")) + "\n")
    shutil.rmtree(checkpoint, ignore_errors=True)
    return artifact


def repeated(artifact: Artifact, chosen: np.ndarray) -> float:
    """The share of a trace's uses that the artifact's own runtime makes on ids 0 ... T - 1."""
    with load(artifact) as session:
        session.trace(True)
        session.prefill(list(range(len(chosen))))
        count, parts = chosen.shape[1], session.take_traces()
    own = np.stack([_joined(parts[layer::count], "indices_TK") for layer in range(count)], 1)
    return float((own[..., :, None] == chosen[..., None, :]).any(-2).mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make replayed-routing", description="Record the routing of an artifact on a text."
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="token ids of a text")
    parser.add_argument("--checkpoint", type=Path, help="that the artifact is of: the lookahead is measured too")
    parser.add_argument("--tokens", type=int, default=3584)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        artifact = Artifact.open(options.artifact)
        ids = [int(i) for i in re.findall(r"\d+", read_text(options.ids, limit=64 << 20))]
        window = min(512, artifact.manifest.model.context)
        ids = ids[: options.tokens + window // 2]
        chosen = recorded(artifact, ids, window=window, keep=window // 2)
        ahead = None
        if options.checkpoint is not None:
            ahead = measured_ahead(artifact, options.checkpoint, ids, window)
        moe = artifact.manifest.section("model", "moe")
        found = Recorded(artifact.manifest.name, int(moe["experts"]), chosen, ahead)
        found.write(options.out)
        told = "" if ahead is None else f"; lookahead right for {ahead:.1%} of experts"
        print(f"{len(chosen)} tokens, {options.out.stat().st_size / 1e3:.0f} kB{told}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measured_ahead(artifact: Artifact, checkpoint: Path, ids: Sequence[int], window: int) -> float:
    """`lookahead_share` of a model of ours on a text."""
    config = decoder_of(Spec.model_validate(artifact.manifest.spec), "recorded")
    weights = open_store(checkpoint, config).weights
    routers = []
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.feed_forward"
        bias = weights[f"{prefix}.expert_bias"].load().numpy() if config.moe and config.moe.selection_bias else 0.0
        routers.append((weights[f"{prefix}.router.weight"].load().numpy(), bias))
    shares = []
    for traces in _windows(artifact, ids, window, window // 2):
        chosen = np.stack([t.indices_TK for t in traces], 1)
        shares.append(lookahead_share([t.x_TD for t in traces], chosen, routers))
    return float(np.mean(shares))


if __name__ == "__main__":
    sys.exit(main())
