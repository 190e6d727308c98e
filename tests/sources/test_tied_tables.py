"""Tables that a transformers config ties: one tensor in the graph, in the artifact and in what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.spec import Spec
from tests.sources import field_checkpoints as field
from tests.variants import quick

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)
VOCABULARY = 4000
TABLE = VOCABULARY * 64
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INT4 = {"weights": "int4", "group_size": 32, "expert_group_axis": "in"}
INT4_TABLE = TABLE // 2 + TABLE // 32 * 2


def model(folder: Path, *, tied: bool) -> Path:
    config = {**field.DENSE, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    field.healthy(folder, config)
    return folder


def compiled(folder: Path, out: Path, quantization: object) -> Artifact:
    spec = Spec.model_validate(
        {
            "name": "tied",
            "model": {"transformers": folder},
            "quantization": quantization,
            "targets": {"xnnpack": {"max_tokens": 32}},
        }
    )
    return build.compile(spec, out=out)


def tables(artifact: Artifact) -> int:
    return sum(size for role, size in artifact.manifest.sizes_by_role.items() if role in ("embedding", "head"))


@pytest.mark.parametrize(
    ("quantization", "one"),
    [(INT4, INT4_TABLE), pytest.param("none", TABLE * 4, marks=pytest.mark.slow)],
    ids=["int4", "float"],
)
def test_a_tied_table_is_stored_once(quantization: object, one: int, tmp_path: Path) -> None:
    tied = compiled(model(tmp_path / "tied", tied=True), tmp_path / "a", quantization)
    apart = compiled(model(tmp_path / "apart", tied=False), tmp_path / "b", quantization)
    assert tables(tied) == one
    assert tables(apart) == 2 * one
    # the rest is the same model: alignment and names of one tensor less are all that may differ
    assert abs(apart.bytes - tied.bytes - one) < 2048


def _untie(folder: Path, change: str) -> torch.nn.Module:
    from safetensors.torch import load_file

    tensors = load_file(folder / field.WEIGHTS)
    assert HEAD not in tensors
    table = tensors[EMBEDDING]
    if change == "only the head is stored":
        tensors = {n: t for n, t in tensors.items() if n != EMBEDDING} | {HEAD: table}
    if change == "both, equal":
        tensors[HEAD] = table.clone()
    if change == "both, different":
        tensors[HEAD] = table.flip(0)
    field.save(folder, tensors)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("change", "count"),
    quick(
        [("as saved", 1), ("only the head is stored", 1), ("both, equal", 1), ("both, different", 2)],
        ("both, equal", "both, different"),
    ),
)
def test_what_the_files_hold_decides(change: str, count: int, tmp_path: Path) -> None:
    """Logits equal transformers' own of the same folder; one table where they are one, two where they differ."""
    folder = model(tmp_path / "m", tied=True)
    theirs = _untie(folder, change)
    artifact = compiled(folder, tmp_path / "a", "none")
    assert tables(artifact) == count * TABLE * 4
    ids = list(range(3, 30))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    got = np.asarray(build.load(artifact).prefill(ids, logits="all"))
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)  # float32, another order of sums


@pytest.mark.parametrize(("change", "tied"), [("as saved", True), ("both, equal", True), ("both, different", False)])
def test_a_dense_decoder_has_the_head_of_the_files(change: str, tied: bool, tmp_path: Path) -> None:
    """Of a teacher, and of what is upcycled."""
    from moec.sources.dense_decoder import open_dense_decoder

    folder = tmp_path / "m"
    config = {**field.DENSE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    field.healthy(folder, {**config, "tie_word_embeddings": True})
    theirs = _untie(folder, change)
    found = open_dense_decoder(folder)
    assert found.config.tied_embeddings == tied
    weights = dict(found.weights())
    assert torch.equal(weights[EMBEDDING if tied else HEAD], theirs.get_output_embeddings().weight.detach())


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"eos_token_id": 500}, "eos_ids.0: token 500 is outside"), ({"num_key_value_heads": 3}, "must be a multiple")],
)
def test_a_dense_model_with_impossible_numbers_is_refused(changes: dict[str, int], says: str, tmp_path: Path) -> None:
    from moec.compiler.errors import CheckpointError
    from moec.sources.dense_decoder import open_dense_decoder

    config = {**field.DENSE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says) as caught:
        open_dense_decoder(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_plan_counts_it_once(tmp_path: Path) -> None:
    from moec.sources.transformers_architecture import architecture_of_transformers

    counts = []
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        config = {**field.DENSE, "vocab_size": VOCABULARY, "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
        found = architecture_of_transformers(folder, "m", None)
        counts.append(found.total_parameters)
    assert counts[1] - counts[0] == TABLE
