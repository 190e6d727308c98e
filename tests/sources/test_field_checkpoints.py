"""Checkpoints as people have them: what moec cannot read as it is meant is refused by name, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Moec, refused
from tests.sources import field_checkpoints as field

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)
transformers.utils.logging.disable_progress_bar()  # what a command prints is counted in lines
NEW = "model.layers.0.self_attn"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Any]], tuple[Path, dict[str, Tensor]]]:
    """(folder, stored tensors) of the healthy model of a config, made once; the folder is not to be changed."""
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(config: Mapping[str, Any]) -> tuple[Path, dict[str, Tensor]]:
        key = json.dumps(dict(config))
        if key not in made:
            folder = tmp_path_factory.mktemp("healthy") / "model"
            made[key] = folder, field.healthy(folder, config)
        return made[key]

    return get


Models = Callable[[Mapping[str, Any]], tuple[Path, dict[str, Tensor]]]


def started(models: Models, tmp_path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Path]:
    """The healthy tensors, and a folder with config.json alone for a maker to fill."""
    whole, tensors = models(config)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(whole / "config.json", folder / "config.json")
    return dict(tensors), folder


def spec(folder: Path, quantization: str = "none") -> Path:
    file = folder.parent / f"spec-{quantization[:5].strip('{')}.yaml"
    file.write_text(
        f"name: field\nmodel: {{transformers: {folder.name}}}\nquantization: {quantization}\n"
        "targets: {xnnpack: {max_tokens: 32}}\n"
    )
    return file


def compile_refused(moec: Moec, folder: Path, *parts: str, quantization: str = "none") -> None:
    out = folder.parent / "art"
    refused(moec("compile", spec(folder, quantization), "--out", out, "-q"), *parts)
    assert not out.exists()


def logits(artifact: Path, ids: list[int]) -> np.ndarray:
    import moec

    return np.asarray(moec.load(artifact).prefill(ids, logits="all"))


def wanted_logits(folder: Path, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0])


# --- codes that are not weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", field.CODES)
def test_codes_are_refused_by_the_name_of_their_format(name: str, models: Models, moec: Moec, tmp_path: Path) -> None:
    config, make, says = field.CODES[name]
    tensors, folder = started(models, tmp_path, config)
    make(tensors, folder)
    compile_refused(moec, folder, says, str(folder))


def test_a_type_that_no_tensor_of_the_model_has_does_not_matter(models: Models, moec: Moec, tmp_path: Path) -> None:
    """The scale of a quantized KV cache, which our caches find themselves: the rest is read, and that is said."""
    tensors, folder = started(models, tmp_path, field.DENSE)
    extra = {f"{NEW}.attn.k_scale": torch.ones(1).to(torch.float8_e4m3fn), f"{NEW}.k_proj.k_scale": torch.ones(1)}
    field.save(folder, {**tensors, **extra})
    status, out, err = moec("compile", spec(folder), "--out", tmp_path / "art", "-q")
    assert status == 0, err
    assert "k_scale" in out
    ids = list(range(3, 30))
    # float weights, another order of sums: 1e-4 is what README states for float artifacts
    np.testing.assert_allclose(
        logits(tmp_path / "art", ids), wanted_logits(models(field.DENSE)[0], ids), atol=1e-4, rtol=1e-4
    )


# --- tensors that are not there, or that nobody reads ----------------------------------------------------------------


@pytest.mark.parametrize("name", field.MISSING)
def test_missing_tensors_are_named(name: str, models: Models, moec: Moec, tmp_path: Path) -> None:
    config, rename, says = field.MISSING[name]
    tensors, folder = started(models, tmp_path, config)
    field.save(folder, {new: t for n, t in tensors.items() if (new := rename(n)) is not None})
    compile_refused(moec, folder, *says)


def test_a_missing_selection_bias_is_named(moec: Moec, tmp_path: Path) -> None:
    """A buffer that the files hold: transformers would start it at zero, and other experts would be chosen."""
    from safetensors.torch import load_file

    from moec.sources.random_checkpoint import save_random

    config = Path(__file__).parents[2] / "specs" / "families" / "deepseek_v3"
    folder = save_random(config, tmp_path / "model", seed=1)
    tensors = load_file(folder / field.WEIGHTS)
    lacking = {n: t for n, t in tensors.items() if "correction_bias" not in n}
    assert len(lacking) < len(tensors)
    field.save(folder, lacking)
    compile_refused(moec, folder, "e_score_correction_bias")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{NEW}.q_proj.bias", "q_proj.bias"),  # the config says that there is none
        (f"{NEW}.q_proj.lora_A.weight", "merge_and_unload"),
        ("model.layers.0.mlp.down_proj.weight_scale", "weight_scale"),
    ],
)
def test_tensors_inside_a_layer_that_nobody_reads_are_refused(
    name: str, says: str, models: Models, moec: Moec, tmp_path: Path
) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    field.save(folder, {**tensors, name: torch.ones(64)})
    compile_refused(moec, folder, says)


EVIL = "a\x1b]0;title\x07\nb\u202ec\x9b31m"  # a title, a bell, a second line, another direction, a colour


@pytest.mark.parametrize("name", [f"{NEW}.q_proj.{EVIL}.SCB", f"{NEW}.q_proj.{EVIL}", EVIL])
def test_names_of_tensors_do_not_command_the_terminal(name: str, models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    field.save(folder, {**tensors, name: torch.ones(64)})
    folder = folder.rename(
        folder.with_name("model\x1b[2J\nmodel: {python: x}")
    )  # as a folder of an archive may be called
    for words in (["checkpoint", "inspect"], ["checkpoint", "spec"], ["compile", "--out", tmp_path / "art"]):
        _, out, err = moec(*words, folder)
        assert not set("\x1b\x07\x9b\u202e") & set(out + err), words
    assert "\nmodel: {python" not in moec("checkpoint", "spec", folder)[1]


def test_parts_of_a_larger_model_are_said_not_to_be_read(models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    extra = {"visual.patch.weight": torch.ones(3, 3), "model.layers.2.mtp.weight": torch.ones(2)}
    field.save(folder, {**tensors, **extra})
    status, out, err = moec("compile", spec(folder), "--out", tmp_path / "art", "-q")
    assert status == 0, err
    assert "visual.patch.weight" in out


def test_a_wrong_shape_is_refused_before_the_model_is_lowered(models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    field.save(folder, {**tensors, "model.norm.weight": torch.ones(63)})
    compile_refused(moec, folder, "model.norm.weight", "[63]", "[64]")


# --- files beside the right ones -------------------------------------------------------------------------------------


def _halves(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = sorted(tensors)
    half = len(names) // 2
    return {n: tensors[n] for n in names[:half]}, {n: tensors[n] for n in names[half:]}


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _index(folder: Path, where: Mapping[str, str]) -> None:
    (folder / field.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(where)}))


def _stale(tensors: dict[str, Tensor], folder: Path) -> str:
    a, b = _halves(tensors)
    field.save(folder, a, FIRST)
    field.save(folder, b, SECOND)
    field.save(folder, {n: torch.zeros_like(t) for n, t in a.items()}, "model-00003-of-00003.safetensors")
    _index(folder, {**dict.fromkeys(a, FIRST), **dict.fromkeys(b, SECOND)})
    return "model-00003-of-00003.safetensors"


def _assignment(tensors: dict[str, Tensor], folder: Path) -> str:
    """The second file holds another version of a tensor that the index gives to the first."""
    a, b = _halves(tensors)
    twice = sorted(a)[2]
    field.save(folder, a, FIRST)
    field.save(folder, {**b, twice: torch.zeros_like(a[twice])}, SECOND)
    _index(folder, {**dict.fromkeys(a, FIRST), **dict.fromkeys(b, SECOND)})
    return twice


def _beside(name: str, indexed: bool) -> Callable[[dict[str, Tensor], Path], str]:
    def make(tensors: dict[str, Tensor], folder: Path) -> str:
        field.save(folder, tensors)
        field.save(folder, {n: t * 0.1 for n, t in tensors.items()}, name)
        if indexed:
            _index(folder, dict.fromkeys(tensors, field.WEIGHTS))
        return name

    return make


def _whole_and_index(tensors: dict[str, Tensor], folder: Path) -> str:
    """The index names shards; a model.safetensors of another time lies beside them."""
    a, b = _halves(tensors)
    field.save(folder, a, FIRST)
    field.save(folder, b, SECOND)
    field.save(folder, {n: torch.zeros_like(t) for n, t in tensors.items()})
    _index(folder, {**dict.fromkeys(a, FIRST), **dict.fromkeys(b, SECOND)})
    return field.WEIGHTS


BESIDE = {
    "a left-over shard": _stale,
    "a tensor in two shards": _assignment,
    "averaged weights": _beside("model_ema.safetensors", True),
    "averaged weights, no index": _beside("model_ema.safetensors", False),
    "an optimizer": _beside("optimizer.safetensors", False),
    "a first name in the alphabet": _beside("a.safetensors", False),
    "a whole file beside an index": _whole_and_index,
}


@pytest.mark.parametrize("name", BESIDE)
def test_the_index_is_the_authority(name: str, models: Models, tmp_path: Path) -> None:
    from moec.sources.transformers_model import TransformersStore

    tensors, folder = started(models, tmp_path, field.DENSE)
    ignored = BESIDE[name](tensors, folder)
    store = TransformersStore(folder)
    for tensor_name, tensor in tensors.items():
        assert torch.equal(store.reader(tensor_name, tuple(tensor.shape))(), tensor), tensor_name
    assert any(ignored in note for note in store.notes), store.notes


def test_what_is_ignored_is_said(models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    _stale(tensors, folder)
    status, out, err = moec("compile", spec(folder), "--out", tmp_path / "art", "-q")
    assert status == 0, err
    assert "note: " in out
    assert "model-00003-of-00003.safetensors" in out
    ids = list(range(3, 30))
    np.testing.assert_allclose(  # as above: 1e-4
        logits(tmp_path / "art", ids), wanted_logits(models(field.DENSE)[0], ids), atol=1e-4, rtol=1e-4
    )


def test_shards_that_are_not_there(models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    a, b = _halves(tensors)
    field.save(folder, a, FIRST)
    _index(folder, {**dict.fromkeys(a, FIRST), **dict.fromkeys(b, SECOND)})
    compile_refused(moec, folder, SECOND, "missing")


def test_an_index_that_names_what_a_shard_lacks(models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    field.save(folder, {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    _index(folder, dict.fromkeys(tensors, field.WEIGHTS))
    compile_refused(moec, folder, "lm_head.weight", field.INDEX)


def test_an_index_that_names_a_tensor_twice(models: Models, moec: Moec, tmp_path: Path) -> None:
    """Readers of JSON take the first or the last: with two files, that is another model."""
    tensors, folder = started(models, tmp_path, field.DENSE)
    a, b = _halves(tensors)
    field.save(folder, a, FIRST)
    field.save(folder, {n: torch.zeros_like(t) if n in a else t for n, t in tensors.items()}, SECOND)
    _index(folder, {**dict.fromkeys(a, FIRST), **dict.fromkeys(b, SECOND)})
    text, name = (folder / field.INDEX).read_text(), sorted(a)[0]
    for other, fine in ((FIRST, True), (SECOND, False)):
        (folder / field.INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{other}", '))
        if fine:
            assert moec("checkpoint", "inspect", folder)[0] == 0
        else:
            compile_refused(moec, folder, name, "stands twice")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_may_not_point_outside(name: str, models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    field.save(folder, tensors)
    _index(folder, dict.fromkeys(tensors, name))
    compile_refused(moec, folder, name, "not a file of this folder")


def test_several_files_and_no_index(models: Models, moec: Moec, tmp_path: Path) -> None:
    tensors, folder = started(models, tmp_path, field.DENSE)
    a, b = _halves(tensors)
    field.save(folder, a, FIRST)
    field.save(folder, b, SECOND)
    compile_refused(moec, folder, field.INDEX)


# --- values that are not numbers -------------------------------------------------------------------------------------

PLACES = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "attention": f"{NEW}.q_proj.weight",
    "router": "model.layers.0.mlp.gate.weight",
    "expert": "model.layers.0.mlp.experts.1.down_proj.weight",
}
INT4 = "{weights: int4, group_size: 32, expert_group_axis: in}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("role", PLACES)
def test_weights_that_are_not_finite(role: str, value: float, models: Models, tmp_path: Path) -> None:
    from moec.compiler.errors import CheckpointError
    from moec.sources.conversions import Conversions
    from moec.sources.transformers_model import TransformersStore, read_config

    tensors, folder = started(models, tmp_path, field.MOE)
    spoilt = tensors[PLACES[role]].half()
    spoilt.view(-1)[-5] = value
    field.save(folder, {**tensors, PLACES[role]: spoilt})
    store = TransformersStore(folder)
    names = Conversions(read_config(folder), tensors, folder).names
    said = []
    for name, shape in names.items():
        try:
            store.reader(name, shape)()
        except CheckpointError as error:
            said.append(error.line())
    assert len(said) == 1
    assert "not finite" in said[0]
    assert PLACES[role].split(".experts.")[0] in said[0]


@pytest.mark.parametrize(
    ("role", "quantization"),
    [("norm", "none"), ("expert", INT4), pytest.param("embedding", INT4, marks=pytest.mark.slow)],
    ids=["norm", "expert", "embedding"],
)
def test_a_compile_refuses_what_is_not_finite(
    role: str, quantization: str, models: Models, moec: Moec, tmp_path: Path
) -> None:
    tensors, folder = started(models, tmp_path, field.MOE)
    tensors[PLACES[role]].view(-1)[7] = float("nan")
    try:
        field.save(folder, tensors)
    finally:
        tensors[PLACES[role]].view(-1)[7] = 0.1
    compile_refused(moec, folder, "not finite", quantization=quantization)


# --- folders that hold no safetensors --------------------------------------------------------------------------------


def _bin(tensors: dict[str, Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _gguf(tensors: dict[str, Tensor], folder: Path) -> None:
    (folder / "model-q4_0.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)


ADAPTER = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "Qwen/Qwen3-0.6B", "target_modules": ["q_proj"]}


def _adapter(tensors: dict[str, Tensor], folder: Path) -> None:
    lora = {f"base_model.model.{NEW}.q_proj.lora_{x}.weight": torch.ones(4, 64) for x in "AB"}
    field.save(folder, lora, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))


def _adapter_alone(tensors: dict[str, Tensor], folder: Path) -> None:
    _adapter(tensors, folder)
    (folder / "config.json").unlink()


def _adapter_beside(tensors: dict[str, Tensor], folder: Path) -> None:
    _adapter(tensors, folder)
    field.save(folder, tensors)


def _merged_without_config(tensors: dict[str, Tensor], folder: Path) -> None:
    field.save(folder, tensors)
    (folder / "config.json").unlink()


OTHER = {
    "bin": (_bin, ("pytorch_model.bin", "save_pretrained")),
    "gguf": (_gguf, ("model-q4_0.gguf",)),
    "lora": (_adapter_alone, ("LoRA", "Qwen/Qwen3-0.6B", "merge_and_unload")),
    "lora with the model's config": (_adapter, ("LoRA", "merge_and_unload")),
    "adapter beside": (_adapter_beside, ("adapter_config.json", "merge_and_unload")),
    "no config": (_merged_without_config, ("config.json",)),
    "nothing": (lambda tensors, folder: None, ("no safetensors",)),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_folders_say_what_lies_there(name: str, models: Models, moec: Moec, tmp_path: Path) -> None:
    make, says = OTHER[name]
    tensors, folder = started(models, tmp_path, field.DENSE)
    make(tensors, folder)
    compile_refused(moec, folder, *says)


@pytest.mark.parametrize(("name", "says"), [("model-q4_0.gguf", "GGUF"), (field.WEIGHTS, "is a file")])
def test_a_file_is_no_folder(name: str, says: str, models: Models, moec: Moec, tmp_path: Path) -> None:
    """A file that lies beside a healthy model does not stand for that model."""
    tensors, folder = started(models, tmp_path, field.DENSE)
    field.save(folder, tensors)
    _gguf(tensors, folder)
    file = spec(folder)
    file.write_text(file.read_text().replace("transformers: model", f"transformers: model/{name}"))
    refused(moec("compile", file, "--out", tmp_path / "art", "-q"), says, name)


# --- shared experts of width 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", pytest.param(INT4, marks=pytest.mark.slow)])
def test_a_shared_expert_of_width_0(quantization: str, moec: Moec, tmp_path: Path) -> None:
    """It compiles, and computes what transformers computes."""
    config = {
        **field.MOE, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "norm_topk_prob": False,
        "shared_expert_intermediate_size": 0, "qkv_bias": True,
    }  # fmt: skip
    folder = tmp_path / "model"
    field.healthy(folder, config)
    status, _, err = moec("compile", spec(folder, quantization), "--out", tmp_path / "art", "-q")
    assert status == 0, err
    ids = list(range(3, 30))
    got = logits(tmp_path / "art", ids)
    if quantization == "none":
        np.testing.assert_allclose(got, wanted_logits(folder, ids), atol=1e-4, rtol=1e-4)  # as above
    assert np.isfinite(got).all()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "nope", "flash_attention_2"])
def test_a_config_chooses_no_kernel(key: str, value: str, models: Models, tmp_path: Path) -> None:
    """transformers would fetch and run one from a hub. It is no property of the weights, and is set aside."""
    from moec.sources.transformers_config import read_config
    from moec.sources.transformers_model import shapes_of

    _, folder = started(models, tmp_path, field.MOE)
    field.set_config(folder, **{key: value})
    config = read_config(folder)
    model, _ = shapes_of(config, folder)
    assert value not in (model.config._attn_implementation, model.config._experts_implementation)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_experts_per_tok": 9},
        {"vocab_size": -5},
        {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e6}},
        {"hidden_act": "evil"},
    ],
)
def test_a_config_that_cannot_be_built(changes: dict[str, Any], models: Models, tmp_path: Path, moec: Moec) -> None:
    tensors, folder = started(models, tmp_path, field.MOE)
    field.save(folder, tensors)
    field.set_config(folder, **changes)
    refused(moec("compile", folder, "--out", tmp_path / "out", "-q"), str(folder))
