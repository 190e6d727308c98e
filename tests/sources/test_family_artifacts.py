"""The shipped specs of families: INT4 artifacts that run, against eager models with the same codes.

The reference is the eager transformers model whose weights are the artifact's codes times their scales: what differs
is the rounding of activations and cache, and with that switched off nothing but the order of fp32 sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler import build
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.spec import Spec, load_spec
from moec.passes.pipelines import pipeline
from moec.sources.random_checkpoint import SPREAD, save_random
from moec.sources.transformers_source import TransformersModel
from tests.interpreter import Interpreter

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)

FAMILIES = sorted((Path(__file__).parents[2] / "specs" / "families").glob("*.yaml"))
EXACT = {"activations": "fp32", "kv_cache": "fp32"}
# Of these, rounding that moves a value a little can move a token far: a state carries it on to all later tokens, and
# sparsemixer takes half of an expert's weight, or gives it back, where another one crosses the threshold
JUMPING = {"lfm2-moe", "qwen3-next", "qwen3-5-moe", "granite-4-h", "nemotron-h", "phi-moe"}


def test_thirteen_are_shipped() -> None:
    kinds = {load_spec(file).model.transformers.name for file in FAMILIES}  # type: ignore[union-attr]
    attend = {"olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe"}
    assert kinds == attend | {"lfm2_moe", "qwen3_next", "qwen3_5_moe", "granitemoehybrid", "nemotron_h"}


def with_checkpoint(
    file: Path, folder: Path, quantization: dict[str, Any], spread: float = SPREAD, **changes: Any
) -> Spec:
    """The shipped spec with random weights beside its config."""
    spec = load_spec(file)
    assert isinstance(spec.model, TransformersModel)
    save_random(spec.model.transformers, folder, seed=7, changes=changes, spread=spread)
    raw = spec.model_dump(mode="json")
    raw["model"]["transformers"] = str(folder)
    raw["quantization"] |= quantization
    return Spec.model_validate(raw)


def quantized_program(spec: Spec) -> Program:
    program, _ = build.program_and_passes(spec, build.open_checkpoint(spec, None))
    return run_passes(program, pipeline(spec.quantization))


def eager_with_codes(folder: Path, program: Program) -> Any:
    """transformers' model of `folder`, every weight that `program` quantized replaced by its dequantized codes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = dict(model.named_parameters(remove_duplicate=False))
    replaced = set()
    for name, held in program.quantized.items():
        value = held.dequantize(program.weights)
        key = name.removeprefix("model.")
        if key in own:
            targets, values = [key], [value]
        elif key.endswith("gate_up_proj.weight"):  # the shared expert's two projections were stacked
            targets = [key.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
            values = list(value.chunk(2))
        else:
            continue
        with torch.no_grad():
            for target, part in zip(targets, values, strict=True):
                own[target].copy_(part)
                replaced.add(name)
    left = set(program.quantized) - replaced
    assert not left, f"codes that no weight of the model has: {left}"
    return model


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def artifact_and_eager(spec: Spec, folder: Path, count: int = 40, steps: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the artifact's logits: of a prefill in chunks, and of single steps behind a shorter one."""
    artifact = build.compile(spec, out=folder / "artifact")
    assert isinstance(spec.model, TransformersModel)
    model = eager_with_codes(spec.model.transformers, quantized_program(spec))
    vocabulary = artifact.manifest.model.vocab_size
    ids = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(5)).tolist()
    session = build.load(artifact)
    every = session.prefill(ids, logits="all")
    session.reset()
    last = session.prefill(ids[:-steps], logits="last")[0]
    decoded = np.stack([last, *(session.decode(token) for token in ids[-steps:])])
    session.close()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(expected).max() > 0.5, "logits too small to tell anything"
    return cosines(every, expected), cosines(decoded, expected[-steps - 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in FAMILIES if f.stem in JUMPING], ids=lambda f: f.stem)
def test_int4_artifact_with_the_same_rounding(file: Path, tmp_path: Path) -> None:
    """Against the program with the same rounding in torch.

    Against floats these random models differ by more than a wrong formula might (a cosine of 0.98 for Qwen3-Next).
    """
    spec = with_checkpoint(file, tmp_path / "model", {})
    artifact = build.compile(spec, out=tmp_path / "artifact")
    vocabulary = artifact.manifest.model.vocab_size
    ids = torch.randint(0, vocabulary, (1, 40), generator=torch.Generator().manual_seed(5))
    wanted = Interpreter(quantized_program(spec))(ids, torch.tensor([0]))[0].numpy()
    with build.load(artifact) as session:
        rows = [
            session.prefill(ids[0, :31].tolist(), logits="all"),
            *(session.decode(int(i))[None] for i in ids[0, 31:]),
        ]
    found = cosines(np.concatenate(rows), wanted)
    # sums of fp32 in another order take single codes to the next one: 1e-4 of a layer's product at most, and where two
    # experts are nearly as good, another expert
    assert np.median(found) > 0.9999
    assert (found > 0.999).mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in FAMILIES if f.stem not in JUMPING], ids=lambda f: f.stem)
def test_int4_artifact(file: Path, tmp_path: Path) -> None:
    spec = with_checkpoint(file, tmp_path / "model", {})
    prefill, decode = artifact_and_eager(spec, tmp_path)
    # INT8 activations are noise at some 40 dB: 1 - cosine near 1e-4 a layer. A routing flip of a random model, whose
    # scores lie close together, turns single tokens further
    for found in (prefill, decode):
        assert np.median(found) > 0.99
        assert (found > 0.99).mean() >= 0.9
        assert found.min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("file", FAMILIES, ids=lambda f: f.stem)
def test_int4_codes_without_rounding(file: Path, tmp_path: Path) -> None:
    spec = with_checkpoint(file, tmp_path / "model", EXACT)
    prefill, decode = artifact_and_eager(spec, tmp_path)
    # the same codes in fp32 arithmetic: what is left is the order of sums, 1e-6 of a logit
    assert min(prefill.min(), decode.min()) > 0.99999


@pytest.mark.slow
def test_a_shared_expert_of_width_zero(tmp_path: Path) -> None:
    """Qwen1.5-MoE's shape without what is shared: a gate and a linear of no inputs, which add nothing."""
    file = next(f for f in FAMILIES if f.stem == "qwen2-moe")
    spec = with_checkpoint(file, tmp_path / "model", EXACT, shared_expert_intermediate_size=0)
    prefill, decode = artifact_and_eager(spec, tmp_path)
    assert min(prefill.min(), decode.min()) > 0.99999  # as above


@pytest.mark.slow
def test_a_deeper_and_wider_one(tmp_path: Path) -> None:
    file = next(f for f in FAMILIES if f.stem == "mixtral")
    wider = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 96, "num_local_experts": 24}
    spec = with_checkpoint(file, tmp_path / "model", EXACT, **wider, num_experts_per_tok=5)
    prefill, decode = artifact_and_eager(spec, tmp_path)
    # as above; six layers add up rounding of 1e-6 each, and a near tie may choose another of 24 experts for a token
    assert min(np.median(prefill), np.median(decode)) > 0.99999
    assert min(prefill.min(), decode.min()) > 0.99
    # weights of unit gain, as training leaves them: those above amplify the INT8 noise of activations in every layer
    rounded = with_checkpoint(file, tmp_path / "rounded", {}, spread=128**-0.5, **wider, num_experts_per_tok=5)
    prefill, decode = artifact_and_eager(rounded, tmp_path / "rounded")
    assert min(np.median(prefill), np.median(decode)) > 0.99
