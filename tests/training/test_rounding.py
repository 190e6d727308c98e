"""QAT's rounding is the compiler's: the same scales, the same codes, and the artifact computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.checkpoints import open_store
from moec.checkpoints.store import PACKED_ROLES
from moec.compiler import build
from moec.compiler.errors import CompileError
from moec.compiler.program import Role
from moec.compiler.quant import fake_quantize_rows, quantize_weight
from moec.compiler.spec.quantization import Quantization
from moec.sources.decoder.layout import weight_layout
from moec.training.checkpoints import load_model, packing_faults, stored_weights, write_checkpoint
from moec.training.model import Forward
from moec.training.rounding import Rounding, WeightRounding, round_activations
from tests.training.small import INT4, MOE, config_of, model_of, random_weights, spec_of


def scheme(**changes: Any) -> Quantization:
    return Quantization.model_validate(INT4 | changes)


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.sampled_from([32, 64]), scale=st.floats(1e-9, 1e3),
    seed=st.integers(0, 99), bits=st.sampled_from([4, 8]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_scales_and_codes_are_the_compilers(
    rows: int, groups: int, size: int, scale: float, seed: int, bits: int
) -> None:
    """Scales bit for bit, at any magnitude down to groups whose scale is 0; codes but for ties of the two divisions."""
    w = torch.randn(3, rows, groups * size, generator=torch.Generator().manual_seed(seed)) * scale
    w[0, 0, :size] = 0
    rounding = WeightRounding(bits, size)
    mine = rounding.quantized(w)
    present = w.unflatten(-1, (-1, size)).abs().amax(-1) > 0
    if 2 * int((present & (mine.scales == 0)).sum()) > int(present.sum()):
        with pytest.raises(CompileError, match="most of which is too small"):
            quantize_weight(w, bits=bits, group_size=size)
        return
    theirs = quantize_weight(w, bits=bits, group_size=size)
    assert torch.equal(mine.scales, theirs.scales)
    # w * (1 / s) and w / s differ in the last bit: a code differs only where w / s is that near to a half
    differs = mine.unpacked() != theirs.unpacked()
    ratio = w / theirs.scales.float().repeat_interleave(size, -1)
    assert ((ratio[differs].abs() % 1 - 0.5).abs() < 1e-5 * ratio[differs].abs().clamp(min=1)).all()
    assert torch.equal(mine.dequantize(), rounding(w))  # what was trained with is what is stored


def test_groups_along_the_other_axis() -> None:
    w = torch.randn(3, 64, 10, generator=torch.Generator().manual_seed(0))
    rounded = WeightRounding(4, 32, transposed=True)(w)
    assert torch.equal(rounded, WeightRounding(4, 32)(w.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_pass_straight_through(bits: int) -> None:
    """One where the code is within its range, zero where it is cut off, whatever the rounding."""
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(bits), requires_grad=True)
    rounding = WeightRounding(bits, 32)
    rounded = rounding(w)
    (grad,) = torch.autograd.grad(rounded.sum(), w)
    scale = rounding.scales(w).float().repeat_interleave(32, -1)
    inside = ((w / scale).round() <= 2 ** (bits - 1) - 1).float()
    torch.testing.assert_close(grad, inside, atol=1e-6, rtol=0)  # s * (1 / s) is one to a rounding
    assert 0 < inside.mean() < 1 or bits == 8
    assert len(rounded[0, :32].unique()) <= 2**bits


def test_activations_round_as_the_kernels_do() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = round_activations(x)
    assert torch.equal(rounded, fake_quantize_rows(x.detach()))
    blocks = round_activations(x, 32)  # of 32 values and of the one that is left
    parts = [fake_quantize_rows(part) for part in x.detach().split(32, -1)]
    assert torch.equal(blocks, torch.cat(parts, -1))
    assert not torch.equal(blocks, rounded)
    (grad,) = torch.autograd.grad((rounded * torch.arange(33.0)).sum(), x)
    assert torch.equal(grad, torch.arange(33.0).expand(7, 33))


@pytest.mark.parametrize("kind", ["nl3", "iq4_nl", "fp4"])
def test_levels_are_rounded_to_and_stored_as_floats(kind: str, tmp_path: Path) -> None:
    """No packed layout holds them: the checkpoint has the values that training computed with, whatever the axis."""
    config, rounding = config_of(), Rounding(scheme(weights=kind, embedding=kind, expert_group_axis="in"))
    weights = random_weights(config)
    write_checkpoint(tmp_path / "c", config, weights, tokenizer=None, rounding=rounding)
    stored = dict(stored_weights(tmp_path / "c", config))
    checked = 0
    for name, info in weight_layout(config).items():
        rounds = rounding.weight(info.role)
        if rounds is None or info.role not in PACKED_ROLES:
            continue
        w = weights[name].clone().requires_grad_()
        rounded = rounds(w)
        assert torch.equal(stored[name], rounded.detach())
        along_in = info.role is Role.EXPERT
        expected = quantize_weight(
            w.detach().transpose(-1, -2) if along_in else w.detach(), bits=4, group_size=32, levels=kind
        )
        value = expected.dequantize()
        assert torch.equal(rounded, value.transpose(-1, -2) if along_in else value)
        (grad,) = torch.autograd.grad((rounded * 2).sum(), w)
        assert torch.equal(grad, torch.full_like(w, 2.0)), "straight through"
        checked += 1
    assert checked > 5


def test_what_is_rounded_and_what_is_not() -> None:
    """Every weight of a packed role is replaced by rounded values; the router works with its own."""
    config = config_of()
    rounding = Rounding(scheme())
    assert all(rounding.weight(role) for role in (Role.EMBEDDING, Role.ATTENTION, Role.SHARED, Role.EXPERT))
    assert not any(rounding.weight(role) for role in (Role.ROUTER, Role.NORM))
    weights = random_weights(config)
    quantized = dict(weights)
    for name, info in weight_layout(config).items():
        if rounding.weight(info.role):
            quantized[name] = quantize_weight(weights[name], bits=4, group_size=32).dequantize()
        elif len(info.shape) == 1:  # norms and biases as BF16 stores them
            quantized[name] = weights[name].bfloat16().float()
    exact = model_of(config, quantized)
    trained = model_of(config, weights, Rounding(scheme(activations="fp32", kv_cache="fp32")))
    tokens = torch.randint(0, 300, (2, 25), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # the same products of the same numbers, but for a code in 10^5 that the two divisions round apart
        torch.testing.assert_close(trained(tokens)[0], exact(tokens)[0], atol=2e-3, rtol=1e-3)
        assert not torch.allclose(model_of(config, weights)(tokens)[0], exact(tokens)[0], atol=0.05)


def test_every_rounded_weight_learns() -> None:
    config = config_of()
    model = model_of(config, random_weights(config), Rounding(scheme())).train()
    tokens = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(1))
    Forward(*model(tokens, None, tokens.roll(-1, 1), torch.ones(4, 40))).nll.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0, name


def qat_model(config: Any, quantization: Quantization) -> tuple[Any, dict[str, torch.Tensor]]:
    """A QAT model after some steps of descent, so that its weights are not those of any formula."""
    model = model_of(config, random_weights(config), Rounding(quantization)).train()
    with torch.no_grad():
        for block in model.blocks:
            block.expert_bias.copy_(0.1 * torch.randn(8, generator=torch.Generator().manual_seed(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        tokens = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        out = Forward(*model(tokens, None, tokens.roll(-1, 1), torch.ones(4, 40)))
        (out.nll / 160).backward()
        optimizer.step()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return model.eval(), {name: state[name].detach() for name in weight_layout(config)}


@pytest.mark.parametrize(
    ("activations", "limit"),
    [
        # the same codes and scales: what differs is the order of fp32 sums (and BF16 in no place)
        ("fp32", 0.9999),
        # the artifact rounds x * scale for each group of outputs, or asymmetrically, where training rounds x: both are
        # within half of an INT8 step
        ("int8", 0.999),
    ],
)
def test_the_artifact_computes_what_was_trained(tmp_path: Path, activations: str, limit: float) -> None:
    quantization = scheme(activations=activations, kv_cache=activations)
    spec = spec_of(quantization=quantization.model_dump(mode="json", exclude_none=True))
    config = config_of()
    model, weights = qat_model(config, quantization)
    write_checkpoint(tmp_path / "qat", config, weights, tokenizer=None, rounding=Rounding(quantization))
    store = open_store(tmp_path / "qat", config)
    assert store.packed
    artifact = build.compile(spec, checkpoint=tmp_path / "qat", out=tmp_path / "artifact")
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(9)).tolist()
    session = build.load(artifact)
    logits = torch.from_numpy(np.array(session.prefill(tokens, logits="all")))
    session.close()
    with torch.no_grad():
        trained = model(torch.tensor([tokens]))[0][0]
        again = load_model(tmp_path / "qat", config)(torch.tensor([tokens]))[0][0]
    cosines = F.cosine_similarity(logits, trained)
    # a token whose choice of experts hangs on the last bit may choose others: the median is what the codes decide
    assert cosines.median() > limit
    assert (cosines > limit).float().mean() > 0.9
    if activations == "fp32":
        assert cosines.min() > limit
        # the dequantized checkpoint is the same model without rounding anything
        torch.testing.assert_close(again, trained, atol=1e-4, rtol=1e-4)


def test_the_stored_codes_are_the_trained_ones(tmp_path: Path) -> None:
    config, quantization = config_of(), scheme()
    model, weights = qat_model(config, quantization)
    write_checkpoint(tmp_path / "qat", config, weights, tokenizer=None, rounding=Rounding(quantization))
    store = open_store(tmp_path / "qat", config)
    for name, info in weight_layout(config).items():
        rounding = Rounding(quantization).weight(info.role)
        if rounding is not None:
            assert torch.equal(store[name].load(), rounding(weights[name])), name
    block = model.blocks[1]
    prefix = "model.layers.1.feed_forward"
    assert torch.equal(store[f"{prefix}.router.weight"].load(), block.router.weight)  # float32 to the last bit
    assert torch.equal(store[f"{prefix}.expert_bias"].load(), block.expert_bias.bfloat16().float())


def test_a_stress_test_is_stored_in_float(tmp_path: Path) -> None:
    config, rounding = config_of(), Rounding(scheme(), bits=2)
    weights = random_weights(config)
    write_checkpoint(tmp_path / "c", config, weights, tokenizer=None, rounding=rounding)
    store = open_store(tmp_path / "c", config)
    assert not store.packed
    table = store["model.embed_tokens.weight"].load()
    weight = rounding.weight(Role.EMBEDDING)
    assert weight is not None
    assert torch.equal(table, weight(weights["model.embed_tokens.weight"]))
    assert len(table[0, :32].unique()) <= 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"weights": "int8"}, "int8"),
        ({"group_size": 64}, "groups of 64"),
        ({"expert_group_axis": "in"}, "expert is int4, groups of 32 along in"),
        ({"shared": "fp32"}, "shared is fp32"),
    ],
)
def test_what_the_packed_layout_can_hold(changes: dict[str, Any], says: str | None) -> None:
    faults = packing_faults(config_of(MOE), scheme(**changes))
    assert bool(faults) == (says is not None)
    assert says is None or says in faults[0]


def test_diverged_weights_are_refused(tmp_path: Path) -> None:
    config = config_of()
    weights = random_weights(config)
    weights["model.layers.0.self_attn.q_proj.weight"][3, 4] = 1e6
    with pytest.raises(CompileError, match=r"q_proj\.weight has weights that float16 scales cannot hold"):
        write_checkpoint(tmp_path / "c", config, weights, tokenizer=None, rounding=Rounding(scheme()))
    assert not (tmp_path / "c").exists()
