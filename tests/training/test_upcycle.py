"""From a dense model to a mixture: the same numbers where they can be, fitted routers, refusals before anything is
written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from moec.compiler.build import open_checkpoint
from moec.compiler.errors import CheckpointError, CompileError, SpecError, UserError
from moec.compiler.pipeline import run_passes
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.sources import source_of
from moec.passes.pipelines import fusion
from moec.sources.decoder.config import MoeConfig
from moec.training.checkpoints import load_model, write_checkpoint
from moec.training.upcycle.blocks import dense_blocks
from moec.training.upcycle.neurons import group
from moec.training.upcycle.recipe import recipe_for
from moec.training.upcycle.split import Block, chosen_weights, copy, split
from moec.training.upcycle.upcycle import upcycle
from tests.conftest import Moec, refused
from tests.harness import CONTEXT, VOCABULARY, export_toy
from tests.training.small import config_of, random_weights

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")
LLAMA: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 160, "context": 64, "norm_eps": 1e-5, "tied_embeddings": False, "qk_norm": False,
    "rope": {"theta": 500.0, "interleaved": False}, "bos_id": 0, "eos_ids": [1],
}  # fmt: skip
SPLIT = {"experts": 4, "top_k": 2, "expert_width": 16, "shared_width": 32, "scale": 2.0}
COPY = {"experts": 5, "top_k": 2, "expert_width": 96, "shared_width": 0, "scale": 1.0}
TEXT = " ".join(f"word{n * n % 89} and {n % 13}" for n in range(400))
# float32 sums of a hundred terms of order one in another order; logits are of order one
ATOL = 1e-5


def dense_folder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(LLAMA | changes))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def spec_of(moe: dict[str, Any], **changes: Any) -> Spec:
    model = MODEL | {"moe": moe} | changes
    return Spec.model_validate({"name": "mixture", "model": model, "quantization": "none", "targets": ["xnnpack"]})


def logits_of_dense(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return transformers.LlamaForCausalLM.from_pretrained(folder)(ids).logits


def logits_of(folder: Path, spec: Spec, ids: Tensor) -> Tensor:
    with torch.no_grad():
        (logits,) = load_model(folder, spec.model)(ids)  # type: ignore[arg-type]
    return logits


IDS = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "moe",
    [
        SPLIT | {"top_k": 4, "scale": 4.0},
        {"experts": 6, "top_k": 6, "expert_width": 16, "shared_width": 0, "scale": 6.0, "selection_bias": False},
        pytest.param(
            {"experts": 1, "top_k": 1, "expert_width": 32, "shared_width": 64, "scale": 1.0}, marks=pytest.mark.slow
        ),
        COPY,
        pytest.param(COPY | {"experts": 3, "top_k": 1}, marks=pytest.mark.slow),
    ],
    ids=["split", "split without a shared expert", "split into one", "copied", "copied, one chosen"],
)
def test_all_experts_of_a_split_and_any_copies_equal_the_dense_model(
    moe: dict[str, Any], dense: Path, text: Path, tmp_path: Path
) -> None:
    spec = spec_of(moe)
    found = upcycle(spec, dense, tmp_path / "out", text=text)
    assert found.recipe.kind == ("copy" if moe["expert_width"] == 96 else "split")
    wanted = logits_of_dense(dense, IDS)
    torch.testing.assert_close(logits_of(tmp_path / "out", spec, IDS), wanted, rtol=0, atol=ATOL)


def test_a_split_counts_tokens_and_is_near(dense: Path, text: Path, tmp_path: Path) -> None:
    spec = spec_of(SPLIT)
    found = upcycle(spec, dense, tmp_path / "out", text=text, refit=False)
    report = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert report == json.loads(json.dumps(found.report))
    tokens = report["text"]["tokens"]
    for layer in report["layers"]:
        assert sum(layer["tokens_per_expert"]) == 2 * tokens
        assert 0 < layer["error_of_best_choice"] < layer["error"] < 0.5
    assert report["neurons_active"] == pytest.approx(64 / 96)
    assert report["parameters"]["total"] > report["parameters"]["dense"] > report["parameters"]["active"]
    wanted, actual = logits_of_dense(dense, IDS), logits_of(tmp_path / "out", spec, IDS)
    assert (actual - wanted).abs().max() > 100 * ATOL, "a third of the neurons is left out"
    assert F.cosine_similarity(actual, wanted, dim=-1).mean() > 0.8


def test_the_spec_beside_it_compiles_to_one_node_a_layer(dense: Path, text: Path, tmp_path: Path) -> None:
    upcycle(spec_of(SPLIT), dense, tmp_path / "out", text=text)
    beside = load_spec(tmp_path / "out" / "spec.yaml")
    program = source_of(beside.model).export(beside, open_checkpoint(beside, None), max_tokens=32)
    fused = [n for n in run_passes(program, fusion()).graph.nodes if n.target is torch.ops.moec.fused_moe.default]
    assert len(fused) == 2


def test_our_own_dense_checkpoints_are_upcycled(text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"architecture": "mobilellm", "moe": None, "ffn_width": 96, "qk_norm": True}
    config = config_of(MODEL, **changes)
    write_checkpoint(tmp_path / "dense", config, random_weights(config), tokenizer=None)
    spec = spec_of(SPLIT | {"top_k": 4, "scale": 4.0}, qk_norm=True)
    upcycle(spec, tmp_path / "dense", tmp_path / "out", text=text)
    wanted = logits_of(tmp_path / "dense", spec.model_copy(update={"model": config}), IDS)
    torch.testing.assert_close(logits_of(tmp_path / "out", spec, IDS), wanted, rtol=0, atol=ATOL)


# --- one block ------------------------------------------------------------------------------------------------------


def block_of(seed: int, width: int, neurons: int) -> tuple[Block, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (
        torch.randn(s, generator=generator) for s in ((neurons, width), (neurons, width), (width, neurons))
    )
    return Block(gate / width**0.5, up / width**0.5, down / neurons**0.5), torch.randn(4000, width, generator=generator)


def output(mixture: Any, x_TD: Tensor, moe: MoeConfig) -> Tensor:
    """The layer by its definition, expert by expert."""
    weight_TE = chosen_weights(x_TD, mixture.router_ED, mixture.bias_E, moe)
    y_TD = torch.zeros_like(x_TD) if mixture.shared is None else mixture.shared.hidden(x_TD) @ mixture.shared.down_DF.T
    for e in range(moe.experts):
        gate, up = (x_TD @ mixture.gate_up_EDW[e]).chunk(2, -1)
        y_TD = y_TD + weight_TE[:, e : e + 1] * ((F.silu(gate) * up) @ mixture.down_EWD[e])
    return y_TD


@pytest.mark.parametrize("seed", range(4))
def test_the_refit_and_the_router_pay_on_text_they_have_not_seen(seed: int) -> None:
    width, moe = 13 + seed, MoeConfig(experts=5, top_k=2, expert_width=7, shared_width=20, scale=2.0)
    block, x_TD = block_of(seed, width, 55)
    new_TD = torch.randn(400, width, generator=torch.Generator().manual_seed(99))
    wanted = block.hidden(new_TD) @ block.down_DF.T
    errors = []
    for refit in (False, True):
        made = split(block, x_TD, moe, torch.Generator().manual_seed(0), refit=refit)
        assert made.report["refitted"] == refit
        errors.append(float((output(made, new_TD, moe) - wanted).square().sum()))
    assert errors[1] < errors[0]
    made.router_ED = torch.randn(made.router_ED.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    assert float((output(made, new_TD, moe) - wanted).square().sum()) > errors[1]


def test_too_little_text_is_not_fitted_to() -> None:
    block, x_TD = block_of(0, 16, 64)
    moe = MoeConfig(experts=4, top_k=2, expert_width=8, shared_width=32, scale=2.0)
    assert not split(block, x_TD[:100], moe, torch.Generator(), refit=True).report["refitted"]


def test_copies_are_all_used() -> None:
    block, x_TD = block_of(0, 24, 40)
    moe = MoeConfig(experts=7, top_k=2, expert_width=40, scale=1.0)
    made = copy(block, x_TD, moe, torch.Generator().manual_seed(0))
    tokens = made.report["tokens_per_expert"]
    assert sum(tokens) == 2 * len(x_TD)
    assert min(tokens) > 0.7 * 2 * len(x_TD) / 7
    wanted = block.hidden(x_TD) @ block.down_DF.T
    torch.testing.assert_close(output(made, x_TD, moe), wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("groups", "each"), [(3, 5), (8, 1), (1, 9), (12, 16)])
def test_groups_are_of_equal_size_and_find_what_fires_together(groups: int, each: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    planted_N = torch.randperm(groups * each, generator=generator) % groups
    topic_TE = torch.rand(600, groups, generator=generator) ** 8
    size_TN = topic_TE[:, planted_N] + 0.02 * torch.rand(600, len(planted_N), generator=generator)
    group_N = group(size_TN, groups, generator)
    assert torch.bincount(group_N, minlength=groups).tolist() == [each] * groups
    together = group_N[:, None] == group_N[None]
    assert torch.equal(together, planted_N[:, None] == planted_N[None])


def test_neurons_that_never_fire_are_grouped_too() -> None:
    group_N = group(torch.zeros(50, 12), 4, torch.Generator().manual_seed(0))
    assert torch.bincount(group_N, minlength=4).tolist() == [3] * 4


# --- blocks in a graph ------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """An embedding, a block, a head; the block's module is called what nobody else calls it."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(VOCABULARY, 16))
        self.horse = block()
        self.register_buffer("cache", torch.zeros(1, CONTEXT, 16))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        self.cache.index_copy_(1, start_pos + torch.arange(tokens.shape[1]), x)
        return F.linear(x + self.horse(x), self.table)


