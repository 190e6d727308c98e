"""quantize_weights: what is stored is carried bit for bit, what is not is rounded once, and nothing stays in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.compiler.dialect import check_dialect
from moec.compiler.errors import CompileError
from moec.compiler.ops import CachedAttention, FusedMoeQ, LinearQ, find_call, linear_q
from moec.compiler.pipeline import run_passes
from moec.compiler.program import LazyWeight, Program, Role, Stage
from moec.compiler.quant import QuantizedTensor, quantize_weight
from moec.compiler.spec.quantization import Quantization
from moec.compiler.states import PER_TOKEN_AND_HEAD
from moec.compiler.weights import CodeFormat, StoredCodes
from moec.passes.pipelines import fusion
from moec.passes.quantize_weights import quantize_weights
from tests.harness import CALLS, VOCABULARY, check_golden, export_toy, run
from tests.interpreter import Interpreter
from tests.passes.moe_zoo import Linear, parameter
from tests.passes.test_fuse_attention import Attention as SmallAttention

D, FF, S, E, K = 32, 64, 32, 4, 2
ROLES = {
    "embed": Role.EMBEDDING,
    "dense.weight": Role.FFN,
    "router": Role.ROUTER,
    "w13": Role.EXPERT,
    "w2": Role.EXPERT,
    "mlp.gate_proj.weight": Role.SHARED,
    "mlp.up_proj.weight": Role.SHARED,
    "mlp.down_proj.weight": Role.SHARED,
    "shared_gate.weight": Role.SHARED,
}


class Toy(nn.Module):
    """A tied table, one dense linear, one MoE block with a gated shared expert. Widths fit groups of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = parameter(VOCABULARY, D), parameter(E, D)
        self.dense = Linear(D, D)
        self.w13, self.w2 = parameter(E, D, 2 * FF), parameter(E, FF, D)
        self.mlp = nn.ModuleDict({"gate_proj": Linear(D, S), "up_proj": Linear(D, S), "down_proj": Linear(S, D)})
        self.shared_gate = Linear(D, 1)

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = self.dense(F.embedding(tokens, self.embed))
        x = h.flatten(0, 1)
        scores = F.linear(x, self.router).sigmoid()
        weights, indices = scores.topk(K, -1)
        gate, up = torch.einsum("td,tkdf->tkf", x, self.w13[indices]).chunk(2, -1)
        y = torch.einsum("tkf,tkfd->tkd", F.silu(gate) * up, self.w2[indices])
        y = (y * weights.unsqueeze(-1)).sum(1)
        mlp = self.mlp
        shared = mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))
        return F.linear(h + (y + self.shared_gate(x).sigmoid() * shared).view_as(h), self.embed)


@pytest.fixture(scope="module")
def float_program() -> Program:
    return run_passes(export_toy(Toy, ROLES), fusion())


def scheme(**options: Any) -> Quantization:
    return Quantization.model_validate({"weights": "int4", "activations": "fp32", "kv_cache": "fp32", **options})


def quantized(program: Program, **options: Any) -> Program:
    done = run(quantize_weights(scheme(**options)), program).program
    check_dialect(done, after="quantize_weights")
    return done


def outputs(program: Program) -> list[Tensor]:
    interpreter = Interpreter(program)
    generator = torch.Generator().manual_seed(1)
    calls = [(torch.randint(0, VOCABULARY, (1, t), generator=generator), torch.tensor([s])) for t, s in CALLS]
    return [interpreter(*call) for call in calls]


def with_weights(program: Program, change: Callable[[str, LazyWeight], LazyWeight]) -> Program:
    return replace(program, weights={n: change(n, w) for n, w in program.weights.items()})


