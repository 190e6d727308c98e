"""Models of the transformers library for Metal, replayed, against the library's own logits.

Where attention is not fused (capped scores) it is lowered operator by operator, and the graph writes its caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")
pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")

import transformers

from moec.compiler.errors import CompileError
from moec.compiler.pipeline import Pass, run_passes
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.passes.pipelines import fusion
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_model import TransformersStore, export_transformers
from moec.targets.metal.lower import lower
from moec.targets.metal.options import Options
from moec.targets.metal.session import MetalSession
from tests.sources.test_transformers_families import COMMON, FAMILIES, _saved
from tests.targets.metal_models import legal

# fp32 sums in another order: at most 4e-6 was seen on logits up to 4; a wrong formula gives differences above 1e-2
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
# float16 has 11 bits: a thousandth of the largest logit a layer
HALF = 2e-2


@pytest.mark.slow  # test_metal_replay.py has their operators on small models
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family(name: str, tmp_path: Path) -> None:
    model_folder = tmp_path / "model"
    model_folder.mkdir()
    _saved(name, model_folder)
    exported = export_transformers(model_folder, "tiny", weights=TransformersStore(model_folder), max_tokens=16)
    program = legal(run_passes(exported, fusion()))
    ids = torch.randint(0, 96, (1, 23), generator=torch.Generator().manual_seed(5))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    ends = [0, 9, 10, 11, 23]
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        out.mkdir()
        files = lower(program, out, Options(dtype=dtype), Progress(quiet=True))
        facts = files.facts
        assert {m.delegates for m in facts.methods.values()} == {1}
        assert len(facts.methods["forward"].moe_taps) == FAMILIES[name][1]
        session = MetalSession(out / "model.pte", vocab_size=96, context=48, max_tokens=16, facts=facts)
        for _ in range(2):  # a second sequence: nothing of the first is seen
            session.reset()
            got = np.concatenate([session.prefill(ids[0, a:b].numpy(), "all") for a, b in itertools.pairwise(ends)])
            if dtype == "float32":
                np.testing.assert_allclose(got, wanted, **CLOSE)
            else:
                assert float(np.median(np.abs(got - wanted).max(-1))) < HALF * float(np.abs(wanted).max())


def capped(folder: Path) -> Program:
    """Gemma 2, whose scores go through tanh."""
    kinds = {"intermediate_size": 96, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 0.5}
    kinds["query_pre_attn_scalar"] = 1
    config = transformers.AutoConfig.for_model("gemma2", **{**COMMON, **kinds})
    config.save_pretrained(folder / "config")
    save_random(folder / "config", folder / "model", seed=3)
    weights = TransformersStore(folder / "model")
    return export_transformers(folder / "model", "capped", weights=weights, max_tokens=16)


def single() -> list[Pass]:
    return [p for p in fusion() if p.name != "fuse_attention"]


@pytest.mark.parametrize("passes", [fusion, pytest.param(single, marks=pytest.mark.slow)])
def test_capped_scores(passes: Callable[[], list[Pass]], tmp_path: Path) -> None:
    """One operator, and single ones."""
    program = legal(run_passes(capped(tmp_path), passes()))
    ids = torch.randint(0, 96, (1, 23), generator=torch.Generator().manual_seed(5))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[0].numpy()
    files = lower(program, tmp_path, Options(dtype="float32"), Progress(quiet=True))
    session = MetalSession(tmp_path / "model.pte", vocab_size=96, context=48, max_tokens=16, facts=files.facts)
    got = np.concatenate([session.prefill(ids[0, a:b].numpy(), "all") for a, b in itertools.pairwise([0, 9, 10, 23])])
    np.testing.assert_allclose(got, wanted, atol=1e-4 * float(np.abs(wanted).max()), rtol=0)


def test_a_cache_that_is_written_otherwise_is_refused(tmp_path: Path) -> None:
    program = run_passes(capped(tmp_path), single())
    edit = program.edit()
    write = next(n for n in edit.graph.nodes if n.target is torch.ops.aten.index_copy.default)
    write.target = torch.ops.aten.index_add.default
    with pytest.raises(
        CompileError, match=r"writes cache_k_0 in a way that was not recognised: by aten\.index_add"
    ) as e:
        lower(legal(edit.done()), tmp_path, Options(), Progress(quiet=True))
    assert e.value.remedy
