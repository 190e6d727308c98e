"""The graph runner against the eager model that the graph was exported from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.analysis.verify.interpret import GraphRunner, WeightCache
from moec.compiler.program import LazyWeight
from moec.compiler.source import NamedWeights
from moec.compiler.spec.model import Spec
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.export import export_decoder
from moec.sources.decoder.layout import weight_layout

CONFIG = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 97, "context": 40, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 6, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def model_and_program():
    torch.manual_seed(5)
    spec = Spec.model_validate({"name": "t", "model": CONFIG, "quantization": "none"})
    assert isinstance(spec.model, DecoderConfig)
    model = Decoder(spec.model, "loop").eval()
    weights = {}
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.2)
        weights[name] = LazyWeight(tuple(parameter.shape), torch.float32, lambda p=parameter: p.data)
    assert set(weights) == set(weight_layout(spec.model))
    return model, export_decoder(spec.model, "t", NamedWeights(weights), max_tokens=16)


def test_runs_prefill_and_decode_like_the_model(model_and_program):
    model, program = model_and_program
    runner = GraphRunner(program)
    tokens = torch.randint(0, 97, (13,), generator=torch.Generator().manual_seed(1)).tolist()
    for start, stop in ((0, 7), (7, 8), (8, 13)):
        expected = model(torch.tensor([tokens[start:stop]]), torch.tensor([start]))[0]
        actual = runner(tokens[start:stop], start)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    model.reset()


def test_reset_forgets_the_cache(model_and_program):
    _, program = model_and_program
    runner = GraphRunner(program)
    first = runner([1, 2, 3], 0)
    dirty = runner([4], 3)
    runner.reset()
    assert torch.equal(runner([1, 2, 3], 0), first)
    assert torch.equal(runner([4], 3), dirty)
    runner.reset()
    assert not torch.equal(runner([4], 3), dirty), "an empty cache must give another answer"


def test_no_weight_is_kept_beyond_the_budget(model_and_program):
    _, program = model_and_program
    loads: list[str] = []

    def counted(name: str, weight: LazyWeight) -> LazyWeight:
        def load() -> torch.Tensor:
            loads.append(name)
            return weight.load()

        return LazyWeight(weight.shape, weight.dtype, load)

    lazy = replace(program, weights={n: counted(n, w) for n, w in program.weights.items()})
    generous, tight = GraphRunner(lazy), GraphRunner(lazy, cache=WeightCache(0))
    assert torch.equal(generous([1, 2], 0), tight([1, 2], 0))
    before = len(loads)
    generous([3], 2)
    assert len(loads) == before, "within the budget nothing is loaded twice"
    tight([3], 2)
    assert len(loads) > before


def test_observer_and_overrides(model_and_program):
    _, program = model_and_program
    seen: list[str] = []
    logits = GraphRunner(program)([1, 2, 3], 0, observe=lambda node, args, value: seen.append(str(node.target)))
    assert any("topk" in target for target in seen)
    sigmoid = torch.ops.aten.sigmoid.default
    assert sigmoid in {n.target for n in program.graph.nodes}
    wrong = GraphRunner(program, overrides={sigmoid: lambda x: 1 - torch.sigmoid(x)})([1, 2, 3], 0)
    assert not torch.allclose(wrong, logits, atol=1e-3)


def test_the_least_recently_used_weight_goes_first():
    loads: list[str] = []

    def weight(name: str) -> LazyWeight:
        return LazyWeight((10,), torch.float32, lambda: loads.append(name) or torch.zeros(10))  # type: ignore[func-returns-value]

    a, b, c = weight("a"), weight("b"), weight("c")
    cache = WeightCache(80)
    for w in (a, b, a, c, a, b):
        cache.load(w)
    assert loads == ["a", "b", "c", "b"]