def rounded(bits: int, names: set[str], *, last: Mapping[str, str] | None = None) -> Callable[..., LazyWeight]:
    """Weights that carry the rounding of `bits` in float, grouped along their last dimension, or the one before."""

    def change(name: str, weight: LazyWeight) -> LazyWeight:
        if name not in names:
            return weight
        turn = (last or {}).get(name) == "other"

        def load() -> Tensor:
            w = weight.load().mT if turn else weight.load()
            w = quantize_weight(w, bits=bits, group_size=32).dequantize()
            return (w.mT if turn else w).contiguous()

        return LazyWeight(weight.shape, weight.dtype, load)

    return change


MATRICES = {"embed", "dense.weight", "w13", "w2", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_equals_float_arithmetic_on_rounded_weights(float_program: Program, bits: int, axis: str) -> None:
    """With fp32 activations the only rounding is Eq. 6 of the weights: then both programs are the same sums.

    atol 1e-5, rtol 1e-4: fp32 sums in another order.
    """
    done = quantized(float_program, weights=f"int{bits}", expert_group_axis=axis)
    turned = {"w13": "other", "w2": "other"} if axis == "in" else {}
    reference = with_weights(float_program, rounded(bits, MATRICES, last=turned))
    for wanted, got in zip(outputs(reference), outputs(done), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    moe = next(call for n in done.graph.nodes if (call := FusedMoeQ.find(n)) is not None)
    assert (moe.mlp.layout == "in_out") == (axis == "out")
    assert done.stage is Stage.QUANTIZED


def test_golden(float_program: Program) -> None:
    check_golden("quantize_weights", quantized(float_program, activations="int8").text())


def test_nothing_is_left_in_float_but_the_router(float_program: Program) -> None:
    done = quantized(float_program)
    matrices = {n for n, w in done.weights.items() if w.dtype == torch.float32 and len(w.shape) > 1}
    assert matrices == {"router", "shared_gate.weight"}
    assert done.roles["shared_gate.weight"] is Role.ROUTER


def test_the_tied_table_is_quantized_once(float_program: Program) -> None:
    done = quantized(float_program, embedding="int8")
    codes = [n for n in done.graph.nodes if n.op == "placeholder" and done.weights.get(done.weight_of(n) or "")]
    table = [n for n in codes if done.roles[str(done.weight_of(n))] is Role.EMBEDDING]
    assert len(table) == 2, "codes and scales, once"
    assert all(len(n.users) == 2 for n in table), "both are read by the embedding and by the head"


def test_a_second_run_changes_nothing(float_program: Program) -> None:
    done = quantized(float_program)
    again = run(quantize_weights(scheme()), done)
    assert again.changed == 0
    assert again.program.text() == done.text()


def _stored(names: set[str], *, bits: int = 4, group: int = 32) -> tuple[Callable[..., LazyWeight], dict[str, Any]]:
    """Weights held as codes that no rounding of floats gives: random ones, -8 included."""
    generator = torch.Generator().manual_seed(5)
    held: dict[str, QuantizedTensor] = {}

    def change(name: str, weight: LazyWeight) -> LazyWeight:
        if name not in names:
            return weight
        *lead, width = weight.shape
        kind, per = (torch.uint8, 2) if bits == 4 else (torch.int8, 1)
        low, high = (0, 256) if bits == 4 else (-128, 128)
        codes = torch.randint(low, high, (*lead, width // per), generator=generator).to(kind)
        scales = (0.01 + torch.rand((*lead, width // group), generator=generator)).to(torch.float16)
        tensor = held[name] = QuantizedTensor(codes, scales, bits, group)
        return LazyWeight(
            weight.shape, weight.dtype, tensor.dequantize, StoredCodes(CodeFormat(bits, group), lambda: tensor)
        )

    return change, held


@pytest.mark.parametrize("bits", [4, 8])
def test_stored_codes_are_carried_bit_for_bit(float_program: Program, bits: int) -> None:
    change, held = _stored({"embed", "dense.weight", "w13", "w2", "mlp.down_proj.weight"}, bits=bits)
    done = quantized(with_weights(float_program, change), weights=f"int{bits}")
    names = {
        "embed": "embed",
        "dense.weight": "dense.",
        "w13": "w13",
        "w2": "w2",
        "mlp.down_proj.weight": "mlp.down_proj.",
    }
    for name, stem in names.items():
        codes = next(w for n, w in done.weights.items() if n.startswith(stem) and n.endswith("qweight"))
        scales = next(w for n, w in done.weights.items() if n.startswith(stem) and n.endswith("scale"))
        assert torch.equal(codes.load(), held[name].codes)
        assert torch.equal(scales.load(), held[name].scales)
        assert (codes.dtype, scales.dtype) == (held[name].codes.dtype, torch.float16)


def test_every_quantized_weight_is_an_object(float_program: Program) -> None:
    """Names, orientation and origin are said, and the codes stand for the weight within half a step of Eq. 6."""
    change, held = _stored({"dense.weight"})
    done = quantized(with_weights(float_program, change), expert_group_axis="in")
    assert set(done.quantized) == MATRICES
    for name, weight in done.quantized.items():
        original = float_program.weights[name].load()
        assert all(t in done.weights for t in weight.tensors)
        assert weight.shape == tuple(original.shape)
        assert (weight.group_axis, weight.orientation) == ("in", "out_in")
        assert weight.transposed == (name in ("w13", "w2"))
        value = weight.dequantize(done.weights)
        if name == "dense.weight":
            assert str(weight.provenance) == "carried: checkpoint"
            assert torch.equal(value, held[name].dequantize())
        else:
            assert str(weight.provenance) == "computed: rtn"
            step = original.abs().max() / 7.5  # half a step, and the float16 scale is off by up to 2^-11 of |w|
            assert (value - original).abs().max() <= step * (0.5 + 2**-8)


@pytest.mark.parametrize(
    ("bits", "zeros", "message"), [(4, True, "INT4 codes with zero points"), (3, False, "INT3 codes")]
)
def test_formats_that_no_operator_reads_are_refused(
    float_program: Program, bits: int, zeros: bool, message: str
) -> None:
    """They can be represented, and are never rounded again without a word."""

    def change(name: str, weight: LazyWeight) -> LazyWeight:
        codes = StoredCodes(CodeFormat(bits, 32, zeros), lambda: pytest.fail("read"))
        return replace(weight, stored=codes) if name == "dense.weight" else weight

    with pytest.raises(CompileError, match=f"dense.weight: the checkpoint holds {message} in groups of 32"):
        quantized(with_weights(float_program, change))


def test_stored_gate_and_up_are_stacked_as_codes() -> None:
    change, held = _stored({"mlp.gate_proj.weight", "mlp.up_proj.weight"})
    done = quantized(run_passes(with_weights(export_toy(Toy, ROLES), change), fusion()))
    wanted = torch.cat([held["mlp.gate_proj.weight"].codes, held["mlp.up_proj.weight"].codes])
    assert torch.equal(done.weights["mlp.gate_up_proj.qweight"].load(), wanted)


def test_mixed_gate_and_up_are_refused() -> None:
    change, _ = _stored({"mlp.up_proj.weight"})
    done = quantized(run_passes(with_weights(export_toy(Toy, ROLES), change), fusion()))
    with pytest.raises(CompileError, match="only one of them is stored as codes"):
        done.weights["mlp.gate_up_proj.qweight"].load()


@pytest.mark.parametrize(
    ("options", "stored", "message"),
    [
        ({"weights": "int8"}, {"bits": 4}, "INT4 codes in groups of 32 along in, the spec asks for INT8"),
        ({"weights": "int4"}, {"bits": 8}, "INT8 codes"),
    ],
)
def test_other_stored_codes_are_never_rounded_again(
    float_program: Program, options: dict[str, Any], stored: dict[str, Any], message: str
) -> None:
    change, _ = _stored({"dense.weight"}, **stored)
    with pytest.raises(CompileError, match=message):
        quantized(with_weights(float_program, change), **options)


def test_stored_experts_of_the_other_axis_are_refused(float_program: Program) -> None:
    change, _ = _stored({"w13"})
    with pytest.raises(CompileError, match="along out, the spec asks for INT4 codes in groups of 32 along in"):
        quantized(with_weights(float_program, change), expert_group_axis="in")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "int8"}, "must be stored alike"),
        ({"shared": "fp32"}, "must be stored alike"),
        ({"group_size": 64}, "not a multiple of the group size 64"),
    ],
)
def test_unsupported_mixtures_are_refused(float_program: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        quantized(float_program, **options)


def test_fp32_roles_stay(float_program: Program) -> None:
    done = quantized(float_program, experts="fp32", shared="fp32", embedding="fp32")
    assert [n.target for n in done.graph.nodes if n.op == "call_function"].count(linear_q) == 1
    assert "moec.fused_moe.default" in done.text()


class _Odd(nn.Module):
    """A matrix of a known role that an operator without a quantized form reads."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.embed, self.odd = parameter(VOCABULARY, D), parameter(D, D)
        self.linear = linear

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        h = F.embedding(tokens, self.embed)
        return F.linear(h, self.odd) if self.linear else torch.einsum("btd,de->bte", h, self.odd)


def test_a_weight_no_rule_reaches_is_an_error() -> None:
    program = run_passes(export_toy(lambda: _Odd(False), {"embed": Role.EMBEDDING, "odd": Role.FFN}), fusion())
    with pytest.raises(CompileError, match="the ffn weight odd would stay in float"):
        quantized(program)


def test_a_weight_without_a_role_is_an_error() -> None:
    program = run_passes(export_toy(lambda: _Odd(True), {"embed": Role.EMBEDDING}), fusion())
    with pytest.raises(CompileError, match="the weight odd would stay in float: its role is not known"):
        quantized(program)


class _WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = parameter(VOCABULARY, 10)
        self.attention = SmallAttention()

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed)
        return x + self.attention(x, start_pos)


@pytest.mark.parametrize(
    ("activations", "axis", "linear", "experts"),
    [
        ("int8", "in", 0, 0),
        ("fp32", "in", 0, 0),
        ({}, "in", 32, 32),  # auto, the default: blocks where groups lie along the input
        ({}, "out", 32, 0),
        ({"bits": 8, "group": 32}, "out", 32, 32),
        ({"bits": 8, "group": "token"}, "in", 0, 0),
    ],
)
def test_blocks_of_activations_by_role(
    float_program: Program, activations: Any, axis: str, linear: int, experts: int
) -> None:
    done = quantized(float_program, activations=activations, expert_group_axis=axis)
    calls = [find_call(node) for node in done.graph.nodes]
    found = {type(call).__name__: call.activation_block for call in calls if isinstance(call, (LinearQ, FusedMoeQ))}
    assert found == {"LinearQ": linear, "FusedMoeQ": experts}


def test_int8_cache() -> None:
    """One scale per token and head: rounding 1/254 of each head's largest value. Cosine over 0.999 here."""
    roles = {"embed": Role.EMBEDDING, **{f"attention.{n}.weight": Role.ATTENTION for n in "qkvo"}}
    program = run_passes(export_toy(_WithCache, roles), fusion())
    done = quantized(program, weights="int8", kv_cache="int8", attention="fp32", embedding="fp32")
    assert all(call.coded for node in done.graph.nodes if (call := CachedAttention.find(node)) is not None)
    assert {state.codes for state in done.states.values()} == {PER_TOKEN_AND_HEAD}
    assert {w.dtype for n, w in done.weights.items() if n.endswith("cache")} == {torch.int8}
    assert {w.shape for n, w in done.weights.items() if n.endswith("cache_scale")} == {(1, 24, 2)}
    for wanted, got in zip(outputs(program), outputs(done), strict=True):
        assert torch.nn.functional.cosine_similarity(wanted, got, -1).min() > 0.999
        assert not torch.equal(wanted, got)
