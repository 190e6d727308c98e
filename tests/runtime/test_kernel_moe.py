"""The fused mixture-of-experts kernel against the operators' definition, on every instruction set of this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from moec.compiler.ops.attributes import ACTIVATIONS, Experts, Routing
from moec.runtime import kernel_api
from moec.runtime.moe_config import Config, Kind, Params, WeightFormat
from tests.runtime.kernel_cases import LEVELS, Block, instruction_sets, random_block
from tests.variants import crossed, few

INT4_IN = WeightFormat(Kind.INT4, 32, int8_activations=True)
INT4_OUT = WeightFormat(Kind.INT4, 32, axis_out=True, int8_activations=True)
FORMATS = [
    WeightFormat(kind, group, axis_out, int8)
    for kind in (Kind.INT4, Kind.INT8, Kind.IQ4_NL, Kind.FP4, Kind.NL3)
    for group in (32, 64)
    for axis_out in (False, True)
    for int8 in (True, False)
] + [WeightFormat()]
FORMATS += [replace(fmt, block_activations=True) for fmt in FORMATS if fmt.int8_activations]
MOBILEMOE = Routing(score="sigmoid", normalize="sum", scale=2.5)


@pytest.fixture(autouse=True)
def _defaults_afterwards() -> Iterator[None]:
    kernel_api.use_own_pool()
    yield
    kernel_api.set_trace(None)
    kernel_api.set_isa("auto")
    kernel_api.set_threads(1)


def _error(y: np.ndarray, reference: np.ndarray) -> float:
    """Largest error relative to the size of the token's output."""
    return float((np.abs(y - reference).max(1) / np.abs(reference).max(1)).max()) if y.size else 0.0


