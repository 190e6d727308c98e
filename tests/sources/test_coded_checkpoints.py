"""GPTQ, AWQ, compressed-tensors and FP8 checkpoints: codes are carried with exactly the values that their formats give
them, and what cannot be is refused by name or, if the spec says so, quantized anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moec as api
from moec.checkpoints import spec_from_config
from moec.compiler import build
from moec.compiler.errors import CheckpointError, UserError
from moec.compiler.quant import QuantizedTensor
from moec.compiler.quantizer import codes_of
from moec.compiler.source import Checkpoint
from moec.compiler.spec import Spec
from moec.compiler.spec.loader import parse_spec
from tests.conftest import Moec, refused
from tests.sources import coded_checkpoints as coded
from tests.sources import field_checkpoints as field
from tests.sources.coded_checkpoints import Packed, Random

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)
transformers.utils.logging.disable_progress_bar()
# 128 inputs are groups of 128 and of 32; 96 only of 32: a format of groups of 64 has to be split
DENSE: dict[str, Any] = {**field.DENSE, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
MOE: dict[str, Any] = {**field.MOE, "hidden_size": 128, "moe_intermediate_size": 96}
MIXTRAL: dict[str, Any] = {
    **DENSE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 3,
    "num_experts_per_tok": 2, "intermediate_size": 96,
}  # fmt: skip
PROJECTION = ("model.layers.0.self_attn.o_proj.weight", torch.Size((128, 64)))  # of DENSE
GPTQ: dict[str, Any] = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
AWQ: dict[str, Any] = {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True, "quant_method": "awq"}
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}


def compressed(form: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"format": form}}}


def packer(pack: Callable[..., Packed], **settings: Any) -> Callable[[int, int, int], Packed]:
    """`group`: -1 for one scale for each output; `less`: of GPTQ's zero points."""
    own = {key: settings.pop(key) for key in ("less",) if key in settings}
    group = settings.pop("group", 32)
    return lambda rows, width, seed: pack(
        Random(rows, width, group=width if group == -1 else group, seed=seed, **settings), **own
    )


# name -> (model, quantization_config, packer, the bits and groups that the implied spec stores)
CARRIED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[int, int, int], Packed], set[tuple[int, int]]]] = {
    "gptq, mixture": (MOE, GPTQ, packer(coded.gptq), {(4, 32)}),
    "gptq_v2, one scale for an output": (
        MIXTRAL,
        {**GPTQ, "group_size": -1, "checkpoint_format": "gptq_v2"},
        packer(coded.gptq, group=-1, less=0),
        {(4, 32), (4, 64)},
    ),
    "gptq, 8 bits": (DENSE, {**GPTQ, "bits": 8, "group_size": 64}, packer(coded.gptq, bits=8, group=64), {(8, 64)}),
    "gptq, 2 bits": (DENSE, {**GPTQ, "bits": 2}, packer(coded.gptq, bits=2), {(4, 32)}),
    "gptq with zero points": (DENSE, {**GPTQ, "sym": False}, packer(coded.gptq, zero_points=True), {(8, 32)}),
    "awq, mixture": (MIXTRAL, AWQ, packer(coded.awq, zero_points=True), {(8, 32)}),
    "awq without zero points": (DENSE, {**AWQ, "zero_point": False}, packer(coded.awq), {(4, 32)}),
    "w4a16, mixture, bfloat16 scales": (
        MOE,
        compressed("pack-quantized"),
        packer(coded.pack_quantized, scale_type=torch.bfloat16),
        {(4, 32)},
    ),
    "w4a16 with zero points": (
        DENSE,
        compressed("pack-quantized"),
        packer(coded.pack_quantized, zero_points=True, group=64, scale_type=torch.bfloat16),
        {(8, 64)},
    ),
    "w8a8": (
        MOE,
        compressed("int-quantized"),
        packer(coded.int_quantized, bits=8, group=-1, scale_type=torch.bfloat16),
        {(8, 32), (8, 64)},
    ),
}


