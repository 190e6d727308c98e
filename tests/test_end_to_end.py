"""Small specs through the whole pipeline: compiled, loaded and run, against the eager model with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moec.checkpoints import open_store, synthesize
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.program import Role
from moec.compiler.spec import Spec
from moec.compiler.target import find_target
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.simulate import Reference
from tests.variants import quick

COMMON = {
    "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab_size": 300, "context": 80, "qk_norm": True,
    "rope": {"theta": 10000.0, "interleaved": True},
}  # fmt: skip
MOE = {
    "architecture": "mobilemoe", "layers": 2, **COMMON,
    "moe": {"experts": 7, "top_k": 3, "expert_width": 32, "shared_width": 96, "scale": 2.5},
}  # fmt: skip
DENSE = {
    "architecture": "mobilellm", "layers": 2, **COMMON, "ffn_width": 96,
    "attention_window": {"size": 9, "every_nth_global": 2},
}  # fmt: skip
INT4 = {"weights": "int4", "group_size": 32}
OURS = {"attention": "moec", "ffn": "moec", "head": "moec"}
THEIRS = {"attention": "xnnpack", "ffn": "xnnpack", "head": "xnnpack"}
MAX_TOKENS = 16  # prompts of 50 tokens go through in chunks, the last one odd


def spec(model: dict, quantization: object, kernels: dict | None = None) -> Spec:
    options = {"max_tokens": MAX_TOKENS, "kernels": kernels or {}}
    return Spec.model_validate(
        {"name": "small", "model": model, "quantization": quantization, "targets": {"xnnpack": options}}
    )


def compiled(folder: Path, wanted: Spec, *, qat: bool = False) -> tuple[Artifact, Path]:
    checkpoint = synthesize(wanted, folder / "checkpoint", seed=11, qat=qat)
    return build.compile(wanted, checkpoint=checkpoint, out=folder / "artifact"), checkpoint


def ids(wanted: Spec, count: int = 50) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, wanted.model.vocab_size, (count,), generator=generator).tolist()


def logits_of(artifact: Artifact, prompt: list[int]) -> np.ndarray:
    """All logits in one prefill; the last-token method and single steps must give the same rows."""
    session = build.load(artifact)
    every = session.prefill(prompt, logits="all")
    session.reset()
    last = session.prefill(prompt[:-7], logits="last")[0]
    steps = np.stack([last, *(session.decode(token) for token in prompt[-7:])])
    session.close()
    if artifact.manifest.quantization == "none":
        # the order of fp32 sums of at most 96 terms differs for one row and for many, on logits of order 1
        np.testing.assert_allclose(steps, every[-8:], atol=2e-5, rtol=1e-4)
    else:  # that difference may tip the INT8 rounding of an activation, a step of 1/127 of its largest
        assert np.median(cosines(steps, every[-8:])) > 0.9999
    return every


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def eager_logits(wanted: Spec, checkpoint: Path, prompt: list[int]) -> np.ndarray:
    store = open_store(checkpoint, wanted.model)
    model = Decoder(wanted.model, dispatch="loop")
    model.load_state_dict({**model.state_dict(), **{n: w.load() for n, w in store.weights.items()}})
    with torch.no_grad():
        return model(torch.tensor([prompt]), torch.zeros(1, dtype=torch.long))[0].numpy()


FLOAT = [("moe auto", MOE, {}), ("moe ours", MOE, OURS), ("dense auto", DENSE, {}), ("dense ours", DENSE, OURS)]


@pytest.mark.parametrize(("name", "model", "kernels"), quick(FLOAT, ("moe auto",)), ids=[c[0] for c in FLOAT])
def test_the_float_artifact_is_the_eager_model(tmp_path: Path, name: str, model: dict, kernels: dict) -> None:
    wanted = spec(model, "none", kernels)
    artifact, checkpoint = compiled(tmp_path, wanted)
    prompt = ids(wanted)
    # the bound asked of the float path; what is left is the order of fp32 sums
    np.testing.assert_allclose(
        logits_of(artifact, prompt), eager_logits(wanted, checkpoint, prompt), atol=1e-5, rtol=1e-4
    )
    delegates = [m["delegates"] for m in artifact.manifest.details["methods"].values()]
    assert all(d == 0 for d in delegates) if kernels is OURS else all(d >= 4 for d in delegates)


ALIKE = {"weights": "int8", "group_size": 32}
INT8 = {**ALIKE, "group_size": 64, "experts": ALIKE, "shared": ALIKE, "attention": "int8", "embedding": "int8"}
QUANTIZED = [
    ("qat", MOE, INT4, {}, True),
    ("int4 along in", MOE, {**INT4, "expert_group_axis": "in"}, {}, False),
    ("int8", MOE, INT8, {}, False),
    ("fp32 arithmetic", MOE, {**INT4, "activations": "fp32", "kv_cache": "fp32"}, {}, True),
    ("float attention", MOE, {**INT4, "attention": "fp32"}, {}, False),
    ("delegated", MOE, INT4, THEIRS, True),
    ("dense", DENSE, INT4, {}, False),
    ("dense delegated", DENSE, INT4, THEIRS, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "scheme", "kernels", "qat"),
    quick(QUANTIZED, ("int4 along in", "delegated", "dense")),
    ids=[c[0] for c in QUANTIZED],
)
def test_the_quantized_artifact_computes_what_its_spec_says(
    tmp_path: Path, name: str, model: dict, scheme: dict, kernels: dict, qat: bool
) -> None:
    wanted = spec(model, scheme, kernels)
    artifact, checkpoint = compiled(tmp_path, wanted, qat=qat)
    roles = [Role(r) for r in artifact.manifest.details.get("asymmetric_roles", ())]
    assert bool(roles) == (kernels is THEIRS)
    store = open_store(checkpoint, wanted.model)
    integers = find_target("xnnpack").integer_attention
    reference = Reference(wanted.model, store, wanted.quantization, asymmetric_roles=roles, integer_attention=integers)
    prompt = ids(wanted)
    ours, theirs = logits_of(artifact, prompt), reference.forward(prompt).logits
    # the project's bound for quantized artifacts; single tokens may sit on a rounding edge of an activation
    assert np.median(cosines(ours, theirs)) > 0.9999
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.9


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    wanted = spec(MOE, INT4)
    artifact, _ = compiled(tmp_path, wanted, qat=True)
    table = 300 * 64
    blocks = -(-300 // 16) * 16 * 64  # rows are padded to blocks of 16
    assert table * 9 // 16 <= artifact.manifest.sizes_by_role["embedding"] <= blocks * 9 // 16
    assert "moec::embedding_packed.out" in artifact.manifest.details["operators"]


def test_tied_weights_of_the_delegate_are_reported(tmp_path: Path) -> None:
    artifact, _ = compiled(tmp_path, spec(MOE, INT4, {"attention": "xnnpack"}), qat=True)
    assert artifact.manifest.details["asymmetric_roles"] == ["attention"]
    assert any("BF16" in note for note in artifact.manifest.notes)
    assert artifact.manifest.sizes_by_role["xnnpack"] > 0
    assert "attention" not in artifact.manifest.sizes_by_role


def test_traces_name_every_layer(tmp_path: Path) -> None:
    artifact, _ = compiled(tmp_path, spec(MOE, INT4), qat=True)
    session = build.load(artifact)
    session.trace(True)
    session.prefill([1, 2, 3], logits="all")
    traces = session.take_traces()
    session.close()
    assert [t.layer for t in traces] == [0, 1] == list(range(len(artifact.manifest.model.moe_layers)))
    assert traces[0].indices_TK.shape == (3, 3)
