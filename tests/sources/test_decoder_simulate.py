"""The reference that artifacts are verified against: equal to the module in float, and to plain loops when rounding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moec import checkpoints
from moec.checkpoints.store import WeightStore, open_store
from moec.compiler.errors import CompileError, RunError
from moec.compiler.program import Role
from moec.compiler.quant import QuantizedTensor, quantize_rows, quantize_weight
from moec.compiler.spec.model import Quantization, Spec
from moec.compiler.spec.sources import source_of
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.decoder import Decoder
from moec.sources.decoder.layout import weight_layout
from moec.sources.decoder.simulate import Matrix, Reference

MODEL = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 97, "context": 48, "qk_norm": True, "rope": {"theta": 500000.0, "interleaved": True},
    "moe": {"experts": 7, "top_k": 3, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
DENSE = {key: value for key, value in MODEL.items() if key != "moe"} | {
    "architecture": "mobilellm", "layers": 5, "ffn_width": 96, "tied_embeddings": False,
    "attention_window": {"size": 6, "every_nth_global": 4},
}  # fmt: skip
INT4 = {"weights": "int4", "activations": "int8", "kv_cache": "int8"}
IDS = torch.randint(0, 97, (31,), generator=torch.Generator().manual_seed(0)).tolist()


def opened(folder: Path, model: dict[str, Any] = MODEL, *, qat: bool) -> tuple[DecoderConfig, WeightStore]:
    spec = Spec.model_validate({"name": "t", "model": model, "quantization": INT4})
    assert isinstance(spec.model, DecoderConfig)
    return spec.model, open_store(checkpoints.synthesize(spec, folder / "c", seed=5, qat=qat), spec.model)


def scheme(**changes: Any) -> Quantization:
    return Quantization.model_validate(INT4 | changes)


def decoder_of(config: DecoderConfig, store: WeightStore) -> Decoder:
    decoder = Decoder(config, "loop")
    for name in weight_layout(config):
        decoder.get_parameter(name).copy_(store[name].load())
    return decoder


@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("qat", [True, False], ids=["packed", "float"])
def test_float_equals_the_module(tmp_path: Path, model: dict[str, Any], qat: bool) -> None:
    config, store = opened(tmp_path, model, qat=qat)
    expected = decoder_of(config, store)(torch.tensor([IDS]), torch.tensor([0]))[0]
    result = Reference(config, store, None).forward(IDS)
    # the same fp32 products, some summed in another order; logits are about 3
    torch.testing.assert_close(torch.from_numpy(result.logits), expected, atol=1e-5, rtol=1e-5)
    assert len(result.layers) == (2 if config.moe else 0)
    if qat:  # on the checkpoint's own codes, quantizing the weights changes nothing
        quantized = Reference(config, store, scheme(activations="fp32", kv_cache="fp32")).forward(IDS)
        torch.testing.assert_close(torch.from_numpy(quantized.logits), expected, atol=1e-5, rtol=1e-5)


def test_the_block_by_hand(tmp_path: Path) -> None:
    """One token through one block with INT8 activations and groups along out, in Python integers."""
    config, store = opened(tmp_path, qat=True)
    block = Reference(config, store, scheme()).moe(1)
    x_D = torch.randn(64, generator=torch.Generator().manual_seed(1)).numpy()
    indices = np.array([[4, 0, 6]])

    def row(x: np.ndarray) -> tuple[list[int], float]:
        """Symmetric INT8 of one row; fp32 arithmetic in the order of the definition."""
        a = np.float32(np.abs(x).max())
        inverse = np.float32(127) / a
        return [int(np.clip(np.rint(np.float32(v) * inverse), -127, 127)) for v in x], float(a / np.float32(127))

    def along_out(x: np.ndarray, weight: QuantizedTensor) -> np.ndarray:
        q, s = weight.unpacked().numpy().astype(int), weight.scales.float().numpy()
        y = np.zeros(q.shape[1])
        for group in range(s.shape[1]):
            zq, sz = row(x.astype(np.float32) * s[:, group])
            for n in range(32 * group, 32 * group + 32):
                y[n] = sz * sum(zq[k] * int(q[k, n]) for k in range(len(zq)))
        return y

    def along_in(x: np.ndarray, weight: QuantizedTensor) -> np.ndarray:
        q, s = weight.unpacked().numpy().astype(int), weight.scales.float().numpy()
        xq, sx = row(x)
        return np.array([
            sx * sum(s[n, g] * sum(xq[k] * int(q[n, k]) for k in range(32 * g, 32 * g + 32)) for g in range(s.shape[1]))
            for n in range(q.shape[0])
        ])  # fmt: skip

    def codes(name: str, expert: int | None = None) -> QuantizedTensor:
        stored = store[f"model.layers.1.feed_forward.{name}"].stored
        assert stored is not None
        w = stored.load()
        return w if expert is None else QuantizedTensor(w.codes[expert], w.scales[expert], 4, 32)

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    router = store["model.layers.1.feed_forward.router.weight"].load().numpy()
    scores = [1 / (1 + math.exp(-float(router[e] @ x_D))) for e in (4, 0, 6)]
    expected = np.zeros(64)
    for expert, score in zip((4, 0, 6), scores, strict=True):
        gate_up = along_out(x_D, codes("experts.gate_up_proj", expert))
        hidden = silu(gate_up[:32]) * gate_up[32:]
        expected += 2.5 * score / sum(scores) * along_out(hidden, codes("experts.down_proj", expert))
    shared = "shared_expert.{}_proj.weight".format
    hidden = silu(along_in(x_D, codes(shared("gate")))) * along_in(x_D, codes(shared("up")))
    expected += along_in(hidden, codes(shared("down")))
    y_TD = block.output(x_D[None], indices)
    # the hidden may round one element of 32 or 64 to the next step, where double and single precision meet a tie
    assert np.abs(y_TD[0] - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.median(np.abs(y_TD[0] - expected)) < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_rounding_costs_what_int8_costs(tmp_path: Path, axis: str, bits: str) -> None:
    """Against float activations on the same codes: different, but by no more than INT8 rounding explains."""
    config, store = opened(tmp_path, qat=False)
    quantization = scheme(weights=bits, expert_group_axis=axis)
    rounded = Reference(config, store, quantization).forward(IDS)
    exact = Reference(config, store, quantization, activations=False).forward(IDS)
    forced = Reference(config, store, quantization).forward(IDS, [r.used_TK for r in exact.layers])
    assert not np.array_equal(rounded.logits, exact.logits)
    cosine = (forced.logits * exact.logits).sum(-1)
    cosine /= np.linalg.norm(forced.logits, axis=-1) * np.linalg.norm(exact.logits, axis=-1)
    # a rounding to 127 steps of a row of normal values is 1/150 of its norm; a dozen of them in a row, independent
    assert cosine.min() > 1 - 12 * (1 / 100) ** 2
    no_cache = Reference(config, store, scheme(weights=bits, expert_group_axis=axis, kv_cache="fp32")).forward(IDS)
    assert not np.array_equal(no_cache.logits, rounded.logits)


def test_out_groups_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(64, 96, generator=generator), bits=4, group_size=32)
    x_TK = torch.randn(17, 64, generator=generator)
    matrix = Matrix(weight, in_out=True, int8_activations=True)
    whole = matrix(x_TK)
    monkeypatch.setattr("moec.sources.decoder.simulate._ELEMENTS", 64 * 3 * 4)
    torch.testing.assert_close(matrix(x_TK), whole, atol=0, rtol=1e-6)  # exact integers, one fp32 product
    table = Matrix(quantize_weight(torch.randn(50, 64, generator=generator), bits=8, group_size=32), in_out=False,
                   int8_activations=True)  # fmt: skip
    torch.testing.assert_close(table.by_rows(x_TK), table(x_TK), atol=1e-5, rtol=1e-5)  # another order of fp32 sums
    assert torch.equal(table.rows(torch.tensor([7])), table._weight.dequantize()[[7]])  # type: ignore[union-attr]


def test_roles_that_xnnpack_serves(tmp_path: Path) -> None:
    """Asymmetric rows and bfloat16 scales, in those roles only."""
    config, store = opened(tmp_path, qat=True)
    reference = Reference(config, store, scheme(), asymmetric_roles=[Role.SHARED])
    stored = store["model.layers.0.feed_forward.shared_expert.up_proj.weight"].stored
    assert stored is not None
    codes = stored.load()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)) + 1.0
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    seen = ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale
    w = codes.unpacked().float() * codes.scales.bfloat16().float().repeat_interleave(32, -1)
    name = "model.layers.0.feed_forward.shared_expert.up_proj.weight"
    # x / scale against x * (1 / scale): a tie may round the other way
    assert (reference._matrix(name)(x) - F.linear(seen, w)).abs().max() < 2 * float(scale.max()) * float(w.abs().max())
    query = "model.layers.0.self_attn.q_proj.weight"
    plain = Reference(config, store, scheme())
    assert torch.equal(reference._matrix(query)(x), plain._matrix(query)(x))
    assert not torch.equal(reference._matrix(name)(x), plain._matrix(name)(x))
    q, s = quantize_rows(x)
    torch.testing.assert_close(plain._matrix(name)(x), F.linear(q * s, codes.dequantize()), atol=1e-5, rtol=1e-5)


def test_verification_gets_it_from_the_model_source(tmp_path: Path) -> None:
    spec = Spec.model_validate({"name": "t", "model": MODEL, "quantization": INT4})
    config, store = opened(tmp_path, qat=True)
    how: dict[str, Any] = {"asymmetric_roles": [Role.SHARED], "integer_attention": True}
    given = source_of(spec.model).reference(spec, store, scheme(), **how)
    assert given is not None
    logits = given.run({"a": IDS})["a"]
    assert np.array_equal(logits, Reference(config, store, scheme(), **how).run({"a": IDS})["a"])
    assert not np.array_equal(logits, given.perturbed({"a": IDS})["a"])


@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["moe", "windows"])
def test_attention_in_integers(tmp_path: Path, model: dict[str, Any]) -> None:
    """Rounding of queries and weights to 16 bits, over INT8 caches and nowhere else."""
    config, store = opened(tmp_path, model, qat=False)
    floats = {"activations": "fp32", "kv_cache": "fp32"}
    plain, integers = (
        Reference(config, store, scheme(**floats), integer_attention=i).forward(IDS) for i in (False, True)
    )
    assert np.array_equal(plain.logits, integers.logits)
    plain, integers = (
        Reference(config, store, scheme(activations="fp32"), integer_attention=i).forward(IDS) for i in (False, True)
    )
    apart = np.abs(plain.logits - integers.logits).max(-1) / np.abs(plain.logits).max(-1)
    # a key or value that this moves to its next code counts more, in single rows
    assert 1e-7 < np.median(apart) < 1e-3


def test_a_perturbed_run_differs_from_the_first_attention_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in feed-forward blocks alone leaves attention of the first layer as it was, where an artifact's sums are in
    another order already."""
    _, store = opened(tmp_path, qat=True)
    spec = Spec.model_validate({"name": "t", "model": MODEL, "quantization": INT4})
    reference = source_of(spec.model).reference(spec, store, scheme())
    assert reference is not None
    plain, seen = Matrix.__call__, []

    def spied(self: Matrix, x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(x)
        return plain(self, x, *args)

    monkeypatch.setattr(Matrix, "__call__", spied)
    reference.run({"a": IDS})
    queries, count = seen[0], len(seen)
    reference.perturbed({"a": IDS})
    moved = ((seen[count] - queries).abs() / queries.abs().clamp(min=1e-3)).max()
    assert 1e-7 < float(moved) < 1e-5


def test_routing_free_and_forced(tmp_path: Path) -> None:
    config, store = opened(tmp_path, qat=True)
    reference = Reference(config, store, scheme())
    free = reference.forward(IDS)
    again = reference.forward(IDS, [r.routed.indices_TK for r in free.layers])
    assert np.array_equal(free.logits, again.logits)
    other = [np.roll(r.routed.indices_TK, 1, axis=0) for r in free.layers]
    seen: dict[int, np.ndarray] = {}
    run = reference.run({"a": IDS}, lambda n, _, r: seen.update({n: r["a"].indices_TK}), routing={"a": other})
    assert np.array_equal(run["a"], reference.forward(IDS, other).logits)
    assert np.array_equal(seen[0], free.layers[0].routed.indices_TK), "what it would have selected is reported"
    forced = reference.forward(IDS, other)
    assert not np.array_equal(free.logits, forced.logits)
    for record, used in zip(forced.layers, other, strict=True):
        assert np.array_equal(record.used_TK, used)
    record = forced.layers[0]
    block = reference.moe(0)
    assert np.array_equal(block.output(record.x_TD, record.used_TK), record.y_TD)
    routed = block.route(record.x_TD, forced_TK=record.used_TK)
    assert np.array_equal(routed.indices_TK, record.routed.indices_TK)  # the free choice
    chosen = np.take_along_axis(routed.scores_TE, routed.indices_TK, -1)
    assert np.array_equal(np.sort(routed.scores_TE, -1)[:, ::-1][:, :3], chosen)
    np.testing.assert_allclose(routed.weights_TK.sum(-1), 2.5, rtol=1e-6)


def test_prompts_do_not_see_each_other(tmp_path: Path) -> None:
    config, store = opened(tmp_path, qat=True)
    reference = Reference(config, store, scheme())
    seen: list[tuple[int, set[str]]] = []
    logits = reference.run({"a": IDS, "b": IDS[:5]}, lambda n, _, routed: seen.append((n, set(routed))))
    assert seen == [(0, {"a", "b"}), (1, {"a", "b"})]
    assert np.array_equal(logits["a"], reference.forward(IDS).logits)
    np.testing.assert_allclose(logits["b"], logits["a"][:5], atol=1e-4)  # causal; fp32 sums of other shapes


def test_refusals(tmp_path: Path) -> None:
    config, store = opened(tmp_path, qat=True)
    reference = Reference(config, store, scheme())
    for ids, what in (
        ([], "0 tokens"),
        ([0] * 49, "49 tokens, the context holds 1 to 48"),
        ([97], "ids"),
        ([-1], "ids"),
    ):
        with pytest.raises(RunError, match=what):
            reference.forward(ids)
    with pytest.raises(RunError, match="expert 7 of 7"):
        reference.moe(0).output(np.zeros((1, 64)), np.array([[0, 1, 7]]))
    with pytest.raises(CompileError, match=r"embed_tokens.*INT4 codes in groups of 32 along in, .*for INT8"):
        Reference(config, store, scheme(weights="int8")).forward(IDS)


def test_no_more_than_a_layer_in_memory(tmp_path: Path) -> None:
    """The peak of what torch allocates does not grow with the number of layers."""
    peaks = []
    for layers in (2, 8):
        config, store = opened(tmp_path / str(layers), MODEL | {"layers": layers}, qat=True)
        loaded, high = 0, 0
        with torch.profiler.profile(profile_memory=True) as profile:
            Reference(config, store, scheme()).forward(IDS[:4])
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                loaded += event.nbytes()
                high = max(high, loaded)
        peaks.append(high)
    # the dequantized table of 97 x 64 floats at least, or the profiler saw nothing
    assert peaks[0] > 97 * 64 * 4
    assert peaks[1] < 1.3 * peaks[0]