def opened(folder: Path, *changes: tuple[str, str], dequantize: tuple[str, ...] = ()) -> tuple[Spec, Checkpoint]:
    """The spec that the folder implies, its text changed, and the checkpoint that `moec compile` would open for it."""
    text = spec_from_config(folder, dequantize)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    spec = parse_spec(text, folder=folder)
    store = build.open_checkpoint(spec, None)
    assert store is not None
    return spec, store


def values_in_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of transformers' own model of the values, under the names of its modules."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "floats", dtype=torch.float32)
    return dict(model.state_dict())


def role_of(name: str) -> str | None:
    """The role of a weight of these models, None for routers and norms."""
    ends = {"experts": "expert", "self_attn": "attention", "lm_head": "head", "embed_tokens": "embedding"}
    if "norm" in name or name.endswith("gate.weight"):
        return None
    return next((role for part, role in ends.items() if part in name), "ffn")


def codes_in(spec: Spec, store: Checkpoint, name: str, shape: torch.Size) -> tuple[str, QuantizedTensor]:
    """Where the codes of a weight come from, and what they are in the artifact of `spec`."""
    weight = store.weight(name, tuple(shape))
    assert spec.quantization is not None
    scheme = spec.quantization.scheme_of(str(role_of(name)))
    assert scheme is not None
    return str(weight.stored and weight.stored.provenance), codes_of(weight, scheme, name=name)


@pytest.mark.parametrize("name", CARRIED)
def test_codes_have_the_values_of_their_format(name: str, tmp_path: Path) -> None:
    config, section, pack, formats = CARRIED[name]
    folder = coded.write(tmp_path, config, section, pack)
    spec, store = opened(folder)
    found, roles = set(), set()
    for weight, wanted in values_in_transformers(folder).items():
        if role_of(weight) in (None, "head", "embedding"):
            assert torch.equal(store.weight(weight, tuple(wanted.shape)).load(), wanted)
            continue
        origin, codes = codes_in(spec, store, weight, wanted.shape)
        assert origin.startswith("carried: ")
        assert torch.equal(codes.dequantize(), wanted), weight
        found.add((codes.bits, codes.group_size))
        roles.add(role_of(weight))
    assert found == formats
    assert roles == {"attention", "ffn" if config is DENSE else "expert"}


def test_symmetric_codes_are_those_of_the_file(tmp_path: Path) -> None:
    """Not only their values: the integers themselves."""
    spec, store = opened(coded.write(tmp_path, DENSE, GPTQ, packer(coded.gptq)))
    names = sorted(load_file(tmp_path / "floats" / field.WEIGHTS))
    made = Random(*PROJECTION[1], seed=names.index(PROJECTION[0]))
    _, codes = codes_in(spec, store, *PROJECTION)
    assert np.array_equal(codes.unpacked().numpy() + 8, made.q)
    assert torch.equal(codes.scales, made.scales)


@pytest.mark.parametrize(
    "name", ["gptq, mixture", *(pytest.param(n, marks=pytest.mark.slow) for n in ("awq, mixture", "w8a8"))]
)
def test_the_artifact_gives_the_logits_of_transformers(name: str, moec: Moec, tmp_path: Path) -> None:
    config, section, pack, formats = CARRIED[name]
    bits, group = min(formats)
    folder = coded.write(tmp_path, config, section, pack)
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"name: coded\nmodel: {{transformers: {folder}}}\ntargets: {{xnnpack: {{max_tokens: 32}}}}\n"
        f"quantization: {{weights: int{bits}, group_size: {group}, expert_group_axis: in, activations: fp32, "
        "kv_cache: fp32, embedding: fp32, head: fp32}\n"
    )
    status, out, err = moec("compile", spec, "--out", tmp_path / "art", "-q")
    assert status == 0, err
    assert ("carried bit for bit: " in out) == ("awq" not in name)
    ids = list(range(3, 30))
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
        wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    found = np.asarray(api.load(tmp_path / "art").prefill(ids, logits="all"))
    # the same values in float32, added in another order: as for float artifacts
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


