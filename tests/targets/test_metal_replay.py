"""The Metal target on handmade decoders: what the emitted file computes, executed by MLX, against eager fp32.

Tolerance 1e-5 absolute on logits of a few units: the same fp32 sums in another order over two layers (measured 2e-6 to
6e-6). A wrong instruction, code or scale changes logits by 1e-2 and more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")

from moec.compiler.errors import CompileError, RunError
from moec.compiler.ops import Experts, Routing
from moec.compiler.ops.moe_math import route
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.targets.metal.encode import unpack_codes
from moec.targets.metal.lower import lower
from moec.targets.metal.options import Options
from moec.targets.metal.session import MetalSession
from tests.interpreter import Interpreter
from tests.targets.metal_models import Shape, Weights, legal, make_weights, program_of
from tests.variants import quick

ATOL = 1e-5

VARIANTS = {
    "int4 grouped along out": Shape(),
    "int4 grouped along in": Shape(layout="out_in"),
    "int8": Shape(bits=8),
    "float, in_out": Shape(bits=0),
    "float, out_in": Shape(bits=0, layout="out_in"),
    "group 256 in finer groups": Shape(
        layers=1, width=256, expert_width=256, shared_width=256, heads=4, head=64, group=256, layout="out_in"
    ),
    "sliding window": Shape(window=7),
    "int8 cache": Shape(int8_cache=True),
    "int8 cache and window": Shape(int8_cache=True, window=3),
    "rotary halves, no shared expert": Shape(interleaved=False, shared_width=0),
    "clamped, interleaved, biased": Shape(
        layout="out_in",
        experts_text="interleaved=true,alpha=1.702,gate_max=7.0,up_min=-7.0,up_max=7.0,up_offset=1.0",
        routing="after_topk=true",
        biases=True,
        router_bias=True,
    ),
    "best groups": Shape(
        routing="score=sigmoid,groups=5,keep=2,group_score=top2sum,fill=zero,normalize=sum,eps=1e-20,scale=2.5"
    ),
    "weights on the input, gated shared expert": Shape(
        routing="score=sqrtsoftplus,normalize=sum,clamp_min=0.001,apply=input", shared_gate=True
    ),
    "sparsemixer": Shape(routing="score=sparsemixer,scale=1.5,threshold=0.6", router_bias=True),
    "ungated relu2": Shape(experts_text="gated=false,activation=relu2"),
    "gelu": Shape(experts_text="activation=gelu_tanh"),
}
FAST = (  # each option once; the others are between two of these
    "float, in_out",
    "int4 grouped along out",
    "int8 cache and window",
    "rotary halves, no shared expert",
    "clamped, interleaved, biased",
    "best groups",
    "weights on the input, gated shared expert",
    "sparsemixer",
)


class Case:
    """A handmade model, lowered, with both ways to run it."""

    def __init__(self, shape: Shape, out: Path, **options: Any) -> None:
        self.shape = shape
        self.weights: Weights = make_weights(shape)
        self.program: Program = program_of(self.weights)
        self.out = out
        self.lowered = lower(self.program, out, Options(**{"dtype": "float32", **options}), Progress(quiet=True))

    def session(self, **kwargs: Any) -> MetalSession:
        return MetalSession(
            self.out / "model.pte",
            vocab_size=self.shape.vocab,
            context=self.shape.context,
            max_tokens=self.program.info.max_tokens,
            facts=self.lowered.facts,
            **kwargs,
        )

    def eager(self, ids: np.ndarray, cuts: tuple[int, ...] = ()) -> np.ndarray:
        model = Interpreter(self.program)
        edges = [0, *cuts, len(ids)]
        parts = [model(torch.from_numpy(ids[a:b])[None], torch.tensor([a])) for a, b in itertools.pairwise(edges)]
        return torch.cat(parts, 1)[0].numpy()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[tuple[Any, ...], Case] = {}

    def get(shape: Shape, **options: Any) -> Case:
        key = (shape, *sorted(options.items()))
        if key not in made:
            made[key] = Case(shape, tmp_path_factory.mktemp("metal"), **options)
        return made[key]

    return get


def tokens(count: int, seed: int = 1, vocab: int = 101) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count)


@pytest.mark.parametrize("name", quick(VARIANTS, FAST))
def test_prefill_and_decode_equal_eager(case: Callable[..., Case], name: str) -> None:
    c = case(VARIANTS[name])
    ids = tokens(45)  # two chunks (32 and 8), then five single tokens: sorted and unsorted experts, a filled cache
    expected = c.eager(ids, (32, 40, 41, 42, 43, 44))
    with c.session() as session:
        got = [session.prefill(ids[:40], "all")] + [session.decode(int(i))[None] for i in ids[40:]]
        assert session.position == 45
    # a cache rounds: where fp32 noise moves an element across a rounding boundary, one key or value element changes by
    # 1/127 of its row's peak, and the logits of the tokens that see it by some 1e-3
    atol = 5e-3 if c.shape.int8_cache else ATOL
    np.testing.assert_allclose(np.concatenate(got), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 21, 22, 31, 32, 33, 65])
def test_any_token_count_on_both_sides_of_the_sort(case: Callable[..., Case], count: int) -> None:
    c = case(Shape())  # top 3: 21 tokens are 63 pairs, 22 are 66
    ids = tokens(count, seed=count)
    expected = c.eager(ids)
    with c.session() as session:
        every = session.prefill(ids, "all")
        session.reset()
        last = session.prefill(ids, "last")
    np.testing.assert_allclose(every, expected, atol=ATOL, rtol=0)
    np.testing.assert_allclose(last, expected[-1:], atol=ATOL, rtol=0)


def test_a_cache_of_one_method_serves_the_other(case: Callable[..., Case]) -> None:
    c = case(Shape())
    ids = tokens(20)
    with c.session() as session:
        session.prefill(ids[:9], "all")
        session.prefill(ids[9:15])
        rest = session.prefill(ids[15:], "all")
    np.testing.assert_allclose(rest, c.eager(ids)[15:], atol=ATOL, rtol=0)


def test_reset_leaves_nothing_behind(case: Callable[..., Case]) -> None:
    c = case(Shape(window=7))
    with c.session() as session:
        fresh = session.prefill(tokens(11, seed=3), "all")
        session.prefill(tokens(50, seed=4))
        session.reset()
        assert session.position == 0
        np.testing.assert_array_equal(session.prefill(tokens(11, seed=3), "all"), fresh)


def test_codes_and_scales_are_stored_bit_for_bit(case: Callable[..., Case]) -> None:
    from moec.targets.metal.payload import PteFile

    for shape in (Shape(), Shape(layout="out_in"), Shape(bits=8)):
        c = case(shape)
        data = PteFile(c.out / "model.pte").data
        for name, codes in c.weights.values.items():
            if name.endswith("_codes"):
                words = torch.frombuffer(bytearray(data[f"{name}@codes.uint32"]), dtype=torch.int32).view(torch.uint32)
                assert torch.equal(unpack_codes(words, shape.bits).view(codes.dtype).reshape(codes.shape), codes), name
                scales = c.weights.values[name.replace("_codes", "_scales")]
                stored = bytes(data[f"{name.replace('_codes', '_scales')}@scales.float16"])
                assert stored == scales.numpy().tobytes(), name


def test_a_tied_table_is_stored_once(case: Callable[..., Case]) -> None:
    c = case(Shape())
    table = c.weights.values["embed_codes"].nbytes + c.weights.values["embed_scales"].nbytes
    assert c.lowered.sizes_by_role["embedding"] == table


def test_traces_show_what_the_router_did(case: Callable[..., Case]) -> None:
    c = case(Shape(router_bias=True, routing="score=sigmoid,normalize=sum,scale=2.5"))
    s = c.shape
    with c.session() as session:
        session.trace(True)
        session.prefill(tokens(40))
        session.decode(5)
        traces = session.take_traces()
        assert session.take_traces() == []
    assert [t.layer for t in traces] == [0, 1, 0, 1]
    assert [len(t.x_TD) for t in traces] == [40, 40, 1, 1]
    for t in traces:
        w = {k: c.weights.values[f"layers_{t.layer}_{k}"] for k in ("router", "router_bias", "bias")}
        indices, weights = route(
            torch.from_numpy(t.x_TD), w["router"], w["router_bias"], w["bias"], s.top_k, Routing.parse(s.routing)
        )
        assert np.array_equal(np.sort(t.indices_TK), np.sort(indices.numpy()))
        # the router alone, from the recorded input: one dot product of 64 in fp32
        np.testing.assert_allclose(t.weights_TK.sum(-1), 2.5, atol=1e-5)
        order = np.argsort(t.indices_TK, -1), np.argsort(indices.numpy(), -1)
        np.testing.assert_allclose(
            np.take_along_axis(t.weights_TK, order[0], -1),
            np.take_along_axis(weights.numpy(), order[1], -1),
            atol=1e-5,
        )
        assert t.y_TD.shape == t.x_TD.shape


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 2e-2), ("float32", ATOL)])
def test_sixteen_bits_and_the_float32_twin(case: Callable[..., Case], dtype: str, atol: float) -> None:
    """The twin differs from eager only by what the file stores in 16 bits: the norms (relative 5e-4, five norms deep,
    logits of a few units). The 16-bit run adds the rounding of each activation."""
    shape = Shape(experts=4, top_k=4)  # every expert is always selected: rounding cannot change the selection
    c = case(shape, dtype=dtype)
    ids = tokens(30)
    expected = c.eager(ids)
    with c.session() as own, c.session(wide=True) as twin:
        own_error = np.abs(own.prefill(ids, "all") - expected).max()
        twin_error = np.abs(twin.prefill(ids, "all") - expected).max()
    assert own_error <= atol
    assert twin_error <= (5e-3 if dtype == "float16" else ATOL)
    assert twin_error <= own_error


def test_rounding_scales_needs_permission(tmp_path: Path) -> None:
    c_shape = Shape(layers=1)
    program = program_of(make_weights(c_shape))
    with pytest.raises(CompileError, match=r"bfloat16 cannot hold the scales of .*dB.*allow_requantization"):
        lower(program, tmp_path, Options(dtype="bfloat16"), Progress(quiet=True))
    lowered = lower(program, tmp_path, Options(dtype="bfloat16", allow_requantization=True), Progress(quiet=True))
    losses = lowered.facts.requantized_sqnr_db
    # bfloat16 keeps 8 bits of a scale: relative error up to 2^-9, uniform: 10 log10(3 * 2^18) = 59 dB, less the spread
    assert losses
    assert all(50 < loss < 65 for loss in losses.values())


def test_scales_in_fp32_that_fit_are_not_a_loss(tmp_path: Path) -> None:
    shape = Shape(layers=1, scale_dtype=torch.float32)
    weights = make_weights(shape)
    with pytest.raises(CompileError, match="float16 cannot hold"):
        lower(program_of(weights), tmp_path, Options(dtype="float16"), Progress(quiet=True))
    for name, value in weights.values.items():
        if name.endswith("_scales"):
            weights.values[name] = value.half().float()
    lowered = lower(program_of(weights), tmp_path, Options(dtype="float16"), Progress(quiet=True))
    assert lowered.facts.requantized_sqnr_db == {}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "empty"),
        ([0, 101], "101 is not in the vocabulary"),
        ([-1], "-1 is not in the vocabulary"),
        ([0] * 97, "97 tokens do not fit"),
        ([[1, 2]], "list of integers"),
        ([0.5], "list of integers"),
    ],
)
def test_requests_that_cannot_be_served(case: Callable[..., Case], ids: Any, said: str) -> None:
    with case(Shape()).session() as session:
        with pytest.raises(RunError, match=said):
            session.prefill(ids)
        assert session.position == 0
    with pytest.raises(RunError, match="closed"):
        session.prefill([1])


def test_an_operator_without_lowering_is_named(tmp_path: Path) -> None:
    program = program_of(make_weights(Shape(layers=1)))
    edit = program.edit()
    node = next(n for n in edit.graph.nodes if n.target is torch.ops.aten.add.Tensor and n.meta["val"].dim() == 3)
    node.target = torch.ops.aten.lgamma.default
    node.args = node.args[:1]
    with pytest.raises(CompileError, match=r"aten\.lgamma\.default.*no Metal lowering"):
        lower(legal(edit.done()), tmp_path, Options(dtype="float32"), Progress(quiet=True))


def test_a_group_size_mlx_does_not_have(tmp_path: Path) -> None:
    shape = replace(Shape(layers=1), group=16)
    with pytest.raises(CompileError, match="groups of 16 cannot be expressed on Metal"):
        lower(program_of(make_weights(shape)), tmp_path, Options(), Progress(quiet=True))


def test_one_delegate_a_method_and_facts(case: Callable[..., Case]) -> None:
    facts = case(Shape()).lowered.facts
    assert {name: m.delegates for name, m in facts.methods.items()} == {"forward": 1, "forward_all": 1}
    counts = facts.methods["forward"].instructions
    layers = 2
    # two gathered products a layer, in each of the two branches
    assert counts["GatherQmmNode"] == layers * 2 * 2
    assert counts["IfNode"] == layers
    assert counts["SdpaNode"] == layers
    assert facts.computes == {"activations": "fp32"}
    assert facts.unchecked_without_apple_hardware


def test_the_experts_attribute_text_is_the_operators(case: Callable[..., Case]) -> None:
    """The handmade models and the lowering read the same canonical text."""
    for shape in VARIANTS.values():
        assert Experts.parse(str(shape.what)) == shape.what
        assert str(Routing.parse(shape.routing)) == shape.routing