def _everywhere(block: Block, x: np.ndarray, router_input: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """(y, indices, weights), having shown that every instruction set and thread count gives the same bits."""
    results = []
    for isa in kernel_api.available_isas():
        kernel_api.set_isa(isa)
        for threads in (1, 2, 5):
            kernel_api.set_threads(threads)
            results.append(block.prepared(x, router_input))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert np.array_equal(a, b)
    return results[0]


def _equal_to_scalar(block: Block, x: np.ndarray, isa: str) -> tuple[np.ndarray, ...]:
    """The scalar kernels' outputs, indices and weights, which those of `isa` equal bit for bit."""
    kernel_api.set_isa("scalar")
    expected = block.prepared(x)
    kernel_api.set_isa(isa)
    for a, b in zip(expected, block.prepared(x), strict=True):
        assert np.array_equal(a, b)
    return expected


def _check(block: Block, x: np.ndarray, tolerance: float, router_input: np.ndarray | None = None) -> None:
    y, indices, weights = _everywhere(block, x, router_input)
    assert _error(y, block.reference(x, indices, weights)) < tolerance


# Both sides round the same activations to INT8 where they agree on them to the last bit. The hidden is computed in fp32
# with sums in different orders, so that about one value in 10,000 falls to the other side of a rounding boundary: one
# step of 1/127 of the row's maximum in one of `width` products. 2e-3 of the output's maximum holds for widths above 32
# here; a wrong scale, nibble or row shows as an error near 1.
ROUNDED = 2e-3
# Levels are 1 to 127, INT4 codes 1 to 8: one such step times a large level was 0.0059 (one token of 40). That
# levels give the bits of INT8 codes is tested exactly (test_kernel_levels.py).
LEVELS_ROUNDED = 8e-3
# fp32 arithmetic in another order, sums of at most a few hundred terms.
FLOAT = 2e-5


def _limit(fmt: WeightFormat) -> float:
    if not fmt.int8_activations:
        return FLOAT
    return LEVELS_ROUNDED if fmt.kind in LEVELS else ROUNDED


@pytest.mark.parametrize(("fmt", "tokens"), crossed(FORMATS, (1, 3, 40)))
def test_every_format_matches_the_definition(fmt: WeightFormat, tokens: int) -> None:
    rng = np.random.default_rng(fmt.encode() + tokens)
    shared = None if fmt.axis_out else fmt
    if fmt.axis_out:
        shared = replace(fmt, axis_out=False)
    block = random_block(
        rng,
        experts=7,
        d=192,
        width=128,
        top_k=3,
        routed=fmt,
        shared_width=256,
        shared=shared,
        how=MOBILEMOE,
        selection_bias=True,
    )
    _check(block, rng.standard_normal((tokens, 192), dtype=np.float32), _limit(fmt))


@pytest.mark.parametrize("seed", few(range(24), 12))
def test_random_blocks(seed: int) -> None:
    """Odd sizes and any mix of attributes: what the format allows to be odd is."""
    rng = np.random.default_rng(seed)
    fmt = FORMATS[int(rng.integers(len(FORMATS)))]
    step = fmt.group_size or 1
    low = 1 if step > 1 else 20
    d, width = step * int(rng.integers(low, low + 4)), step * int(rng.integers(low, low + 4))
    gated = bool(rng.integers(4))
    experts = int(rng.integers(1, 20))
    top_k = int(rng.integers(1, min(experts, 6) + 1))
    what = Experts(
        activation=str(rng.choice(ACTIVATIONS)),
        gated=gated,
        interleaved=gated and bool(rng.integers(2)),
        gate_max=float(rng.choice([np.inf, 2.0])),
        up_min=float(rng.choice([-np.inf, -1.5])),
        up_offset=float(rng.integers(2)),
    )
    how = Routing(
        score=str(rng.choice(["softmax", "sigmoid", "sqrtsoftplus"])),
        after_topk=bool(rng.integers(2)),
        normalize=str(rng.choice(["none", "sum"])),
        scale=float(rng.uniform(0.5, 2)),
        apply=str(rng.choice(["output", "input"])),
        bias_on=str(rng.choice(["scores", "logits"])),
    )
    shared = replace(fmt, kind=Kind.INT8, axis_out=False) if step > 1 else WeightFormat()
    if fmt.int8_activations and seed % 3 == 0:  # routed and shared may differ
        shared = replace(shared, block_activations=not fmt.block_activations)
    block = random_block(
        rng,
        experts=experts,
        d=d,
        width=width,
        top_k=top_k,
        routed=fmt,
        shared=shared,
        shared_width=(step if step > 1 else 33) * int(rng.integers(0, 3)),
        how=how,
        what=what,
        router_bias=bool(rng.integers(2)),
        selection_bias=bool(rng.integers(2)),
        biases=bool(rng.integers(2)),
        shared_gate=False,
    )
    x = rng.standard_normal((int(rng.integers(1, 60)), d), dtype=np.float32)
    # narrow hidden rows (32) feel one flipped rounding more: see ROUNDED
    _check(block, x, 2.5 * _limit(fmt) if fmt.int8_activations else FLOAT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_full_precision(activation: str) -> None:
    """Both ways through, large arguments included; f32 weights, so that nothing hides an inexact function."""
    rng = np.random.default_rng(11)
    for gated, tokens in itertools.product((True, False), (2, 30)):
        what = Experts(activation=activation, gated=gated, alpha=1.702 if activation == "silu" else 1.0)
        block = random_block(rng, experts=3, d=50, width=37, top_k=2, routed=WeightFormat(), what=what)
        # erf is good to 5e-7 absolute, exp to 2e-7 relative; times sums of 50 terms
        _check(block, rng.standard_normal((tokens, 50), dtype=np.float32) * np.float32(8), FLOAT)


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_shared_gate_and_separate_router_input(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    block = random_block(
        rng, experts=6, d=96, width=64, top_k=2, routed=INT4_OUT, shared=INT4_IN, shared_width=96, shared_gate=True
    )
    x, router_input = (rng.standard_normal((tokens, 96), dtype=np.float32) for _ in range(2))
    _check(block, x, ROUNDED, router_input)
    indices = block.prepared(x, router_input)[1]
    assert np.array_equal(np.sort(indices), np.sort(block.route(router_input)[0].numpy()))


ROUTINGS = [
    Routing(**options)  # type: ignore[arg-type]
    for options in (
        {"score": "softmax"},
        {"score": "softmax", "normalize": "sum"},
        {"score": "softmax", "after_topk": True},
        {"score": "sigmoid", "normalize": "sum", "scale": 2.5},
        {"score": "sigmoid", "bias_on": "logits", "normalize": "sum", "eps": 1e-20},
        {"score": "sigmoid", "normalize": "sum", "clamp_min": 3.0},
        {"score": "sigmoid", "groups": 4, "keep": 2, "group_score": "top2sum", "normalize": "sum", "eps": 1e-20},
        {"score": "sigmoid", "groups": 4, "keep": 2, "group_score": "top2sum", "fill": "zero"},
        {"score": "softmax", "groups": 6, "keep": 3, "group_score": "max"},
        {"score": "softmax", "groups": 6, "keep": 3, "bias_on": "logits"},
        {"score": "sqrtsoftplus", "normalize": "sum", "scale": 1.5},
        {"score": "sigmoid", "apply": "input"},
        {"score": "sparsemixer", "threshold": 0.02},
        {"score": "sparsemixer", "threshold": 0.8, "normalize": "sum", "scale": 1.5},
    )
]


@pytest.mark.parametrize("how", ROUTINGS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_routing_selects_and_weighs_as_defined(how: Routing, bias: bool) -> None:
    rng = np.random.default_rng(3)
    block = random_block(
        rng, experts=24, d=64, width=8, top_k=5, routed=WeightFormat(), how=how, router_bias=bias,
        selection_bias=bias and how.score != "sparsemixer",
    )  # fmt: skip
    x = rng.standard_normal((300, 64), dtype=np.float32)
    _, indices, weights = block.prepared(x)
    assert np.array_equal(block.prepared.select(x), indices)
    assert np.array_equal(block.prepared.select(x[:1]), indices[:1])
    expected, expected_weights = block.route(x)
    order, expected_order = np.argsort(indices), np.argsort(expected.numpy())
    same = (np.take_along_axis(indices, order, 1) == np.take_along_axis(expected.numpy(), expected_order, 1)).all(1)
    # logits differ in the last bits of fp32, so only a choice nearer than 1e-6 to the next can fall the other way
    assert same.mean() > 0.99
    got = np.take_along_axis(weights, order, 1)[same]
    wanted = np.take_along_axis(expected_weights.numpy(), expected_order, 1)[same]
    assert np.allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_selection_alone_checks_what_it_is_given() -> None:
    rng = np.random.default_rng(3)
    block = random_block(rng, experts=24, d=64, width=8, top_k=5, routed=WeightFormat(), selection_bias=True)
    with pytest.raises(kernel_api.KernelError, match="router_input: "):
        block.prepared.select(rng.standard_normal((3, 63), dtype=np.float32))
    block.prepared.tensors.router_weight = block.prepared.tensors.router_weight[:-1]
    with pytest.raises(kernel_api.KernelError, match="router_weight: 5888 bytes given, 6144 needed"):
        block.prepared.select(rng.standard_normal((3, 64), dtype=np.float32))


@pytest.mark.parametrize("isa", instruction_sets())
def test_sparsemixer_gives_the_bits_of_the_scalar_kernels(isa: str) -> None:
    """Experts that tie, and logits of zero, whose quotient is no number and counts as near."""
    rng = np.random.default_rng(5)
    how = Routing(score="sparsemixer", threshold=0.3)
    block = random_block(rng, experts=19, d=64, width=8, top_k=4, routed=WeightFormat(), how=how)
    x = rng.standard_normal((40, 64), dtype=np.float32)
    x[3] = 0
    _, indices, weights = _equal_to_scalar(block, x, isa)
    assert (indices[3] == [0, 1, 2, 3]).all()
    assert np.allclose(weights[3], [1 / 19, 1 / 18, 1 / 17, 1 / 16], rtol=1e-6)
    expected = block.route(x)[1].numpy()
    assert (np.abs(weights - expected).max(1) < 1e-6).mean() > 0.9  # a logit at the threshold falls on either side


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": 9}, "params: 9 entries given, 10 needed"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"after_topk": 1}, "after_topk is 1"),
        ({"groups": 3}, "groups is 3"),
        ({"selection_bias": True}, "selection_bias: given"),
    ],
    ids=str,
)
def test_what_sparsemixer_does_not_have_is_refused(change: dict[str, float], message: str) -> None:
    how = Routing(score="sparsemixer", threshold=0.3)
    block = random_block(
        np.random.default_rng(5), experts=6, d=32, width=8, top_k=2, routed=WeightFormat(), how=how,
        selection_bias="selection_bias" in change,
    )  # fmt: skip
    prepared = block.prepared
    if "params" in change:
        prepared._args.params_length = int(change["params"])
    if "threshold" in change:
        prepared._params[Params.THRESHOLD] = change["threshold"]
    for name, field in (("after_topk", Config.AFTER_TOPK), ("groups", Config.GROUPS)):
        if name in change:
            prepared._config[field] = int(change[name])
    if "groups" in change:
        prepared._config[Config.KEEP] = 1
    with pytest.raises(kernel_api.KernelError, match=message):
        prepared(np.zeros((1, 32), np.float32))


def test_ties_go_to_the_lower_index() -> None:
    rng = np.random.default_rng(0)
    block = random_block(rng, experts=9, d=32, width=32, top_k=4, routed=WeightFormat(), how=Routing(score="sigmoid"))
    _, indices, weights = block.prepared(np.zeros((3, 32), np.float32))
    assert (indices == [0, 1, 2, 3]).all()
    assert (weights == 0.5).all()


def _steered(
    rng: np.random.Generator, choice: np.ndarray, fmt: WeightFormat, experts: int, top_k: int
) -> tuple[Block, np.ndarray]:
    """A block and tokens [T, d] of which token t selects exactly the experts choice[t] (router and input one-hot)."""
    d = 64
    block = random_block(
        rng, experts=experts, d=d, width=64, top_k=top_k, routed=fmt, shared_width=64, shared=INT4_IN, how=MOBILEMOE
    )
    block.prepared.tensors.router_weight[:] = 0
    block.prepared.tensors.router_weight[np.arange(experts), np.arange(experts)] = 1
    x = rng.standard_normal((len(choice), d), dtype=np.float32) * np.float32(0.1)
    x[:, :experts] = -4
    np.put_along_axis(x, choice, 4 + rng.random(choice.shape, dtype=np.float32), 1)
    return block, x


@pytest.mark.parametrize("fmt", [INT4_IN, INT4_OUT], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 130])
def test_all_tokens_to_one_expert_none_to_most_and_all_to_all(fmt: WeightFormat, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    one = np.full((tokens, 1), 5)
    pair = np.tile([2, 9], (tokens, 1))
    every = np.tile(np.arange(10), (tokens, 1))
    for choice in (one, pair, every):
        block, x = _steered(rng, choice, fmt, experts=10, top_k=choice.shape[1])
        y, indices, weights = _everywhere(block, x)
        assert np.array_equal(np.sort(indices), choice)
        assert _error(y, block.reference(x, indices, weights)) < _limit(fmt)


def test_tokens_do_not_influence_each_other() -> None:
    """A batch gives the same bits as its tokens one by one: narrow, wide and every tile size in between."""
    rng = np.random.default_rng(8)
    for fmt in (INT4_IN, INT4_OUT, WeightFormat(Kind.INT8, 64, int8_activations=True), WeightFormat()):
        block = random_block(rng, experts=5, d=128, width=64, top_k=2, routed=fmt, shared_width=64, shared=INT4_IN)
        x = rng.standard_normal((70, 128), dtype=np.float32)
        whole = block.prepared(x)[0]
        parts = [block.prepared(np.ascontiguousarray(x[i:j]))[0] for i, j in ((0, 1), (1, 2), (2, 9), (9, 70))]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("fmt", [INT4_IN, INT4_OUT, WeightFormat(Kind.INT8, 64, int8_activations=True)], ids=str)
def test_each_instruction_set_gives_the_bits_of_the_scalar_kernels(isa: str, fmt: WeightFormat) -> None:
    """By name, so that the report says which ones this machine could not try; k = E among the cases."""
    rng = np.random.default_rng(4)
    for tokens, top_k in itertools.product((1, 6, 61), (2, 9)):
        block = random_block(
            rng, experts=9, d=192, width=64, top_k=top_k, routed=fmt, shared_width=64, shared=INT4_IN, how=MOBILEMOE
        )
        x = rng.standard_normal((tokens, 192), dtype=np.float32)
        _equal_to_scalar(block, x, isa)


def test_no_tokens() -> None:
    block = random_block(np.random.default_rng(0), experts=3, d=32, width=32, top_k=2, routed=INT4_IN)
    y, indices, weights = block.prepared(np.empty((0, 32), np.float32))
    assert y.shape == (0, 32)
    assert indices.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("fmt", [INT4_IN, INT4_OUT, WeightFormat()], ids=str)
@pytest.mark.parametrize("tokens", [5, 60])
def test_not_a_number_stays_with_its_token(fmt: WeightFormat, tokens: int) -> None:
    rng = np.random.default_rng(2)
    block = random_block(
        rng, experts=6, d=64, width=64, top_k=2, routed=fmt, shared_width=64, shared=INT4_IN, how=MOBILEMOE
    )
    x = rng.standard_normal((tokens, 64), dtype=np.float32)
    clean = block.prepared(x)[0]
    x[1, 3], x[3, 60], x[4] = np.nan, np.inf, -np.inf
    y, indices, _ = _everywhere_nan(block, x)
    bad = np.isin(np.arange(tokens), [1, 3, 4])
    assert not np.isfinite(y[bad]).all(1).any()
    assert np.array_equal(y[~bad], clean[~bad])
    assert ((indices >= 0) & (indices < 6)).all()
    assert (np.diff(np.sort(indices), axis=1) > 0).all()


def _everywhere_nan(block: Block, x: np.ndarray) -> tuple[np.ndarray, ...]:
    results = []
    for isa in kernel_api.available_isas():
        kernel_api.set_isa(isa)
        results.append(block.prepared(x))
    for other in results[1:]:
        assert np.array_equal(other[0], results[0][0], equal_nan=True)
        assert np.array_equal(other[1], results[0][1])
    return results[0]


def test_a_trace_may_turn_itself_off() -> None:
    block = random_block(np.random.default_rng(1), experts=6, d=64, width=32, top_k=2, routed=INT4_OUT)
    x = np.zeros((2, 64), np.float32)
    seen: list[tuple[np.ndarray, ...]] = []

    def once(*arrays: np.ndarray) -> None:
        seen.append(arrays)
        kernel_api.library().moec_set_trace(kernel_api._TRACE(), None)  # the binding would free what is running

    kernel_api.set_trace(once)
    for _ in range(2):
        block.prepared.run(x, x, np.empty_like(x))
    assert len(seen) == 1


def test_an_output_over_its_input_is_refused() -> None:
    block = random_block(np.random.default_rng(1), experts=6, d=64, width=32, top_k=2, routed=INT4_OUT)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(kernel_api.KernelError, match="y: overlaps"):
        block.prepared.run(x, x, x)


def test_a_trace_sees_every_block() -> None:
    rng = np.random.default_rng(1)
    block = random_block(rng, experts=6, d=64, width=32, top_k=2, routed=INT4_OUT)
    x = rng.standard_normal((7, 64), dtype=np.float32)
    seen: list[tuple[np.ndarray, ...]] = []
    kernel_api.set_trace(lambda *arrays: seen.append(arrays))
    y, indices, weights = block.prepared(x)
    without = np.empty_like(y)
    block.prepared.run(x, x, without)  # the caller does not ask for the routing: the trace has it all the same
    kernel_api.set_trace(None)
    block.prepared(x)
    assert len(seen) == 2
    for record in seen:
        for got, wanted in zip(record, (x, indices, weights, y), strict=True):
            assert np.array_equal(got, wanted)


def test_long_input_is_cut_into_chunks() -> None:
    rng = np.random.default_rng(6)
    block = random_block(rng, experts=4, d=2048, width=32, top_k=4, routed=INT4_IN)
    x = rng.standard_normal((1600, 2048), dtype=np.float32)
    kernel_api.set_threads(2)
    y = block.prepared(x)[0]
    assert np.array_equal(y[1500:], block.prepared(np.ascontiguousarray(x[1500:]))[0])


def _replaced(block: Block, **changes: object) -> kernel_api.PreparedMoe:
    tensors = kernel_api.MoeTensors(**{**vars(block.prepared.tensors), **changes})  # type: ignore[arg-type]
    return kernel_api.PreparedMoe(block.config, tensors)


def test_wrong_buffers_are_refused_by_name() -> None:
    rng = np.random.default_rng(1)
    block = random_block(
        rng,
        experts=6,
        d=64,
        width=32,
        top_k=2,
        routed=INT4_OUT,
        shared_width=32,
        shared=INT4_IN,
        router_bias=True,
        selection_bias=True,
        biases=True,
        shared_gate=True,
    )
    x = rng.standard_normal((7, 64), dtype=np.float32)
    block.prepared(x)
    for name, value in vars(block.prepared.tensors).items():
        assert value is not None
        flat = value.reshape(-1)
        for wrong in (flat[:-1].copy(), np.concatenate([flat, flat[:1]])):
            with pytest.raises(kernel_api.KernelError, match=rf"^{name}: "):
                _replaced(block, **{name: wrong})(x)
    for name in ("router_weight", "w13", "w2", "shared_w13", "shared_w2"):
        with pytest.raises(kernel_api.KernelError, match=rf"^{name}: "):
            _replaced(block, **{name: None})(x)
    with pytest.raises(kernel_api.KernelError, match=r"^router_input: "):
        block.prepared(x, x[:-1])
    with pytest.raises(kernel_api.KernelError, match=r"^y: "):
        block.prepared(x, x, np.empty((7, 63), np.float32))
    with pytest.raises(kernel_api.KernelError, match=r"^indices: "):
        block.prepared.run(x, x, np.empty_like(x), np.empty((7, 1), np.int32))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("VERSION", 99, "version"),
        ("EXPERTS", 0, "experts"),
        ("EXPERTS", 1 << 40, "experts"),
        ("D_MODEL", -64, "d_model"),
        ("EXPERT_WIDTH", 1 << 50, "expert_width"),
        ("TOP_K", 7, "top_k"),
        ("TOP_K", 0, "top_k"),
        ("SCORE", 4, "score"),
        ("ACTIVATION", -1, "activation"),
        ("INTERLEAVED", 2, "interleaved"),
        ("GROUPS", 4, "keep"),
        ("W13_FORMAT", 0x7FFF00FF, "w13"),
        ("W2_FORMAT", 33 << 8 | 1, "w2"),
        ("SHARED_WIDTH", 32, "shared_w13"),
    ],
)
def test_nonsense_in_config_is_refused(field: str, value: int, message: str) -> None:
    from moec.runtime.moe_config import Config

    block = random_block(np.random.default_rng(1), experts=6, d=64, width=32, top_k=2, routed=INT4_OUT)
    block.prepared._config[Config[field]] = value
    with pytest.raises(kernel_api.KernelError, match=message):
        block.prepared(np.zeros((2, 64), np.float32))


