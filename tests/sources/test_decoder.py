"""The decoder against independent descriptions of its parts; its dispatch forms and its cache against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from moec.compiler.program import Role, fake_mode_of
from moec.sources.decoder.buffers import cache_names, constant_tensors, roles
from moec.sources.decoder.config import DecoderConfig, RopeConfig, RopeScaling
from moec.sources.decoder.decoder import Attention, Decoder
from moec.sources.decoder.export import export_decoder
from moec.sources.decoder.layout import moe_layers, parameter_counts, weight_layout
from moec.sources.decoder.rope import rope_frequencies, rope_tables

RELEASED_SCALING = {"factor": 16.0, "original_context": 8192, "low_freq_factor": 1.0, "high_freq_factor": 1.0}


def config_of(**changes: object) -> DecoderConfig:
    """A small sparse decoder with odd sizes; keyword arguments replace fields."""
    fields: dict[str, object] = {
        "architecture": "mobilemoe", "layers": 2, "d_model": 36, "heads": 6, "kv_heads": 2, "head_dim": 10,
        "vocab_size": 97, "context": 40, "qk_norm": True,
        "rope": {"theta": 500000.0, "interleaved": True, "scaling": RELEASED_SCALING},
        "moe": {"experts": 7, "top_k": 3, "expert_width": 12, "shared_width": 20, "scale": 2.5},
    }  # fmt: skip
    return DecoderConfig.model_validate(fields | changes)


def dense_config(**changes: object) -> DecoderConfig:
    window = {"size": 5, "every_nth_global": 4}
    return config_of(
        **(
            {"architecture": "mobilellm", "moe": None, "ffn_width": 48, "layers": 5, "attention_window": window}
            | changes
        )
    )


def random_decoder(config: DecoderConfig, seed: int = 0, **options: object) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config, **options)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder.eval()


def run(decoder: Decoder, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
    return decoder(tokens, torch.tensor([start]))


def test_published_parameter_counts() -> None:
    shared = {"kv_heads": 4, "head_dim": 64, "vocab_size": 128256, "context": 8192}
    published = {
        (20, 768, 12, 384): 1_263_373_056,
        (26, 1024, 16, 512): 2_818_388_992,
        (32, 1280, 20, 640): 5_325_702_400,
    }
    for (layers, d_model, heads, width), total in published.items():
        config = config_of(
            **shared, layers=layers, d_model=d_model, heads=heads,
            moe={"experts": 60, "top_k": 4, "expert_width": width, "shared_width": 4 * width, "scale": 2.5},
        )  # fmt: skip
        biases = layers * 60
        assert sum(info.numel for info in weight_layout(config).values()) - biases == total
        assert parameter_counts(config)["total"] == total


@pytest.mark.parametrize(
    "config", [config_of(), dense_config(), config_of(tied_embeddings=False)], ids=["moe", "dense", "untied"]
)
def test_layout_is_what_the_module_has(config: DecoderConfig) -> None:
    decoder = Decoder(config)
    parameters = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert {name: info.shape for name, info in weight_layout(config).items()} == parameters
    buffers = dict(decoder.named_buffers())
    assert set(buffers) == {*cache_names(config), *constant_tensors(config)}
    assert set(roles(config)) == set(parameters) | set(buffers)
    for name, constant in constant_tensors(config).items():
        assert torch.equal(constant.load(), buffers[name])
        assert constant.shape == tuple(buffers[name].shape)
    for path in moe_layers(config):
        assert roles(config)[f"{path}.router.weight"] is Role.ROUTER
    assert len(moe_layers(config)) == (config.layers if config.moe else 0)


def test_rope_scaling_with_equal_frequency_factors() -> None:
    plain = rope_frequencies(RopeConfig(theta=500000.0, interleaved=True), 64)
    scaled = rope_frequencies(
        RopeConfig(theta=500000.0, interleaved=True, scaling=RopeScaling(factor=16.0, original_context=8192)), 64
    )
    slowed = 2 * math.pi / plain > 8192
    assert int(slowed.sum()) == 14
    assert torch.equal(scaled, torch.where(slowed, plain / 16, plain))


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.5, 3.0)])
def test_rope_frequencies_against_transformers(low: float, high: float) -> None:
    pytest.importorskip("transformers", reason="the oracle is transformers' llama3 RoPE")
    from transformers import Llama4TextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "original_max_position_embeddings": 512,
        "low_freq_factor": low, "high_freq_factor": high,
    }  # fmt: skip
    config = Llama4TextConfig(head_dim=64, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    scaling = RopeScaling(factor=16.0, original_context=512, low_freq_factor=low, high_freq_factor=high)
    ours = rope_frequencies(RopeConfig(theta=500000.0, interleaved=True, scaling=scaling), 64)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # a few fp32 roundings


def test_attention_equals_llama4() -> None:
    """An implementation by other hands, given our frequencies; no window, the first call on an empty cache."""
    pytest.importorskip("transformers", reason="the oracle is transformers' Llama4TextAttention")
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding

    config = config_of(d_model=96, heads=12, kv_heads=4, head_dim=64, context=23)
    length = config.context
    theirs_config = Llama4TextConfig(
        hidden_size=config.d_model, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, use_qk_norm=True, rms_norm_eps=config.norm_eps, attn_temperature_tuning=False,
        attention_bias=False, num_hidden_layers=1, no_rope_layers=[1], attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    ours, theirs = Attention(config), Llama4TextAttention(theirs_config, 0).eval()
    for name, parameter in ours.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        theirs.get_parameter(name).data.copy_(parameter)
    rotary = Llama4TextRotaryEmbedding(theirs_config)
    rotary.inv_freq.copy_(rope_frequencies(config.rope, config.head_dim))
    x_BTD = torch.randn(1, length, config.d_model, generator=generator)
    positions_T = torch.arange(length)
    causal_TT = positions_T <= positions_T.unsqueeze(1)
    cos_SP, sin_SP = rope_tables(config.rope, length, config.head_dim)
    with torch.no_grad():
        mine = ours(x_BTD, positions_T, cos_SP, sin_SP, causal_TT)
        bias = torch.zeros(1, 1, length, length).masked_fill(~causal_TT, float("-inf"))
        other, _ = theirs(x_BTD, rotary(x_BTD, positions_T.unsqueeze(0)), bias)
    # fp32 sums of up to 768 products in another order; outputs are about 0.5
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("bias", [True, False])
def test_gathered_equals_loop(tokens: int, bias: bool) -> None:
    moe = {"experts": 7, "top_k": 3, "expert_width": 12, "shared_width": 0 if tokens == 2 else 20, "scale": 2.5}
    config = config_of(moe=moe | {"selection_bias": bias, "normalize": tokens != 13})
    gathered = random_decoder(config, dispatch="gathered")
    loop = random_decoder(config, dispatch="loop")
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    # the same products summed in another order
    torch.testing.assert_close(run(gathered, ids), run(loop, ids), atol=1e-5, rtol=1e-5)


def test_router_by_hand() -> None:
    """Sigmoid scores; the bias changes the choice, not the weights; the chosen scores are normalised, then scaled."""
    block = random_decoder(config_of()).model.layers[0].feed_forward
    x_TD = torch.randn(9, 36, generator=torch.Generator().manual_seed(3))
    indices_TK, weights_TK = block.route(x_TD)
    changed = 0
    for t in range(9):
        scores = [1 / (1 + math.exp(-float(row @ x_TD[t]))) for row in block.router.weight]
        order = sorted(range(7), key=lambda e: -(scores[e] + float(block.expert_bias[e])))[:3]
        changed += set(order) != set(sorted(range(7), key=lambda e: -scores[e])[:3])
        assert indices_TK[t].tolist() == order
        total = sum(scores[e] for e in order)
        for slot, e in enumerate(order):
            # single precision against Python's double
            assert float(weights_TK[t, slot]) == pytest.approx(2.5 * scores[e] / total, rel=1e-5)
    assert changed  # the bias did change a choice, or this test shows nothing
    assert torch.allclose(weights_TK.sum(-1), torch.tensor(2.5))


@pytest.mark.parametrize("config", [config_of(), dense_config(context=31)], ids=["moe", "dense"])
def test_cache_makes_any_split_of_a_prompt_equal(config: DecoderConfig) -> None:
    decoder = random_decoder(config, dispatch="loop") if config.moe else random_decoder(config)
    ids = torch.randint(0, config.vocab_size, (1, 31), generator=torch.Generator().manual_seed(5))
    whole = run(decoder, ids)
    for cuts in ([1] * 31, [7, 1, 17, 6], [30, 1]):
        decoder.reset()
        start, parts = 0, []
        for length in cuts:
            parts.append(run(decoder, ids[:, start : start + length], start))
            start += length
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)  # other shapes of the same sums


def test_window_limits_what_a_token_sees() -> None:
    """With windows of 5 in every layer but the 4th, two windowed layers see at most 2 * 4 tokens back."""
    config = dense_config(layers=2)
    decoder = random_decoder(config)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, config.vocab_size, (1, 20), generator=generator)
    before = run(decoder, ids)[0, -1]
    far, near = ids.clone(), ids.clone()
    far[0, 20 - 1 - 9] = (far[0, 20 - 1 - 9] + 1) % 97
    near[0, 20 - 1 - 8] = (near[0, 20 - 1 - 8] + 1) % 97
    assert torch.equal(run(decoder, far)[0, -1], before)
    assert not torch.equal(run(decoder, near)[0, -1], before)
    everything = random_decoder(dense_config(layers=4))  # its 4th layer is global
    before = run(everything, ids)[0, -1]
    ids[0, 0] = (ids[0, 0] + 1) % 97
    assert not torch.equal(run(everything, ids)[0, -1], before)


def test_full_size_model_needs_no_memory_when_fake() -> None:
    config = config_of(
        layers=32, d_model=1280, heads=20, kv_heads=4, head_dim=64, vocab_size=128256, context=8192,
        moe={"experts": 60, "top_k": 4, "expert_width": 640, "shared_width": 2560, "scale": 2.5},
    )  # fmt: skip
    with FakeTensorMode():
        decoder = Decoder(config)
        tensors = [*decoder.parameters(), *decoder.buffers()]
    assert all(isinstance(t.data if isinstance(t, torch.nn.Parameter) else t, FakeTensor) for t in tensors)
    assert sum(p.numel() for p in decoder.parameters()) > 5e9


@pytest.mark.parametrize("config", [config_of(), dense_config()], ids=["moe", "dense"])
def test_export_keeps_the_operators_that_the_compiler_looks_for(config: DecoderConfig) -> None:
    with FakeTensorMode():
        decoder = Decoder(config).eval()
        example = (torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        dynamic = {"tokens": {1: Dim("tokens", min=1, max=32)}, "start_pos": None}
        exported = torch.export.export(decoder, example, dynamic_shapes=dynamic, strict=False).run_decompositions({})
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    layers = config.layers
    assert names.count("aten.scaled_dot_product_attention.default") == layers
    assert names.count("aten.topk.default") == (layers if config.moe else 0)
    assert names.count("aten.index_copy.default") == 2 * layers
    assert len(exported.graph_signature.buffers_to_mutate) == 2 * layers
    # the exported function computes what the module does, at another length than the example's
    real = random_decoder(config)
    ids = torch.randint(0, config.vocab_size, (1, 11), generator=torch.Generator().manual_seed(7))
    state = {**dict(real.named_parameters()), **dict(real.named_buffers())}
    signature = exported.graph_signature
    weights = [
        state[signature.inputs_to_parameters.get(n) or signature.inputs_to_buffers[n]].clone()
        for n in (node.name for node in exported.graph.nodes if node.op == "placeholder")
        if n in signature.inputs_to_parameters or n in signature.inputs_to_buffers
    ]
    logits = exported.graph_module(*weights, ids, torch.tensor([0]))[-1]
    torch.testing.assert_close(logits, run(real, ids), atol=1e-5, rtol=1e-5)  # the same operators, decomposed


def test_a_model_is_traced_once_and_again_when_its_symbols_were_constrained() -> None:
    """What one compile lets the number of tokens be known for must not reach the next one."""
    first, other = export_decoder(config_of(), "a", None), export_decoder(config_of(), "b", None, max_tokens=9)
    again = export_decoder(config_of(), "c", None, max_tokens=1000)  # no more than the context
    assert again.exported is first.exported
    assert other.exported is not first.exported
    assert (first.info.name, again.info.name, other.info.max_tokens) == ("a", "c", 9)
    environment, digest = fake_mode_of(first.graph).shape_env, first.digest()
    tokens = next(n.meta["val"].shape[1] for n in first.graph.nodes if n.op == "placeholder" and n.name == "tokens")
    assert bool(tokens > 5)  # a guard: the trace now holds for more than five tokens only
    assert environment.guards
    anew = export_decoder(config_of(), "a", None)
    assert anew.exported is not first.exported
    assert not fake_mode_of(anew.graph).shape_env.guards
    assert anew.digest() == digest
