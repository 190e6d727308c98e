"""ONNX models of small handmade decoders against the operators' own eager reference, in every form a block can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs the onnx extra: pip install 'moec[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the onnx extra: pip install 'moec[onnx]'")

import onnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moec.compiler.errors import CompileError
from moec.compiler.ops import Experts, Routing
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.targets.onnx.lower import MODEL_FILE, build, lower
from moec.targets.onnx.options import Options
from moec.targets.onnx.session import OnnxSession
from tests.interpreter import Interpreter
from tests.targets import metal_models as models

Shape = models.Shape
SMALL = Shape(layers=1, width=32, heads=2, kv_heads=1, head=16, vocab=37, context=24, experts=5, top_k=2)
CUTS = (0, 5, 6, 7, 13, 14)  # a prompt, single tokens, a chunk
# The same sums in another order. Logits are of order one, sums of at most a hundred terms: 1e-6 is what they differ by,
# and a wrong formula is off by 1e-2. INT4 may be 1e-4 away relative to the largest logit, and is measured below 1e-5.
LIMIT = 1e-5


def session_of(program: Program, folder: Path, options: Options) -> OnnxSession:
    files = lower(program, folder, options, Progress(quiet=True))
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=options.flavour == "standard")
    info = program.info
    return OnnxSession(
        folder / MODEL_FILE,
        vocab_size=info.vocab_size,
        context=info.context,
        max_tokens=info.max_tokens,
        facts=files.facts,
        threads=1,
    )


def difference(shape: Shape, folder: Path, options: Options, seed: int = 0) -> float:
    """Largest difference of any logit, relative to the largest logit; the trace must be the routing's."""
    program = models.program_of(models.make_weights(shape, seed=seed))
    ids = torch.randint(0, shape.vocab, (1, CUTS[-1]), generator=torch.Generator().manual_seed(seed))
    eager = Interpreter(program)
    wanted = torch.cat([eager(ids[:, a:b], torch.tensor([a])) for a, b in pairwise(CUTS)], 1)[0].numpy()
    assert np.isfinite(wanted).all(), "the example overflows: it proves nothing"
    with session_of(program, folder, options) as session:
        session.trace(True)
        got = np.concatenate([session.prefill(ids[0, a:b].numpy(), "all") for a, b in pairwise(CUTS)])
        for trace in session.take_traces():
            assert trace.indices_TK.shape[1] == shape.top_k
            assert all(len(set(row)) == shape.top_k for row in trace.indices_TK.tolist())
            assert ((trace.indices_TK >= 0) & (trace.indices_TK < shape.experts)).all()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


FORMS = {
    "int4 in": {"layout": "out_in"},
    "int4 out": {"layout": "in_out"},
    "int8 in": {"layout": "out_in", "bits": 8},
    "int8 out": {"layout": "in_out", "bits": 8},
    "float": {"bits": 0, "layout": "out_in"},
    "float stacked": {"bits": 0},
    "two layers, window": {"layers": 2, "window": 5, "interleaved": False},
    "wide scales": {"scale_dtype": torch.float32},
    "everything": {"biases": True, "router_bias": True, "shared_gate": True, "layout": "out_in"},
    "no shared expert": {"shared_width": 0},
    "group of 16": {"group": 16, "expert_width": 48},
}


@pytest.mark.parametrize("name", FORMS)
def test_standard_forms(name: str, tmp_path: Path) -> None:
    assert difference(replace(SMALL, **FORMS[name]), tmp_path, Options()) < LIMIT


@pytest.mark.parametrize("name", ["int4 in", "two layers, window", "everything", "wide scales", "no shared expert"])
def test_ort_forms(name: str, tmp_path: Path) -> None:
    shape = replace(SMALL, **{**FORMS[name], "layout": "out_in"})
    assert difference(shape, tmp_path, Options(flavour="ort")) < LIMIT