def test_nonsense_in_params_is_refused() -> None:
    block = random_block(np.random.default_rng(1), experts=6, d=64, width=32, top_k=2, routed=INT4_OUT)
    block.prepared._params[2] = np.nan
    with pytest.raises(kernel_api.KernelError, match="params: entry 2"):
        block.prepared(np.zeros((2, 64), np.float32))


def test_the_definition_itself_runs_the_same_block() -> None:
    """The reference of this file is moec::fused_moe_q: one block through the registered operator."""
    rng = np.random.default_rng(12)
    what = Experts(layout="in_out")
    block = random_block(
        rng,
        experts=8,
        d=128,
        width=64,
        top_k=2,
        routed=INT4_OUT,
        shared=INT4_IN,
        shared_width=128,
        how=MOBILEMOE,
        what=what,
        selection_bias=True,
    )
    x = rng.standard_normal((20, 128), dtype=np.float32)
    y, _, _ = block.prepared(x)
    t = block.prepared.tensors
    q = [w.quantized for w in (block.w13, block.w2, block.shared_w13, block.shared_w2) if w is not None]
    assert t.selection_bias is not None
    expected = torch.ops.moec.fused_moe_q(
        torch.from_numpy(x),
        torch.from_numpy(x),
        torch.from_numpy(t.router_weight),
        None,
        torch.from_numpy(t.selection_bias),
        q[0].codes,
        q[0].scales,
        None,
        q[1].codes,
        q[1].scales,
        None,
        q[2].codes[0],
        q[2].scales[0],
        q[3].codes[0],
        q[3].scales[0],
        None,
        2,
        str(MOBILEMOE),
        str(what),
        4,
        32,
        True,
    )
    assert _error(y, expected.numpy()) < ROUNDED
