"""What sinks and windows of gpt-oss cost at one token behind a long context. `make bench-sinks`.

Layers of gpt-oss-20b (bench/shapes), with a vocabulary of 1,024 so that the head does not hide them and 4 of the 32
experts (a token takes 4, which are read either way), three times with the same weights:

    release      sinks, and in every other layer a window of 128 positions
    no sinks     an ordinary softmax, the same windows
    ordinary     an ordinary softmax over the whole context in every layer

Each context is computed, not assumed; then the three decode in turn, round after round, from the same position. The
medians of a token and the ratios to `release` are printed. bench/README.md says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moec.assistant.load import load
from moec.compiler import build
from moec.compiler.cores import usable_cores
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.sources.random_checkpoint import stream_random
from moec.sources.transformers_source import TransformersModel

SHAPE = Path(__file__).parent / "shapes" / "gpt-oss-20b.yaml"
VOCABULARY, EXPERTS = 1024, 4
KINDS = ("release", "no sinks", "ordinary")
_KEPT = 512  # positions behind the context, for decoding


def layer_types(kind: str, layers: int) -> list[str]:
    """Which of the layers see a window, and which the whole context."""
    return ["full_attention" if kind == "ordinary" or i % 2 else "sliding_attention" for i in range(layers)]


def attention_of(kind: str) -> AbstractContextManager[None]:
    """The attention that models which are built and called in this context have."""
    return nullcontext() if kind == "release" else _without_sinks()


@contextmanager
def _without_sinks() -> Iterator[None]:
    """transformers' attention of gpt-oss with a softmax over the scores alone; the rest of its layers as it is."""
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = module.num_key_value_groups
        keys, values = gpt_oss.repeat_kv(key, groups), gpt_oss.repeat_kv(value, groups)
        scores = torch.matmul(query, keys.transpose(2, 3)) * scaling
        weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
        return torch.matmul(weights, values).transpose(1, 2).contiguous(), weights

    with mock.patch.object(gpt_oss, "eager_attention_forward", attention):
        yield


def prepare(kind: str, layers: int, context: int, threads: int, folder: Path, progress: Progress) -> Path:
    """The artifact of one kind, made once."""
    name = f"{kind.replace(' ', '-')}-{layers}-{context}-{threads}"
    artifact = folder / name
    if artifact.exists():
        return artifact
    raw = load_spec(SHAPE).model_dump(mode="json")
    shape = load_spec(SHAPE).model
    assert isinstance(shape, TransformersModel)
    changes = {
        "num_hidden_layers": layers,
        "layer_types": layer_types(kind, layers),
        "num_local_experts": EXPERTS,
        "vocab_size": VOCABULARY,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    weights = stream_random(shape.transformers, folder / f"{name}-weights", seed=0, changes=changes, progress=progress)
    raw["model"] |= {"transformers": str(weights), "context": context + _KEPT}
    raw["targets"] = {"xnnpack": {"max_tokens": 512, "threads": threads}}
    spec = Spec.model_validate(raw | {"name": name})
    with attention_of(kind):
        build.compile(spec, target="xnnpack", out=artifact, progress=progress)
    return artifact


def measure(
    artifacts: dict[str, Path], context: int, tokens: int, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of a decoded token behind `context` tokens: of each kind one for each round, the median of its tokens."""
    ids = torch.randint(VOCABULARY, (context,), generator=torch.Generator().manual_seed(1)).tolist()
    sessions = {kind: load(artifact) for kind, artifact in artifacts.items()}
    with progress.stage(f"computing {context} tokens", len(sessions) * context) as step:
        for kind, session in sessions.items():
            for at in range(0, context, 512):
                session.prefill(ids[at : at + 512])
                step(kind)
    found: dict[str, list[float]] = {kind: [] for kind in sessions}
    for _ in range(rounds):
        for kind, session in sessions.items():
            session.rewind(context)
            found[kind].append(statistics.median(_seconds(session, token) for token in ids[:tokens]))
    for session in sessions.values():
        session.close()
    return found


def _seconds(session: Any, token: int) -> float:
    began = time.perf_counter()
    session.decode(token)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench/sinks"), help="where artifacts and results go")
    parser.add_argument("--context", type=int, default=32768, help="positions before the tokens that are timed")
    parser.add_argument("--layers", type=int, default=2, help="an even number: half of the release's have a window")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.layers % 2 or not 0 < options.tokens <= _KEPT:
        parser.error(f"--layers is an even number, --tokens at most {_KEPT}")
    progress = Progress()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        artifacts = {
            kind: prepare(kind, options.layers, options.context, options.threads, options.out, progress)
            for kind in KINDS
        }
        found = measure(artifacts, options.context, options.tokens, options.rounds, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.layers} layers, {options.threads} threads, one token behind {options.context}, ms: median (range)")
    for kind, seconds in found.items():
        ms = [1e3 * value for value in seconds]
        ratios = [release / value for release, value in zip(found["release"], seconds, strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        spread = f"{statistics.median(ms):.2f} ({min(ms):.2f}-{max(ms):.2f})"
        print(f"  {kind:<10} {spread:<26} release over it {ratio}")
    (options.out / "sinks.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
