"""LoRA adapters of PEFT, merged before quantization: every module gets exactly W + s B A, or the adapter is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.compiler import build
from moec.compiler.errors import CheckpointError
from moec.compiler.source import Checkpoint
from moec.compiler.spec.loader import parse_spec
from moec.sources.transformers_source import TransformersModel
from tests.sources import coded_checkpoints as coded
from tests.sources import field_checkpoints as field

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)
transformers.utils.logging.disable_progress_bar()
LAYER = "model.layers.0"
# a shared expert beside the routed ones, and 48 inputs of experts where the model has 64
SHARED: dict[str, Any] = {
    **field.MOE, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}  # fmt: skip
MODULES = {  # [outputs, inputs]
    f"{LAYER}.self_attn.q_proj": (64, 64),
    f"{LAYER}.self_attn.v_proj": (32, 64),
    f"{LAYER}.mlp.shared_expert.down_proj": (64, 80),
    f"{LAYER}.mlp.experts.2.gate_proj": (48, 64),
    f"{LAYER}.mlp.experts.3.down_proj": (64, 48),
    "lm_head": (160, 64),
}
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}


def matrices(module: str, shape: tuple[int, int], rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator) / 8,
        f"base_model.model.{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator) / 8,
    }


def adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    field.save(folder, dict(tensors), "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA | config))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A mixture with a shared expert, and its tensors as stored; the folder is not to be changed."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return folder, field.healthy(folder, SHARED)


def opened(folder: Path, *adapters: Path, more: str = "") -> Checkpoint:
    listed = ", ".join(str(path) for path in adapters)
    text = f"name: a\nmodel: {{transformers: {folder}, adapters: [{listed}]{more}}}\nquantization: {{weights: int4}}\n"
    store = build.open_checkpoint(parse_spec(text, folder=folder), None)
    assert store is not None
    return store


def merged_folder(folder: Path, out: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """The same model with the given tensors, as somebody who merged them would have saved it."""
    out.mkdir()
    shutil.copyfile(folder / "config.json", out / "config.json")
    field.save(out, dict(tensors))
    text = f"name: a\nmodel: {{transformers: {out}}}\nquantization: {{weights: int4}}\n"
    store = build.open_checkpoint(parse_spec(text, folder=out), None)
    assert store is not None
    return store


def assert_same(found: Checkpoint, wanted: Checkpoint, folder: Path) -> None:
    """Every tensor of the model, in the form in which it is compiled."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in shapes.items():
        mine, theirs = (store.weight(name, tuple(tensor.shape)).load() for store in (found, wanted))
        # the same float32 arithmetic; products of float32 matrices may be summed in another order
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_every_kind_of_module_is_merged(
    rslora: bool, scaling: float, base: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Attention, the shared expert, single routed experts, the head."""
    folder, tensors = base
    updates: dict[str, Tensor] = {}
    wanted = dict(tensors)
    for seed, (module, shape) in enumerate(MODULES.items()):
        updates |= matrices(module, shape, seed=seed)
        a, b = (updates[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        weight = wanted[f"{module}.weight"]
        wanted[f"{module}.weight"] = (weight.double() + scaling * (b @ a)).float()
    store = opened(folder, adapter(tmp_path / "lora", updates, use_rslora=rslora))
    assert_same(store, merged_folder(folder, tmp_path / "merged", wanted), folder)
    assert "merged: adapter lora, 6 modules of rank 4" in store.notes


def test_ranks_and_alphas_by_name_and_two_adapters(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, tensors = base
    q, v = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"
    first = {**matrices(q, (64, 64), rank=2), **matrices(v, (32, 64), seed=1)}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.v_proj": 10}}
    one = adapter(tmp_path / "one", first, **patterns)
    second = matrices(q, (64, 64), seed=2)
    two = adapter(tmp_path / "two", second)
    wanted = dict(tensors)
    for module, scale, held in ((q, 6 / 2, first), (v, 10 / 4, first), (q, 6 / 4, second)):
        a, b = (held[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        wanted[f"{module}.weight"] = (wanted[f"{module}.weight"].double() + scale * (b @ a)).float()
    assert_same(opened(folder, one, two), merged_folder(folder, tmp_path / "merged", wanted), folder)


def test_dora_keeps_the_norm_of_each_row(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, tensors = base
    module = f"{LAYER}.self_attn.q_proj"
    magnitude = torch.rand(64) + 0.5
    updates = {**matrices(module, (64, 64)), f"base_model.model.{module}.lora_magnitude_vector": magnitude}
    a, b = (updates[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    moved = tensors[f"{module}.weight"].double() + 1.5 * (b @ a)
    scaled = moved / moved.square().sum(1, keepdim=True).sqrt() * magnitude.double()[:, None]
    wanted = {**tensors, f"{module}.weight": scaled.float()}
    store = opened(folder, adapter(tmp_path / "dora", updates, use_dora=True))
    assert_same(store, merged_folder(folder, tmp_path / "merged", wanted), folder)


def test_parameters_that_hold_a_matrix_for_each_expert(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """`target_parameters`: A has the experts one after the other, B has them side by side; the one of 96 outputs is
    gate and up, whatever wraps what."""
    folder, tensors = base
    experts = f"{LAYER}.mlp.experts"
    up = matrices(f"{experts}.base_layer", (96, 64), rank=4 * 2, seed=1)
    down = matrices(experts, (64, 48), rank=4 * 2, seed=2)
    wanted = dict(tensors)
    for e in range(4):
        for held, module in ((up, f"{experts}.base_layer"), (down, experts)):
            a, b = (held[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
            delta = torch.einsum("or,ri->oi", b.reshape(b.shape[0], 2, 4)[..., e], a.reshape(4, 2, -1)[e]) * 6 / 2
            parts = {"gate_proj": delta[:48], "up_proj": delta[48:]} if held is up else {"down_proj": delta}
            for part, change in parts.items():
                name = f"{experts}.{e}.{part}.weight"
                wanted[name] = (wanted[name].double() + change).float()
    store = opened(folder, adapter(tmp_path / "lora", {**up, **down}, r=2))
    assert_same(store, merged_folder(folder, tmp_path / "merged", wanted), folder)


GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
    "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64, "eos_token_id": 2,
}  # fmt: skip
# 64 by 64: only the version tells which side of the matrices A is on
SQUARE: dict[str, Any] = {**SHARED, "moe_intermediate_size": 64}


@pytest.mark.parametrize(
    ("version", "config", "turned"),
    [
        ("0.18.1", SQUARE, True),
        ("0.19.0", SQUARE, True),
        ("0.19.1", SQUARE, False),
        ("0.20.0.dev0@UNKNOWN", SQUARE, False),
        ("0.18.0", GPT_OSS, False),  # its parameters are [E, inputs, outputs]
        ("0.19.0", GPT_OSS, True),
        ("0.19.1", GPT_OSS, False),
        (None, GPT_OSS, False),
    ],
)
def test_versions_of_peft_saved_square_stacks_either_way(
    version: str | None, config: dict[str, Any], turned: bool, tmp_path: Path
) -> None:
    """`down_proj` [E, 64, 64] plus s B A of each expert, from inputs to outputs unless `turned`."""
    folder = tmp_path / "base"
    field.healthy(folder, config)
    module, count = f"{LAYER}.mlp.experts", 4 if config is SQUARE else 3
    held = matrices(module, (64, 64), rank=count * 2)
    a, b = (held[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    delta_EON = torch.einsum("ore,eri->eoi", b.reshape(64, 2, count), a.reshape(count, 2, 64)) * 6 / 2
    said = {} if version is None else {"peft_version": version}
    found, plain = (
        opened(folder, *adapters).weight(f"{module}.down_proj", (count, 64, 64)).load().double()
        for adapters in ((adapter(tmp_path / "lora", held, r=2, **said),), ())
    )
    stored_in_first = config is GPT_OSS
    wanted = delta_EON.transpose(1, 2) if stored_in_first != turned else delta_EON
    torch.testing.assert_close(found - plain, wanted, atol=1e-5, rtol=1e-5)


def test_a_square_stack_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    field.healthy(folder, SQUARE)
    held = matrices(f"{LAYER}.mlp.experts", (64, 64), rank=8)
    with pytest.raises(CheckpointError, match="square, and names no peft_version"):
        opened(folder, adapter(tmp_path / "lora", held, r=2))


def test_a_table_of_embeddings(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, tensors = base
    a, b = torch.randn(4, 160) / 8, torch.randn(64, 4) / 8
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    wanted = {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1.5 * (b @ a).t()}
    store = opened(folder, adapter(tmp_path / "lora", {f"{prefix}A": a, f"{prefix}B": b}))
    assert_same(store, merged_folder(folder, tmp_path / "merged", wanted), folder)


def test_the_digest_covers_the_numbers_of_an_adapter(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Calibration results are kept by it: another adapter of the same shapes is another model."""
    folder, _ = base
    module = f"{LAYER}.self_attn.q_proj"
    digests = {
        opened(folder, adapter(tmp_path / str(seed), matrices(module, (64, 64), seed=seed))).digest() for seed in (1, 2)
    }
    assert len(digests | {opened(folder).digest()}) == 3


def test_codes_that_are_carried_are_not_changed(tmp_path: Path) -> None:
    section = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
    folder = coded.write(tmp_path, dict(field.DENSE), section, lambda n, k, s: coded.gptq(coded.Random(n, k, seed=s)))
    change = adapter(tmp_path / "lora", matrices(f"{LAYER}.self_attn.q_proj", (64, 64)))
    with pytest.raises(CheckpointError, match="are carried and cannot be changed") as caught:
        opened(folder, change)
    assert "dequantize: [GPTQ]" in str(caught.value.remedy)
    assert "merged" in " ".join(opened(folder, change, more=", dequantize: [GPTQ]").notes)


Q = f"{LAYER}.self_attn.q_proj"
NAMES = [f"base_model.model.{Q}.lora_{x}.weight" for x in "AB"]
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "another method": (lambda t, c: c.update(peft_type="IA3"), "type IA3"),
    "trained biases": (lambda t, c: t.update({f"base_model.model.{Q}.bias": torch.ones(64)}), "trained biases"),
    "whole weights": (lambda t, c: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), "whole weights"),
    "a bias of B": (lambda t, c: c.update(lora_bias=True), "lora_bias"),
    "changed base": (lambda t, c: c.update(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "another model": (lambda t, c: t.update(matrices(f"{LAYER}.mlp.fc1", (8, 8))), "fc1, which the model does not"),
    "another width": (lambda t, c: t.update(matrices(Q, (64, 32))), r"by \[64, 32\], the model has \[64, 64\]"),
    "no B": (lambda t, c: t.pop(NAMES[1]), "no lora_B"),
    "ranks that do not fit": (lambda t, c: t.update({NAMES[1]: torch.ones(64, 3)}), "do not fit"),
    "another rank": (lambda t, c: c.update(r=3), "does not divide"),
    "half the rank": (lambda t, c: c.update(r=2), "has rank 4, adapter_config.json says 2"),
    "no rank": (lambda t, c: c.update(r=0), "rank 0"),
    "no number": (lambda t, c: c.update(lora_alpha="x"), "lora_alpha is x"),
    "a number that no float holds": (lambda t, c: c.update(lora_alpha=10**400), "lora_alpha is 1000"),
    "an expression": (lambda t, c: c.update(rank_pattern={"(a+)+b": 4}), "no regular expressions"),
    "codes": (lambda t, c: t.update({NAMES[0]: torch.ones(4, 64, dtype=torch.int8)}), "no floats"),
    "dora without norms": (lambda t, c: c.update(use_dora=True), "contradict"),
    "empty": (lambda t, c: t.clear(), "no tensors"),
}


def test_a_copy_of_the_base_weight_must_be_the_same(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """PEFT saves one beside an updated head or table."""
    folder, tensors = base
    updates, copy = matrices("lm_head", (160, 64)), tensors["lm_head.weight"]
    name = "base_model.model.lm_head.base_layer.weight"
    assert opened(folder, adapter(tmp_path / "same", {**updates, name: copy})).notes
    with pytest.raises(CheckpointError, match="weight of lm_head of the base model, and the files have another"):
        opened(folder, adapter(tmp_path / "other", {**updates, name: copy + 1}))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged_is_refused(name: str, base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    change, says = REFUSED[name]
    tensors, config = matrices(Q, (64, 64)), dict(LORA)
    change(tensors, config)
    with pytest.raises(CheckpointError, match=says) as caught:
        opened(base[0], adapter(tmp_path / "lora", tensors, **config))
    assert len(str(caught.value).splitlines()) == 1


def test_a_head_that_is_the_table_too(tmp_path: Path) -> None:
    field.healthy(tmp_path / "tied", {**field.DENSE, "tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match="as its output head and as its table"):
        opened(tmp_path / "tied", adapter(tmp_path / "lora", matrices("lm_head", (160, 64))))


def test_paths_are_relative_to_the_spec(tmp_path: Path) -> None:
    text = "name: a\nmodel: {transformers: base, adapters: [one, /two]}\nquantization: none\n"
    spec = parse_spec(text, folder=tmp_path)
    assert isinstance(spec.model, TransformersModel)
    assert spec.model.adapters == (tmp_path / "one", Path("/two"))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", None])
def test_a_folder_that_is_no_adapter(missing: str | None, base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    if missing is not None:
        (adapter(folder, matrices(Q, (64, 64))) / missing).unlink()
    with pytest.raises(CheckpointError, match=missing or "no such folder"):
        opened(base[0], folder)