@pytest.mark.parametrize(
    "experts", ["interleaved=true", "alpha=1.702,gate_max=0.5,up_min=-0.5,up_max=0.5,up_offset=1.0", ""]
)
def test_ort_swiglu(experts: str, tmp_path: Path) -> None:
    """QMoE's own SwiGLU: alternating rows as they are or re-laid out, a limit, an offset."""
    shape = replace(SMALL, layout="out_in", experts_text=experts, biases=True)
    assert difference(shape, tmp_path, Options(flavour="ort")) < LIMIT


REFUSED = {
    "along their output": {},
    "INT8": {"layout": "out_in", "bits": 8},
    "not quantized": {"bits": 0, "layout": "out_in"},
    "ungated": {"layout": "out_in", "experts_text": "gated=false,activation=relu2"},
    "clamps": {"layout": "out_in", "experts_text": "gate_max=0.5"},
    "on the experts' input": {"layout": "out_in", "routing": "apply=input"},
}


@pytest.mark.parametrize("fault", REFUSED)
def test_ort_limits_are_named_before_anything_is_written(fault: str, tmp_path: Path) -> None:
    program = models.program_of(models.make_weights(replace(SMALL, **REFUSED[fault])))
    with pytest.raises(CompileError, match=fault) as caught:
        lower(program, tmp_path, Options(flavour="ort"), Progress(quiet=True))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_int8_cache_is_the_spec_s(tmp_path: Path) -> None:
    """The same codes and scales as `cached_attention` stores, bit for bit; floats by option."""
    shape = replace(SMALL, int8_cache=True)
    program = models.program_of(models.make_weights(shape))
    ids = torch.randint(0, shape.vocab, (1, 9), generator=torch.Generator().manual_seed(1))
    eager = Interpreter(program)
    wanted = eager(ids, torch.tensor([0]))[0].numpy()
    session = session_of(program, tmp_path, Options())
    got = session.prefill(ids[0].numpy(), "all")
    caches = {n: v.numpy() for n, v in eager.state.items() if "cache" in n}
    for part, name in (("key", "k_cache"), ("value", "v_cache")):
        stored = session._past[f"0.{part}"].transpose(0, 2, 1, 3)
        steps = np.abs(stored.astype(int) - caches[f"layers_0_{name}"][:, :9])
        assert stored.dtype == np.int8
        assert steps.max() <= 1  # a sum in another order may cross a rounding boundary
        assert (steps == 0).mean() > 0.99
        scales = session._past[f"0.{part}_scale"].transpose(0, 2, 1)
        np.testing.assert_allclose(scales, caches[f"layers_0_{name}_scale"][:, :9], rtol=1e-5)
    # one INT8 step of a key or value in a hundred: far below what a float cache would differ by
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 1e-3
    plain = session_of(program, tmp_path, Options(kv_cache="fp32"))
    assert plain._past["0.key"].dtype == np.float32
    assert not any("scale" in name for name in plain._past)
    without_rounding = Interpreter(models.program_of(models.make_weights(replace(shape, int8_cache=False))))
    exact = without_rounding(ids, torch.tensor([0]))[0].numpy()
    assert np.abs(plain.prefill(ids[0].numpy(), "all") - exact).max() / np.abs(exact).max() < LIMIT


def routings() -> st.SearchStrategy[Routing]:
    floats = st.sampled_from([0.0, 1e-6, 0.1])

    def made(groups: int, draw: dict) -> Routing:  # type: ignore[type-arg]
        if draw["fill"] == "zero":  # among choices below zero, the zeros of several experts would tie
            draw = {**draw, "after_topk": False, "score": "sigmoid"}
        return Routing(groups=groups, keep=2 if groups else 0, **draw)

    fields = st.fixed_dictionaries(
        {
            "score": st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
            "after_topk": st.booleans(),
            "bias_on": st.sampled_from(["scores", "logits"]),
            "group_score": st.sampled_from(["max", "top2sum"]),
            "fill": st.sampled_from(["zero", "ninf"]),
            "normalize": st.sampled_from(["none", "sum"]),
            "eps": floats,
            "clamp_min": floats,
            "scale": st.sampled_from([1.0, 2.5]),
        }
    )
    near = st.builds(
        Routing, score=st.just("sparsemixer"), threshold=st.sampled_from([0.02, 0.6]),
        normalize=st.sampled_from(["none", "sum"]), scale=st.sampled_from([1.0, 2.5]),
    )  # fmt: skip
    return st.one_of(st.builds(made, st.sampled_from([0, 3]), fields), near)