class Gated(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.act, self.packed = act, packed
        self.b = nn.Linear(16, 48 if packed else 24, bias=bias)
        self.a = nn.Linear(16, 24, bias=bias)
        self.c = nn.Linear(24, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gate, up = self.b(x).chunk(2, -1)
            return self.c(self.act(gate) * up)
        return self.c(self.a(x) * self.act(self.b(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.a(x)))


def test_a_block_is_found_by_what_it_computes() -> None:
    program = run_passes(export_toy(lambda: Toy(Gated)), fusion()[1:])
    (block,) = dense_blocks(program)
    assert (block.gate_name, block.up_name, block.down_name) == ("horse.b.weight", "horse.a.weight", "horse.c.weight")
    assert block.neurons == 24


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Gated(F.gelu), "gelu"),
        (lambda: Gated(bias=True), "biases"),
        (lambda: Gated(packed=True), "one weight"),
        (lambda: Gated(torch.tanh), "neither act(gate) * up"),
        (Plain, "not gated"),
        (nn.Identity, "no gated feed-forward block"),
    ],
)
def test_blocks_that_no_recipe_fits_are_refused(block: Callable[[], nn.Module], reason: str) -> None:
    program = run_passes(export_toy(lambda: Toy(block)), fusion()[1:])
    with pytest.raises(CompileError, match=reason.replace("(", r"\(").replace(")", r"\)").replace("*", r"\*")) as error:
        dense_blocks(program)
    assert "\n" not in str(error.value)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moe", "remedy"),
    [
        (SPLIT | {"expert_width": 18}, "shared_width: 24"),
        (SPLIT | {"shared_width": 0, "experts": 7}, "expert_width: 6"),
        (SPLIT | {"shared_width": 64, "expert_width": 32}, "expert_width: 8"),
        (SPLIT | {"scale": 1.0}, "scale: 2.0"),
        (SPLIT | {"selection_bias": False}, "selection_bias: true"),
        (COPY | {"scale": 2.0}, "scale: 1.0"),
        (COPY | {"shared_width": 96}, "shared_width: 0"),
    ],
)
def test_widths_that_make_no_recipe_name_the_nearest(moe: dict[str, Any], remedy: str) -> None:
    with pytest.raises(SpecError, match=remedy):
        recipe_for(MoeConfig.model_validate(moe), 96, "mixture")


