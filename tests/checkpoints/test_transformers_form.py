"""A mixture written for transformers: the logits of both, the way back through the compiler, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moec.checkpoints import spec_from_config
from moec.checkpoints.safetensors_file import read_header
from moec.compiler.build import open_checkpoint
from moec.compiler.pipeline import run_passes
from moec.compiler.spec import Spec, parse_spec
from moec.compiler.spec.quantization import Quantization
from moec.compiler.spec.sources import source_of
from moec.passes.pipelines import fusion
from moec.training.checkpoints import load_model, write_checkpoint
from moec.training.rounding import Rounding
from tests.conftest import Moec, refused
from tests.training.small import config_of, random_weights

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")

MODEL: dict[str, Any] = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 160, "context": 96, "norm_eps": 1e-5, "tied_embeddings": True, "qk_norm": False,
    "rope": {"theta": 500.0, "interleaved": False}, "bos_id": 0, "eos_ids": [1, 2],
}  # fmt: skip
SPLIT: dict[str, Any] = {"experts": 6, "top_k": 3, "expert_width": 32, "shared_width": 96, "scale": 3.0}
SCALING = {"factor": 4.0, "original_context": 32, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
OTHER: dict[str, Any] = {
    "tied_embeddings": False, "qk_norm": True, "rope": {"theta": 900.0, "interleaved": True, "scaling": SCALING},
    "moe": {"experts": 5, "top_k": 2, "expert_width": 32, "scale": 2.5, "normalize": False, "selection_bias": False},
}  # fmt: skip
FORMS = {
    "as upcycled": {"moe": SPLIT},
    "another rope, norms, no shared expert": OTHER,
    "a shared expert of two and a half experts": OTHER | {"moe": SPLIT | {"shared_width": 80}},
}
IDS = torch.randint(0, 160, (2, 60), generator=torch.Generator().manual_seed(3))


def checkpoint_of(form: dict[str, Any], folder: Path, rounding: Rounding | None = None) -> Path:
    config = config_of(MODEL, **form)
    write_checkpoint(folder, config, random_weights(config), tokenizer=None, rounding=rounding)
    return folder


def same_logits(folder: Path, exported: Path, form: dict[str, Any]) -> None:
    with torch.no_grad():
        (wanted,) = load_model(folder, config_of(MODEL, **form))(IDS)
        model = transformers.AutoModelForCausalLM.from_pretrained(exported)
        actual = model(IDS).logits
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert wanted.std() > 0.3
    # float32 sums of a hundred terms in another order, twice a layer; a wrong expert or angle changes tenths
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_transformers_computes_the_same_logits(form: dict[str, Any], tmp_path: Path, moec: Moec) -> None:
    folder = checkpoint_of(form, tmp_path / "trained")
    code, out, err = moec("checkpoint", "export", folder, "--out", tmp_path / "hf")
    assert (code, out) == (0, f"{tmp_path / 'hf'}\n"), err
    filled = 0 if form["moe"].get("shared_width") == 96 else 16 if "shared_width" in form["moe"] else 32
    assert (f"filled up with {filled} neurons of zeros" in err) == bool(filled)
    same_logits(folder, tmp_path / "hf", form)
    stored = read_header(tmp_path / "hf" / "model.safetensors")
    assert stored["model.layers.0.mlp.gate.weight"].dtype == "F32"
    assert stored["model.layers.1.mlp.experts.4.down_proj.weight"].dtype == "BF16"


def test_codes_are_written_as_floats(tmp_path: Path, moec: Moec) -> None:
    scheme = Quantization.model_validate({"weights": "int4", "group_size": 32, "expert_group_axis": "out"})
    folder = checkpoint_of({"moe": SPLIT}, tmp_path / "qat", Rounding(scheme))
    assert "floats that they stand for" in moec("checkpoint", "export", folder, "--out", tmp_path / "hf")[2]
    same_logits(folder, tmp_path / "hf", {"moe": SPLIT})


@pytest.mark.parametrize("form", list(FORMS.values())[:2], ids=list(FORMS)[:2])
def test_it_is_compiled_again_with_one_node_a_layer(form: dict[str, Any], tmp_path: Path, moec: Moec) -> None:
    folder = checkpoint_of(form, tmp_path / "trained")
    assert moec("checkpoint", "export", folder, "--out", tmp_path / "hf")[0] == 0
    spec: Spec = parse_spec(spec_from_config(tmp_path / "hf"))
    program = source_of(spec.model).export(spec, open_checkpoint(spec, None), max_tokens=32)
    fused = run_passes(program, fusion())
    assert sum(n.target is torch.ops.moec.fused_moe.default for n in fused.graph.nodes) == 2
    assert program.info.eos_ids == (1, 2)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"moe": SPLIT, "attention_window": {"size": 16, "every_nth_global": 2}}, "a window of 16 tokens"),
        ({"architecture": "mobilellm", "ffn_width": 96}, "the model is dense"),
        ({"moe": SPLIT | {"experts": 1, "top_k": 1}}, "it has one expert"),
    ],
)
def test_what_it_cannot_hold_is_refused(form: dict[str, Any], said: str, tmp_path: Path, moec: Moec) -> None:
    folder = checkpoint_of(form, tmp_path / "trained")
    refused(moec("checkpoint", "export", folder, "--out", tmp_path / "hf"), said)
    assert not (tmp_path / "hf").exists()


def test_other_folders_are_refused(tmp_path: Path, moec: Moec) -> None:
    folder = checkpoint_of({"moe": SPLIT}, tmp_path / "trained")
    assert moec("checkpoint", "export", folder, "--out", tmp_path / "hf")[0] == 0
    again = moec("checkpoint", "export", tmp_path / "hf", "--out", tmp_path / "twice")
    refused(again, "is a 'glm4_moe' of transformers already")
    refused(moec("checkpoint", "export", tmp_path / "no", "--out", tmp_path / "x"), "no such checkpoint folder")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])
    refused(moec("checkpoint", "export", folder, "--out", tmp_path / "damaged"))
    assert not (tmp_path / "damaged").exists()
