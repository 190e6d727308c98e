"""Checkpoints: what is synthesized is read back, bit for bit; what does not fit is refused with file and remedy."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moec import checkpoints
from moec.checkpoints.config_json import config_from_json, config_to_json
from moec.checkpoints.folder import INDEX
from moec.checkpoints.safetensors_file import SafetensorsWriter, read_header
from moec.checkpoints.store import WeightStore, expected_tensors, open_store, packed_names
from moec.compiler.artifact import file_digest
from moec.compiler.errors import CheckpointError, SpecError, UserError
from moec.compiler.quant import QuantizedTensor, quantize_weight, unpack_int4
from moec.compiler.spec.loader import load_spec, parse_spec
from moec.compiler.spec.model import Spec
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import weight_layout
from moec.sources.decoder.simulate import Reference
from moec.sources.inspection import inspect

SPARSE = {
    "architecture": "mobilemoe", "layers": 2, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "vocab_size": 97, "context": 32, "qk_norm": True, "bos_id": 3, "eos_ids": [5, 9],
    "rope": {"theta": 500000.0, "interleaved": True, "scaling": {"factor": 16.0, "original_context": 32}},
    "moe": {"experts": 5, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
DENSE = {key: value for key, value in SPARSE.items() if key != "moe"} | {
    "architecture": "mobilellm", "layers": 5, "ffn_width": 96, "tied_embeddings": False,
    "attention_window": {"size": 8, "every_nth_global": 4},
}  # fmt: skip
QUANTIZATION = {"weights": "int4"}


def spec_of(model: dict[str, Any] = SPARSE, **changes: Any) -> Spec:
    return Spec.model_validate({"name": "test", "model": model | changes, "quantization": QUANTIZATION})


def make(folder: Path, *, qat: bool = True, spec: Spec | None = None, seed: int = 0) -> Path:
    return checkpoints.synthesize(spec or spec_of(), folder, seed=seed, qat=qat)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, spec: Spec | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_store(folder, (spec or spec_of()).model)
    text = str(caught.value)
    assert str(folder) in text  # the place
    assert all(";" in line or "..." in line for line in text.splitlines() if "config.json" not in line)  # a remedy
    return text


# --- reading what was written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SPARSE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("qat", [True, False], ids=["packed", "float"])
def test_weights_are_the_files(tmp_path: Path, model: dict[str, Any], qat: bool) -> None:
    """The library of the format reads our files; our reader gives the same bits, dequantized and as they are."""
    spec = spec_of(model)
    store = open_store(make(tmp_path / "c", qat=qat, spec=spec), spec.model)
    theirs = load_file(tmp_path / "c" / "model.safetensors")
    assert set(theirs) == set(expected_tensors(spec.model, packed=qat))
    assert store.bytes == sum(t.numel() * t.element_size() for t in theirs.values())
    for name, info in weight_layout(spec.model).items():
        lazy = store[name]
        assert lazy.shape == info.shape
        value = lazy.load()
        assert value.dtype == torch.float32
        if lazy.stored is None:
            assert torch.equal(value, theirs[name].float())
            continue
        codes, scales = (theirs[part] for part in packed_names(name))
        stored = lazy.stored.load()
        assert torch.equal(stored.codes, codes)
        assert torch.equal(stored.scales, scales)
        by_hand = unpack_int4(codes).float() * scales.float().repeat_interleave(32, -1)
        assert torch.equal(value, by_hand)
    assert {info.name for info in weight_layout(spec.model).values() if store[info.name].stored} == {
        info.name for info in weight_layout(spec.model).values() if qat and info.role.value not in ("router", "norm")
    }


def test_released_names_and_types(tmp_path: Path) -> None:
    with safe_open(make(tmp_path / "c") / "model.safetensors", "pt") as file:
        found = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    layer = "model.layers.1."
    assert found["model.embed_tokens.qweight"] == ("U8", [97, 32])
    assert found["model.embed_tokens.weight_scale"] == ("F16", [97, 2])
    assert found[layer + "input_layernorm.weight"] == ("BF16", [64])
    assert found[layer + "self_attn.k_proj.qweight"] == ("U8", [32, 32])
    assert found[layer + "feed_forward.router.weight"] == ("F32", [5, 64])
    assert found[layer + "feed_forward.expert_bias"] == ("BF16", [5])
    assert found[layer + "feed_forward.experts.gate_up_qweight"] == ("U8", [5, 64, 32])
    assert found[layer + "feed_forward.experts.gate_up_scale"] == ("F16", [5, 64, 2])
    assert found[layer + "feed_forward.experts.down_qweight"] == ("U8", [5, 32, 32])
    assert found[layer + "feed_forward.shared_expert.down_proj.weight_scale"] == ("F16", [64, 2])


def test_size_of_the_released_s_checkpoint() -> None:
    """All tensors of MobileMoE-S packed; the released file has 713,916,240 bytes, 53,232 of them its header."""
    config = load_spec(Path(__file__).parents[2] / "specs/models/mobilemoe-s.yaml").model
    sizes = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
    total = 0
    for wanted in expected_tensors(config, packed=True).values():  # type: ignore[arg-type]
        dtype = "F32" if wanted.name.endswith("router.weight") else wanted.dtypes[0]
        total += int(np.prod(wanted.shape)) * sizes[dtype]
    assert total == 713_863_008


def test_sharded_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    whole = open_store(folder, spec_of().model)
    names = list(whole.entries)
    tensors = load_file(folder / "model.safetensors")
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    refused = refusal(folder)
    assert "3 safetensors files and no model.safetensors.index.json" in refused
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))
    sharded = open_store(folder, spec_of().model)
    for name in weight_layout(spec_of().model):
        assert torch.equal(sharded[name].load(), load_weight(tensors, name))
    assert sharded.digest() != whole.digest()
    (folder / next(iter(shards))).unlink()
    assert "model-00001-of-00003.safetensors: missing" in refusal(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../evil.safetensors"}}))
    assert "not a file of this folder" in refusal(folder)
    (folder / INDEX).write_text("[1]")
    assert "not a JSON mapping" in refusal(folder)


def test_what_no_index_names_is_not_read(tmp_path: Path) -> None:
    """A left-over shard, and a tensor that a second file also holds: neither overrides, and both are said."""
    folder = make(tmp_path / "c", qat=False)
    tensors = load_file(folder / "model.safetensors")
    twice = next(iter(tensors))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({"extra": torch.zeros(3), twice: torch.zeros(2)}, folder / "two.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "stale.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "one.safetensors")}))
    store = open_store(folder, spec_of().model)
    for name in weight_layout(spec_of().model):
        assert torch.equal(store[name].load(), tensors[name].float())
    assert len(store.notes) == 1
    assert "stale.safetensors, two.safetensors" in store.notes[0]


@pytest.mark.parametrize("qat", [True, False])
def test_codes_and_scales_that_the_layout_does_not_have(tmp_path: Path, qat: bool) -> None:
    folder = make(tmp_path / "c", qat=qat)
    name = "model.layers.0.self_attn.q_proj"
    edit_tensors(folder, lambda t: t.update({f"{name}.SCB": torch.ones(64)}))
    assert f"{name}.SCB is not part of the model" in refusal(folder)
    if not qat:
        edit_tensors(folder, lambda t: t.update({f"{name}.weight": t[f"{name}.weight"].to(torch.int8)}))
        assert f"{name}.weight is I8" in refusal(folder)


def load_weight(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in tensors:
        return tensors[name].float()
    codes, scales = packed_names(name)
    return QuantizedTensor(tensors[codes], tensors[scales], 4, 32).dequantize()


def test_stored_codes_are_views_and_may_be_written_without_harm(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    before = (folder / "model.safetensors").read_bytes()
    stored = open_store(folder, spec_of().model)["model.embed_tokens.weight"].stored
    assert stored is not None
    stored.load().codes.zero_()  # a private page, not the file
    assert (folder / "model.safetensors").read_bytes() == before
    assert stored.load().codes.any()


def test_unaligned_tensors(tmp_path: Path) -> None:
    """The format does not align tensors; float32 after an odd number of bytes must still be read."""
    file = tmp_path / "odd.safetensors"
    value = torch.randn(3, generator=torch.Generator().manual_seed(0))
    header = {
        "a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [5, 17]},
        "c": {"dtype": "F16", "shape": [0, 4], "data_offsets": [17, 17]},
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(5)) + value.numpy().tobytes())
    entries = read_header(file)
    assert entries["a"].tensor().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(entries["b"].tensor(), value)
    assert entries["c"].tensor().shape == (0, 4)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_at_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", qat=False)
    name = "model.layers.0.feed_forward.experts."

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name + "w13"] = tensors.pop(name + "gate_up_proj")
        tensors["model.norm.weight"] = torch.zeros(65)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.int8)

    edit_tensors(folder, damage)
    lines = refusal(folder).splitlines()
    assert len(lines) == 4
    assert re.search(rf"tensor {name}gate_up_proj is missing, expected BF16 or F16 or F32 \[5, 64, 64\]", lines[0])
    assert "q_proj.weight is I8, expected BF16" in lines[1]
    assert "model.norm.weight is [65], expected [64]" in lines[2]
    assert f"{name}w13 is not part of the model" in lines[3]


def test_many_faults_are_counted(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", qat=False)
    edit_tensors(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1" in n])
    lines = refusal(folder).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "... and 3 more faults"


def test_layout_that_contradicts_its_config(tmp_path: Path) -> None:
    packed, floats = make(tmp_path / "p"), make(tmp_path / "f", qat=False)
    configs = [(folder / "config.json").read_text() for folder in (packed, floats)]
    (packed / "config.json").write_text(configs[1])
    (floats / "config.json").write_text(configs[0])
    assert "has no `quantization`, but weights are packed INT4" in refusal(packed)
    assert "says the weights are packed INT4, but model.embed_tokens.weight is float" in refusal(floats)


def test_unknown_quantization(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    raw = json.loads((folder / "config.json").read_text())["quantization"]
    edit_config(folder, quantization=raw | {"format": "gguf-q4_k"})
    assert "quantization.format: unknown value 'gguf-q4_k', known is 'mobilemoe-int4-g32'" in refusal(folder)
    edit_config(folder, quantization=raw | {"group_size": 64, "qmin": -7})
    text = refusal(folder)
    assert "group_size: unknown value 64" in text
    assert "qmin: unknown value -7" in text
    edit_config(folder, quantization=raw | {"expert_group_axis": "in (last dim of [E, out, in])"})
    assert "expert_group_axis: unknown value 'in (last dim" in refusal(folder)
    edit_config(folder, quantization=raw | {"expert_group_axis": "out", "packed_by": "someone"})
    assert open_store(folder, spec_of().model).packed  # type: ignore[arg-type]


def test_spec_that_contradicts_the_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    moe = SPARSE["moe"] | {"scale": 1.0}
    text = refusal(folder, spec_of(d_model=128, moe=moe, rope=SPARSE["rope"] | {"scaling": None}, context=64))
    lines = text.splitlines()
    assert any("hidden_size says model.d_model is 64, the spec says 128" in line for line in lines)
    assert any("routed_scaling_factor says model.moe.scale is 2.5, the spec says 1.0" in line for line in lines)
    assert any("rope_scaling says model.rope.scaling is present, the spec says absent" in line for line in lines)
    assert any("max_position_embeddings is 32, the spec wants model.context 64" in line for line in lines)
    # a shorter cache and other stop tokens are the spec's to choose
    shorter = spec_of(context=16, eos_ids=[7], bos_id=None)
    assert open_store(folder, shorter.model).config.context == 16  # type: ignore[arg-type]


def test_scales_and_weights_that_are_not_finite(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    name = "model.layers.1.feed_forward.experts.down_scale"
    for bad in (float("nan"), float("-inf")):
        edit_tensors(folder, lambda tensors, bad=bad: tensors[name].view(-1)[7].fill_(bad))
        assert f"tensor {name} holds scales that are not finite" in refusal(folder)
    floats = make(tmp_path / "f", qat=False)
    edit_tensors(floats, lambda tensors: tensors["model.norm.weight"][3].fill_(float("inf")))
    store = open_store(floats, spec_of().model)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor model.norm.weight holds values that are not"):
        store["model.norm.weight"].load()


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    assert "no such checkpoint folder" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "is a file, not a checkpoint folder" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    text = refusal(tmp_path / "empty")
    assert "config.json: missing" in text
    assert "no *.safetensors file" in text


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"model_type": 3}', b"1" * 5000])
def test_damaged_config(tmp_path: Path, text: bytes) -> None:
    folder = make(tmp_path / "c")
    (folder / "config.json").write_bytes(text)
    assert "config.json" in refusal(folder)


def test_config_that_is_not_supported(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    scaling = {"rope_type": "yarn", "factor": 4.0}
    edit_config(
        folder, attention_bias=True, no_rope_layers=[1, 0], rope_scaling=scaling, hidden_size="64", hidden_act="gelu"
    )
    lines = refusal(folder).splitlines()
    for wanted in (
        "attention_bias: True",
        "hidden_act: 'gelu'",
        "no_rope_layers: [1, 0]",
        "rope_type 'yarn'",
        "hidden_size: expected int",
    ):
        assert any(wanted in line for line in lines), wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"partial_rotary_factor": 0.5},
        {"scoring_func": "softmax"},
        {"n_group": 4},
        {"first_k_dense_replace": 1},
        {"mlp_only_layers": [0]},
        {"final_logit_softcapping": 30.0},
        {"mlp_bias": True},
    ],
)
def test_keys_that_would_change_the_forward_are_not_passed_over(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    edit_config(folder, **dict.fromkeys(changes))  # null says nothing
    open_store(folder, spec_of().model)
    edit_config(folder, **changes)
    assert f"config.json: {next(iter(changes))}: " in refusal(folder)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_an_integer_that_no_float_holds(key: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    edit_config(folder, **{key: 10**400})
    assert f"{key}: expected float, got 1000" in refusal(folder)


def test_file_cut_short_after_opening(tmp_path: Path) -> None:
    folder = make(tmp_path / "c")
    store = open_store(folder, spec_of().model)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        store["model.norm.weight"].load()
    assert re.search(r"truncated: it ends at byte \d+, the file has \d+; download", refusal(folder))
    file.write_bytes(content + b"x")
    assert "holds 1 bytes that its header does not name" in refusal(folder)


# --- synthesizing ---------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    spec = spec_of(vocab_size=600)
    first, again, other = (make(tmp_path / n, spec=spec, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert file_digest(first / name) == file_digest(again / name)
    assert file_digest(first / "model.safetensors") != file_digest(other / "model.safetensors")


def test_packed_is_the_quantized_float_checkpoint(tmp_path: Path) -> None:
    """Before the float one is rounded to BF16: scales agree to its 8 bits (2^-8), and two float16 roundings (2^-11)."""
    packed: WeightStore = open_store(make(tmp_path / "p"), spec_of().model)
    floats = open_store(make(tmp_path / "f", qat=False), spec_of().model)
    for name in weight_layout(spec_of().model):
        stored = packed[name].stored
        if stored is not None:
            expected = quantize_weight(floats[name].load(), bits=4, group_size=32)
            torch.testing.assert_close(
                stored.load().scales.float(), expected.scales.float(), rtol=2**-8 + 2**-10, atol=1e-7
            )
            assert float((stored.load().unpacked() != expected.unpacked()).float().mean()) < 0.05


def test_a_good_checkpoint_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "c", seed=1)
    before = file_digest(folder / "model.safetensors")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(folder, seed=2)
    assert file_digest(folder / "model.safetensors") == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    make(folder, seed=2)
    assert file_digest(folder / "model.safetensors") != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds files and is not a checkpoint"):
        make(tmp_path / "other")


def test_what_cannot_be_synthesized(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has 48 columns.*without --qat"):
        make(tmp_path / "c", spec=Spec.model_validate(
            {"name": "t", "model": SPARSE | {"d_model": 48, "vocab_size": 32, "architecture": "mobilemoe"},
             "quantization": "none"}))  # fmt: skip
    other = Spec.model_validate({"name": "t", "model": {"python": "a:b"}, "quantization": "none"})
    with pytest.raises(SpecError, match="architecture"):
        make(tmp_path / "c", spec=other)
    assert not (tmp_path / "c").exists()


def test_statistics_of_the_tiny_model(tmp_path: Path) -> None:
    """Signals of order one at every depth, a spread of logits, every layer routing unevenly but to most experts."""
    spec = load_spec(Path(__file__).parents[2] / "specs/models/mobilemoe-tiny.yaml")
    store = open_store(checkpoints.synthesize(spec, tmp_path / "c", seed=3, qat=True), spec.model)  # type: ignore[arg-type]
    ids = torch.randint(0, 4096, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    result = Reference(spec.model, store, spec.quantization).forward(ids)  # type: ignore[arg-type]
    assert 1 < result.logits.std() < 6
    assert (result.logits.argmax(-1) == np.array(ids)).mean() < 0.1  # it does not merely repeat its input
    for record in result.layers:
        counts = np.bincount(record.used_TK.ravel(), minlength=16)
        assert (counts > 0).sum() >= 12
        # 800 even choices over 16 experts would be 50 +- 7: more than chance, less than collapse
        assert 1.3 < counts.max() / counts.mean() < 4
        assert 0.1 < record.routed.scores_TE.std() < 0.4
        assert 0.01 < record.y_TD.std() < 1
        assert store[f"model.layers.{record.layer}.feed_forward.expert_bias"].load().std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("count", [300, 4095])
def test_few_learned_tokens_are_the_first_of_many(count: int) -> None:
    """Training takes seconds, so it is done once a process."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from moec.checkpoints import tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    few = Tokenizer(models.BPE())
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    few.train_from_iterator(
        tokenizer._texts(), trainers.BpeTrainer(vocab_size=count, show_progress=False, initial_alphabet=alphabet)
    )
    assert json.loads(few.to_str())["model"] == tokenizer._first(count)["model"]