@pytest.mark.parametrize(
    ("llama", "changes", "reason"),
    [
        ({"hidden_act": "gelu"}, {}, "the activation is gelu"),
        ({"mlp_bias": True}, {}, "the feed-forward block has biases"),
        ({"attention_bias": True}, {}, "attention has biases"),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}, {}, "of type linear"),
        ({}, {"rope": {"theta": 10000.0, "interleaved": False}}, "model.rope"),
        ({}, {"layers": 3, "heads": 8}, "model.layers is 3, it has 2; model.heads"),
        ({}, {"context": 65}, "was trained for 64"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    llama: dict[str, Any], changes: dict[str, Any], reason: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    folder = dense_folder(tmp_path / "dense", **llama) if llama else dense
    with pytest.raises(UserError, match=reason) as error:
        upcycle(spec_of(SPLIT, **changes), folder, tmp_path / "out", text=text)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_faults_of_the_input(dense: Path, text: Path, tmp_path: Path, moec: Moec) -> None:
    file = tmp_path / "spec.yaml"
    model = MODEL | {"moe": SPLIT}
    file.write_text(yaml.dump({"name": "m", "model": model, "quantization": "none", "targets": ["xnnpack"]}))
    out = tmp_path / "out"
    refused(moec("upcycle", file, "--from", tmp_path / "none", "--out", out), "no such checkpoint folder")
    refused(moec("upcycle", file, "--from", dense, "--out", out, "--text", text, "--data", tmp_path), "choose one")
    refused(moec("upcycle", file, "--from", dense, "--out", out, "--text", tmp_path / "gone.txt"), "cannot be read")
    few = tmp_path / "few.txt"
    few.write_text("only a few words")
    refused(moec("upcycle", file, "--from", dense, "--out", out, "--text", few, "-q"), "too few to fit routers")
    assert not out.exists()
    status, printed, err = moec("upcycle", file, "--from", dense, "--out", out, "--text", text, "--json", "-q")
    assert (status, err) == (0, "")
    assert json.loads(printed)["recipe"] == "split"
    status, printed, _ = moec("upcycle", file, "--from", dense, "--out", out, "--text", text, "-q")
    assert status == 0
    assert "67% of the dense block's" in printed
    refused(moec("upcycle", file, "--from", out, "--out", tmp_path / "again", "-q"), "is a mixture of experts already")


def test_a_mixture_of_transformers_is_no_dense_model(tmp_path: Path, text: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    with pytest.raises(CheckpointError, match="is a olmoe"):
        upcycle(spec_of(SPLIT), tmp_path, tmp_path / "out", text=text)