def expert_forms() -> st.SearchStrategy[str]:
    def text(activation: str, gated: bool, interleaved: bool, clamped: bool, alpha: float, offset: float) -> str:
        limits = {"gate_min": -0.6, "gate_max": 0.7, "up_min": -0.5, "up_max": 0.4} if clamped else {}
        only = {"interleaved": interleaved, "up_offset": offset} if gated else {}
        return str(
            Experts(activation=activation, gated=gated, alpha=alpha if activation == "silu" else 1.0, **only, **limits)
        )

    return st.builds(
        text,
        st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "relu2"]),
        *(st.booleans() for _ in range(3)),
        st.sampled_from([1.0, 1.702]),
        st.sampled_from([0.0, 1.0]),
    )


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("onnx")


@settings(
    max_examples=8, deadline=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(how=routings(), what=expert_forms(), apply=st.sampled_from(["output", "input"]), layout=st.booleans(),
       bits=st.sampled_from([0, 4, 8]), biases=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_any_routing_and_experts(how, what, apply, layout, bits, biases, seed, fresh) -> None:  # type: ignore[no-untyped-def]
    """Every attribute of the fused node. Of six experts in three groups, two groups survive."""
    routing = str(replace(how, apply=apply))
    shape = replace(
        SMALL, experts=6, top_k=3, routing=routing, experts_text=what, bits=bits, biases=biases, router_bias=biases,
        layout="in_out" if layout else "out_in", shared_width=32,
    )  # fmt: skip
    assert difference(shape, fresh(), Options(), seed) < LIMIT


@settings(
    max_examples=5, deadline=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(how=routings(), seed=st.integers(0, 99))
def test_any_routing_by_qmoe(how, seed, fresh) -> None:  # type: ignore[no-untyped-def]
    shape = replace(SMALL, experts=6, top_k=3, routing=str(how), layout="out_in")
    assert difference(shape, fresh(), Options(flavour="ort"), seed) < LIMIT


def test_the_node_stays_a_function_and_weights_stay_int4() -> None:
    shape = replace(SMALL, layers=2)
    model, _ = build(models.program_of(models.make_weights(shape)), Options())
    calls = [n for n in model.graph.node if n.op_type == "FusedMoE"]
    assert [n.domain for n in calls] == ["moec", "moec"]
    assert len(model.functions) == 1  # one body for all layers of one form
    assert {d.domain for d in model.functions[0].opset_import} == {""}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in calls[0].attribute}
    assert attributes["top_k"] == 2
    assert Routing.parse(attributes["routing"].decode()) == Routing.parse(shape.routing)
    stored = {i.name: i for i in model.graph.initializer}
    expert = stored["layers_0_w13_codes.3"]
    assert expert.data_type == onnx.TensorProto.INT4
    assert list(expert.dims) == [32, 64]  # [in, out]: groups lie along axis 1, the output
    assert all(i.data_location == onnx.TensorProto.EXTERNAL for i in stored.values())


def test_a_table_is_stored_once_for_embedding_and_head(tmp_path: Path) -> None:
    program = models.program_of(models.make_weights(replace(SMALL, vocab=64)))
    for flavour in ("standard", "ort"):
        options = Options(flavour=flavour, kv_cache="fp32")
        ready = program if flavour == "standard" else models.program_of(
            models.make_weights(replace(SMALL, vocab=64, layout="out_in"))
        )  # fmt: skip
        files = lower(ready, tmp_path, options, Progress(quiet=True))
        assert files.sizes_by_role["embedding"] == 64 * 32 // 2 + 64 * 2  # codes, and float16 scales in groups of 32