# --- what cannot be carried ------------------------------------------------------------------------------------------


def test_act_order_is_refused_by_name_and_its_values_are_read_if_asked(tmp_path: Path) -> None:
    def pack(rows: int, width: int, seed: int) -> Packed:
        order = np.random.default_rng(seed).permutation(np.arange(width) // 32)
        return coded.gptq(Random(rows, width, seed=seed, group_of=order))

    folder = coded.write(tmp_path, DENSE, {**GPTQ, "desc_act": True}, pack)
    with pytest.raises(CheckpointError, match="order of their activations") as caught:
        opened(folder)
    assert "dequantize: [GPTQ]" in str(caught.value.remedy)
    quantized_anew(folder, "gptq")


def quantized_anew(folder: Path, kind: str) -> None:
    """Assert that weights are rounded from exactly the values of the format."""
    spec, store = opened(folder, dequantize=(kind,))
    wanted = values_in_transformers(folder)
    for name, value in wanted.items():
        assert torch.equal(store.weight(name, tuple(value.shape)).load(), value), name
    origin, codes = codes_in(spec, store, PROJECTION[0], wanted[PROJECTION[0]].shape)
    assert (origin, codes.bits) == ("None", 4)


def test_an_order_that_config_json_denies_is_found(tmp_path: Path) -> None:
    def pack(rows: int, width: int, seed: int) -> Packed:
        return coded.gptq(Random(rows, width, seed=seed, group_of=(np.arange(width) // 32)[::-1].copy()))

    spec, store = opened(coded.write(tmp_path, DENSE, GPTQ, pack))
    with pytest.raises(CheckpointError, match="g_idx"):
        codes_in(spec, store, *PROJECTION)


def test_act_order_that_orders_nothing_is_carried(tmp_path: Path) -> None:
    spec, store = opened(coded.write(tmp_path, DENSE, {**GPTQ, "desc_act": True}, packer(coded.gptq)))
    assert codes_in(spec, store, *PROJECTION)[0] == "carried: GPTQ"


@pytest.mark.parametrize(
    ("config", "section", "pack", "says"),
    [
        (DENSE, FP8, lambda n, k, seed: coded.fp8_blocks(n, k, 64, seed), "no kernels for FP8"),
        (DENSE, {**GPTQ, "group_size": 16}, packer(coded.gptq, group=16), "no group of 32"),
        (
            DENSE,
            {**GPTQ, "bits": 8, "sym": False},
            packer(coded.gptq, bits=8, zero_points=True),
            "8 bits with zero points",
        ),
        (DENSE, {**GPTQ, "checkpoint_format": "marlin"}, packer(coded.gptq), "marlin"),
        (DENSE, {**GPTQ, "group_size": 64}, lambda n, k, s: _without_groups(coded.gptq(Random(n, k))), "groups of 64"),
        (DENSE, {**AWQ, "version": "gemv"}, packer(coded.awq), "gemv"),
        (DENSE, {**compressed("pack-quantized"), "transform_config": {"u": 1}}, packer(coded.pack_quantized), "rotat"),
        (DENSE, compressed("nvfp4-pack-quantized"), packer(coded.pack_quantized), "nvfp4-pack-quantized"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    config: dict[str, Any], section: dict[str, Any], pack: Any, says: str, moec: Moec, tmp_path: Path
) -> None:
    folder = coded.write(tmp_path, config, section, pack)
    refused(moec("compile", folder, "--out", tmp_path / "art", "-q"), says)
    assert not (tmp_path / "art").exists()


def _without_groups(packed: Packed) -> Packed:
    tensors, values = packed
    return {end: t for end, t in tensors.items() if end != "g_idx"}, values


@pytest.mark.parametrize(
    ("section", "pack", "says"),
    [
        (GPTQ, packer(coded.gptq, zero_points=True), "correct `sym`"),
        ({**GPTQ, "sym": False}, lambda n, k, s: coded.gptq(_with_zero_point(Random(n, k), 0)), "gptq_v2"),
        (GPTQ, packer(lambda made: coded.gptq(_scaled(made, 1e-9)), scale_type=torch.float32), "float16 does not hold"),
    ],
)
def test_contents_that_have_no_codes_of_ours(section: dict[str, Any], pack: Any, says: str, tmp_path: Path) -> None:
    spec, store = opened(coded.write(tmp_path, DENSE, section, pack))
    with pytest.raises(CheckpointError, match=says):
        codes_in(spec, store, *PROJECTION)


def _with_zero_point(made: Random, value: int) -> Random:
    made.zeros[:] = value
    return made


def _scaled(made: Random, factor: float) -> Random:
    made.scales = made.scales * factor
    return made


def test_a_scale_that_float16_lacks_does_not_matter_where_all_codes_are_zero(tmp_path: Path) -> None:
    def pack(rows: int, width: int, seed: int) -> Packed:
        made = Random(rows, width, seed=seed, scale_type=torch.float32)
        made.scales = made.scales.half().float()
        made.q[:, :32], made.scales[:, 0] = 8, 1e-12
        return coded.gptq(made)

    spec, store = opened(coded.write(tmp_path, DENSE, GPTQ, pack))
    value = codes_in(spec, store, *PROJECTION)[1].dequantize()
    assert not value[:, :32].any()
    assert value[:, 32:].any()


def test_fp8_is_quantized_anew_where_the_spec_says_so(tmp_path: Path) -> None:
    quantized_anew(coded.write(tmp_path, MOE, FP8, lambda n, k, seed: coded.fp8_blocks(n, k, 64, seed)), "fp8")


@pytest.mark.parametrize("block", [96, 80, 128])  # of 192 rows: 2, 3 (cut) and 2 (cut) blocks; 128 columns: 2, 2, 1
@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("weight_scale_inv", {"quant_method": "fp8"}),
        ("weight_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ],
)
def test_blocks_that_are_cut_have_the_size_that_config_json_says(
    block: int, kind: str, section: dict[str, Any], tmp_path: Path
) -> None:
    if kind == "weight_scale":
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [block, block]}
        section = {**section, "config_groups": {"group_0": {"weights": weights}}}
    elif block != 128:  # which is what a config that says nothing means
        section = {**section, "weight_block_size": [block, block]}
    folder = coded.write(tmp_path, DENSE, section, lambda n, k, s: coded.fp8_blocks(n, k, block, s, scale=kind))
    quantized_anew(folder, "fp8" if section["quant_method"] == "fp8" else "compressed-tensors")


@pytest.mark.parametrize("structures", [(), ("96x96", [112, 112]), ("96",), ([96],), ([0, 96],)])
def test_blocks_of_a_size_that_config_json_does_not_tell_are_refused(structures: Any, tmp_path: Path) -> None:
    """192 rows in two blocks are 96 and 96, 112 and 80, or 128 and 64."""
    groups = {f"group_{i}": {"weights": {"block_structure": given}} for i, given in enumerate(structures)}
    section = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    folder = coded.write(tmp_path, DENSE, section, lambda n, k, s: coded.fp8_blocks(n, k, 96, s, scale="weight_scale"))
    with pytest.raises(CheckpointError, match=r"one for each block|block_structure"):
        opened(folder, dequantize=("compressed-tensors",))


def test_fp8_computes_with_its_values_where_nothing_is_quantized(tmp_path: Path) -> None:
    folder = coded.write(tmp_path, MOE, FP8, lambda n, k, seed: coded.fp8_blocks(n, k, 64, seed))
    spec = parse_spec(f"name: f\nmodel: {{transformers: {folder}}}\nquantization: none\n", folder=folder)
    store = build.open_checkpoint(spec, None)
    assert store is not None
    weight = store.weight(PROJECTION[0], (128, 64))
    assert weight.stored is None
    assert torch.equal(weight.load(), values_in_transformers(folder)[PROJECTION[0]])


def test_codes_in_a_format_that_the_spec_does_not_say_are_refused(moec: Moec, tmp_path: Path) -> None:
    folder = coded.write(tmp_path, DENSE, {**GPTQ, "bits": 8}, packer(coded.gptq, bits=8))
    spec = tmp_path / "spec.yaml"
    spec.write_text(spec_from_config(folder).replace("weights: int8\n  group", "weights: int4\n  group"))
    out = tmp_path / "art"
    refused(moec("compile", spec, "--out", out, "-q"), "holds INT8 codes in groups of 32 along in", "asks for INT4")


def test_more_bits_and_smaller_groups_hold_the_same_values(tmp_path: Path) -> None:
    folder = coded.write(tmp_path, DENSE, {**GPTQ, "group_size": 64}, packer(coded.gptq, group=64))
    spec, store = opened(folder, ("int4", "int8"), ("group_size: 64", "group_size: 32"))
    _, codes = codes_in(spec, store, *PROJECTION)
    assert (codes.bits, codes.group_size) == (8, 32)
    assert torch.equal(codes.dequantize(), values_in_transformers(folder)[PROJECTION[0]])


def test_an_expert_in_float_among_codes_is_named(tmp_path: Path) -> None:
    folder = coded.write(tmp_path, MOE, GPTQ, packer(coded.gptq))
    tensors = load_file(folder / field.WEIGHTS)
    stem = "model.layers.0.mlp.experts.2.up_proj"
    for end in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{stem}.{end}"]
    field.save(folder, {**tensors, f"{stem}.weight": torch.zeros(96, 128)})
    _, store = opened(folder)
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.weight, which belongs to the same tensor, is F32"):
        store.weight("model.layers.0.mlp.experts.gate_up_proj", (4, 192, 128))


def test_scales_of_inputs_are_not_read_and_that_is_said(tmp_path: Path) -> None:
    def pack(rows: int, width: int, seed: int) -> Packed:
        tensors, values = coded.int_quantized(Random(rows, width, bits=8, group=width, seed=seed))
        return {**tensors, "input_scale": torch.ones(1)}, values

    _, store = opened(coded.write(tmp_path, DENSE, compressed("int-quantized"), pack))
    assert any("7 scales of inputs" in note for note in store.notes)
    assert any(note == "compressed-tensors tensors carried bit for bit: 7" for note in store.notes)


@pytest.mark.parametrize("end", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("change", ["cut", "typed", "gone"])
def test_damaged_parts_are_refused(end: str, change: str, tmp_path: Path) -> None:
    folder = coded.write(tmp_path, DENSE, GPTQ, packer(coded.gptq))
    tensors = load_file(folder / field.WEIGHTS)
    name = f"model.layers.0.self_attn.o_proj.{end}"
    if change == "gone":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:] if change == "cut" else tensors[name].to(torch.float64)
    field.save(folder, tensors)
    if (end, change) == ("g_idx", "gone"):  # inputs are then side by side
        spec, store = opened(folder)
        assert codes_in(spec, store, *PROJECTION)[0] == "carried: GPTQ"
        return
    with pytest.raises(CheckpointError):
        opened(folder)


def test_what_dequantize_may_name(tmp_path: Path) -> None:
    folder = coded.write(tmp_path, DENSE, GPTQ, packer(coded.gptq))
    with pytest.raises(UserError, match="NVFP4 is no format"):
        spec_from_config(folder, ["NVFP4"])
    text = json.dumps(spec_from_config(folder, ["gptq"]))
    assert "dequantize" in text
