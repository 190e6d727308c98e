"""Models of the transformers library as ONNX, against the library's own logits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs the onnx extra: pip install 'moec[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the onnx extra: pip install 'moec[onnx]'")
pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")

import transformers

from moec.compiler.build import unfused_attention
from moec.compiler.errors import CompileError
from moec.compiler.pipeline import PipelineLog, run_passes
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.passes.pipelines import fusion
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_model import TransformersStore, export_transformers
from moec.targets.onnx.lower import lower
from moec.targets.onnx.options import Options
from moec.targets.onnx.session import OnnxSession
from tests.sources.test_transformers_families import COMMON, FAMILIES, _saved
from tests.variants import quick

CAPPED = {"intermediate_size": 96, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 0.5}
CAPPED["query_pre_attn_scalar"] = 1
# fp32 sums in another order: at most 4e-6 was seen on logits up to 4; a wrong formula gives differences above 1e-2
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def program_of(folder: Path) -> Program:
    exported = export_transformers(folder, "tiny", weights=TransformersStore(folder), max_tokens=16)
    return run_passes(exported, fusion())


@pytest.mark.parametrize("name", quick(sorted(FAMILIES), ("deepseek_v3", "gpt_oss", "qwen2_moe", "phimoe")))
def test_family(name: str, tmp_path: Path) -> None:
    model_folder = tmp_path / "model"
    model_folder.mkdir()
    program = program_of(_saved(name, model_folder))
    files = lower(program, tmp_path, Options(), Progress(quiet=True))
    assert len(files.facts.moe_taps) == FAMILIES[name][1]
    ids = torch.randint(0, 96, (1, 23), generator=torch.Generator().manual_seed(5))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    session = OnnxSession(
        tmp_path / "model.onnx", vocab_size=96, context=48, max_tokens=16, facts=files.facts, threads=1
    )
    ends = [0, 9, 10, 11, 23]
    got = np.concatenate([session.prefill(ids[0, a:b].numpy(), "all") for a, b in itertools.pairwise(ends)])
    np.testing.assert_allclose(got, wanted, **CLOSE)


def test_capped_scores(tmp_path: Path) -> None:
    """Gemma 2: scores go through tanh before the softmax."""
    config = transformers.AutoConfig.for_model("gemma2", **{**COMMON, **CAPPED})
    config.save_pretrained(tmp_path / "config")
    folder = save_random(tmp_path / "config", tmp_path / "model", seed=3)
    files = lower(program_of(folder), tmp_path, Options(), Progress(quiet=True))
    ids = torch.randint(0, 96, (1, 23), generator=torch.Generator().manual_seed(5))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[0].numpy()
    file = tmp_path / "model.onnx"
    session = OnnxSession(file, vocab_size=96, context=48, max_tokens=16, facts=files.facts, threads=1)
    got = np.concatenate([session.prefill(ids[0, a:b].numpy(), "all") for a, b in itertools.pairwise([0, 9, 10, 23])])
    np.testing.assert_allclose(got, wanted, atol=1e-4 * float(np.abs(wanted).max()), rtol=0)


def test_attention_that_was_not_fused_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores go through an arctangent before the softmax. Where it compiles, the manifest says so once."""
    monkeypatch.setattr(torch, "tanh", torch.atan)
    config = transformers.AutoConfig.for_model("gemma2", **{**COMMON, **CAPPED})
    config.save_pretrained(tmp_path / "config")
    exported = export_transformers(tmp_path / "config", "capped", max_tokens=16)
    log = PipelineLog()
    program = run_passes(exported, fusion(), log=log)
    (note,) = unfused_attention(log)
    assert "not fused in 2 layers, of which the first is model.model.layers.0.self_attn: the scores are not" in note
    with pytest.raises(CompileError, match="outside an attention block") as caught:
        lower(program, tmp_path / "out", Options(), Progress(quiet=True))
    assert caught.value.remedy