@pytest.mark.parametrize(
    ("vocab", "bos", "eos"), [(4096, 0, (1,)), (128256, 128000, (128001, 128008, 128009)), (600, None, ())]
)
def test_tokenizer(tmp_path: Path, vocab: int, bos: int | None, eos: tuple[int, ...]) -> None:
    from tokenizers import Tokenizer

    from moec.checkpoints.tokenizer import train_tokenizer

    text = train_tokenizer(vocab, bos_id=bos, eos_ids=eos)
    assert text is not None
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    tokenizer = Tokenizer.from_file(str(file))
    sample = "Experts route tokens; naïve café — 東京 42\n\tdef f(x): return x\n"
    ids = tokenizer.encode(sample, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == sample
    assert max(ids) < vocab
    assert not set(ids) & {bos, *eos}
    if vocab > 600:
        assert len(ids) < 0.7 * len(sample.encode())  # it has learned words
    assert all(tokenizer.id_to_token(i).startswith("<|end") or i in eos[1:] for i in eos)
    if bos is not None:
        assert tokenizer.encode("<|begin_of_text|>a").ids[0] == bos
        assert tokenizer.decode([bos, *ids]) == sample  # special tokens are not shown
    runtime = pytest.importorskip("pytorch_tokenizers", reason="ExecuTorch's tokenizer is the other reader of the file")
    if bos is not None:
        other = runtime.CppHFTokenizer()
        other.load(str(file))
        assert other.encode(sample, bos=0, eos=0) == ids
    assert train_tokenizer(255, bos_id=None, eos_ids=()) is None  # no room for the bytes


# --- describing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SPARSE, DENSE, DENSE | {"attention_window": None}], ids=["moe", "dense", "global"])
def test_config_json_round_trip(model: dict[str, Any]) -> None:
    config = spec_of(model).model
    raw = json.loads(json.dumps(config_to_json(config, packed=True)))  # type: ignore[arg-type]
    assert config_from_json(raw, Path("config.json")) == config


@pytest.mark.parametrize("model", [SPARSE, DENSE], ids=["moe", "dense"])
def test_spec_from_config(tmp_path: Path, model: dict[str, Any]) -> None:
    folder = make(tmp_path / "My model (v2)", spec=spec_of(model))
    spec = parse_spec(checkpoints.spec_from_config(folder))
    assert spec.model == spec_of(model).model
    assert spec.name == "My-model-v2"
    assert spec.checkpoint == folder.resolve()
    assert spec.quantization is not None
    assert not inspect(folder, spec).problems
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        checkpoints.spec_from_config(folder)


def test_inspect(tmp_path: Path) -> None:
    spec = spec_of(vocab_size=600)
    folder = make(tmp_path / "c", spec=spec)
    found = inspect(folder)
    assert found.problems == ()
    assert found.layout.startswith("packed INT4")
    assert found.tokenizer is not None
    assert 259 <= (found.tokenizer.vocab_size or 0) <= 600
    roles = {role.role: role for role in found.roles}
    assert sum(role.bytes for role in found.roles) == found.bytes
    assert roles["expert"].parameters == 2 * 5 * 3 * 64 * 32
    # 4 bits, and 16 for each 32
    assert roles["expert"].bytes == roles["expert"].parameters * 9 // 16
    assert found.parameters["total"] == sum(role.parameters for role in found.roles) - 2 * 5
    json.dumps(found.to_json())
    problems = inspect(folder, spec_of(vocab_size=601)).problems
    assert any("vocab_size" in line for line in problems)
    (folder / "model.safetensors").write_bytes(b"short")
    assert inspect(folder).problems


def test_inspect_of_rubbish(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    found = inspect(tmp_path)
    assert found.problems
    assert found.tokenizer is not None
    assert found.tokenizer.vocab_size is None
    json.dumps(found.to_json())


def test_spec_takes_special_tokens_from_where_transformers_keeps_them(tmp_path: Path) -> None:
    """A released config.json need not name them; without a stop token `moec run` would not stop."""
    folder = make(tmp_path / "c")
    edit_config(folder, eos_token_id=None, bos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    model = parse_spec(checkpoints.spec_from_config(folder)).model
    assert isinstance(model, DecoderConfig)
    assert (model.bos_id, model.eos_ids) == (5, (2, 3))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: no valid JSON"):
        checkpoints.spec_from_config(folder)
