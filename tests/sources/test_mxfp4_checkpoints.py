"""gpt-oss as released: the codes of experts in MXFP4 are carried, with exactly the values that transformers reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.checkpoints import spec_from_config
from moec.checkpoints.mxfp4 import Mxfp4Entry
from moec.compiler import build
from moec.compiler.errors import CheckpointError, SpecError
from moec.compiler.pipeline import run_passes
from moec.compiler.program import Program
from moec.compiler.spec import load_spec
from moec.compiler.spec.loader import parse_spec
from moec.compiler.weights import CodeFormat, StoredCodes
from moec.passes.pipelines import pipeline
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_model import TransformersStore
from moec.sources.transformers_source import TransformersModel

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
FAMILY = Path(__file__).parents[2] / "specs" / "families" / "gpt-oss.yaml"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose experts are random blocks and scales; the folder is not to be changed."""
    folder = tmp_path_factory.mktemp("released")
    source = load_spec(FAMILY).model
    assert isinstance(source, TransformersModel)
    save_random(source.transformers, folder, seed=3)
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj") and ".experts." in n]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape[:-1], generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def changed(released: Path, folder: Path, end: str, change: object) -> Path:
    """The same checkpoint with another content of every tensor whose name ends in `end`."""
    tensors = load_file(released / "model.safetensors")
    tensors |= {name: change(tensor) for name, tensor in tensors.items() if name.endswith(end)}  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((released / "config.json").read_bytes())
    return folder


def compiled(folder: Path, *changes: tuple[str, str]) -> Program:
    """The quantized program of the spec that the folder implies, its text changed."""
    text = spec_from_config(folder)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    spec = parse_spec(text, folder=folder)
    program, _ = build.program_and_passes(spec, build.open_checkpoint(spec, None))
    return run_passes(program, pipeline(spec.quantization))


def codes_of_down(folder: Path) -> StoredCodes:
    store = TransformersStore(folder)
    name = "model.layers.0.mlp.experts.down_proj"
    stored = store.weight(name, store._entries[name].shape).stored
    assert stored is not None
    return stored


def wanted(folder: Path, name: str) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(folder / "model.safetensors")
    return convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).float()


def test_codes_have_the_values_that_transformers_reads(released: Path) -> None:
    program = compiled(released)
    experts = [held for held in program.quantized.values() if held.role == "expert"]
    assert len(experts) == 4
    for held in experts:
        assert str(held.provenance) == "carried: MXFP4"
        assert held.format == CodeFormat(4, 32, levels="fp4")
        blocks = load_file(released / "model.safetensors")[f"{held.name.removeprefix('model.')}_blocks"]
        assert torch.equal(held.tensor(program.weights).codes, blocks.flatten(-2))
        assert torch.equal(held.dequantize(program.weights), wanted(released, held.name.removeprefix("model.")))
    assert {held.format.bits for held in program.quantized.values() if held.role == "attention"} == {4}


def test_a_spec_may_ask_for_int8_codes_of_the_same_values(released: Path) -> None:
    """As specs did before there was FP4; a note says so."""
    program = compiled(released, ("fp4", "int8"))
    spec = parse_spec(spec_from_config(released).replace("fp4", "int8"), folder=released)
    assert "MXFP4 experts become INT8 codes of the same values" in build.open_checkpoint(spec, None).notes
    for held in (held for held in program.quantized.values() if held.role == "expert"):
        assert (str(held.provenance), held.format.bits) == ("carried: MXFP4", 8)
        assert torch.equal(held.dequantize(program.weights), wanted(released, held.name.removeprefix("model.")))


def test_values_may_be_quantized_anew_by_name(released: Path) -> None:
    program = compiled(released, ("model:\n", "model:\n  dequantize: [MXFP4]\n"), ("fp4", "int4"))
    experts = [held for held in program.quantized.values() if held.role == "expert"]
    assert {(str(held.provenance), held.format.bits) for held in experts} == {("computed: rtn", 4)}
    for held in experts:
        value = wanted(released, held.name.removeprefix("model."))
        # half a step of INT4 is a fourteenth of a group's largest value
        assert float((held.dequantize(program.weights) - value).abs().max()) <= float(value.abs().max()) / 13


def test_codes_are_never_quantized_again_in_silence(released: Path) -> None:
    with pytest.raises(
        CheckpointError, match="along in; the spec stores experts as INT4 codes in groups of 32"
    ) as caught:
        compiled(released, ("fp4", "int4"))
    assert "dequantize: [MXFP4]" in str(caught.value.remedy)


def test_a_type_that_is_not_known(released: Path) -> None:
    with pytest.raises(SpecError, match="MXFP4"):
        compiled(released, ("model:\n", "model:\n  dequantize: [NVFP4]\n"))


@pytest.mark.parametrize(
    ("scale", "reason"), [(255, "is NaN"), (200, r"is 2\^73, outside"), (90, r"is 2\^-37, outside")]
)
def test_scales_that_no_code_of_ours_has(released: Path, tmp_path: Path, scale: int, reason: str) -> None:
    folder = changed(released, tmp_path, "down_proj_scales", lambda t: torch.full_like(t, scale))
    codes = codes_of_down(folder)
    with pytest.raises(CheckpointError, match=reason):
        codes.load()


def test_a_group_of_zeros_has_any_scale(released: Path, tmp_path: Path) -> None:
    folder = changed(released, tmp_path, "down_proj_blocks", torch.zeros_like)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith("down_proj_scales")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    codes = codes_of_down(folder).load()
    assert not codes.dequantize().any()
    assert torch.isfinite(codes.scales).all()


@pytest.mark.parametrize("end", ["_blocks", "_scales"])
def test_blocks_and_scales_that_do_not_fit_are_refused(released: Path, tmp_path: Path, end: str) -> None:
    folder = changed(released, tmp_path, f"down_proj{end}", lambda t: t[:, 1:].contiguous())
    with pytest.raises(CheckpointError, match="MXFP4"):
        compiled(folder)


def test_the_digest_covers_the_scales(released: Path) -> None:
    """It is what calibration results and manifests know a checkpoint by."""
    store = TransformersStore(released)
    name, entry = next((n, e) for n, e in store._entries.items() if isinstance(e, Mxfp4Entry))
    before = store.digest()
    store._entries[name] = replace(entry, scales=replace(entry.scales, begin=entry.scales.begin + 1))
    assert store.digest() != before
