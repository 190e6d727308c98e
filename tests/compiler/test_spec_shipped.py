"""The specs that ship: published parameter counts, the schema's freshness, and what quantization gives each role."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moec.cli.output import json_text
from moec.compiler.errors import SpecError
from moec.compiler.program import Role
from moec.compiler.spec import WeightScheme, as_spec, load_spec, parse_spec
from moec.compiler.spec.schema import spec_schema
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.layout import parameter_counts

SPECS = Path(__file__).parents[2] / "specs"
MODELS = sorted((SPECS / "models").glob("*.yaml"))

# Published: the MobileMoE paper's Table of sizes, exact from the released shapes; MobileLLM-Pro's model card.
PUBLISHED = {
    "mobilemoe-s": (1_263_373_056, 272_468_736),
    "mobilemoe-m": (2_818_388_992, 528_299_008),
    "mobilemoe-l": (5_325_702_400, 921_683_200),
    "mobilellm-pro": (1_084_453_120, 1_084_453_120),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    config = load_spec(SPECS / "models" / f"{name}.yaml").model
    assert isinstance(config, DecoderConfig)
    assert tuple(parameter_counts(config).values()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["mobilemoe-tiny", "mobilellm-pro"])
def test_counts_equal_the_model(name: str) -> None:
    """The formula against the parameters of the module itself, built without memory."""
    import torch

    from moec.sources.decoder.decoder import Decoder

    spec = load_spec(SPECS / "models" / f"{name}.yaml")
    assert isinstance(spec.model, DecoderConfig)
    with torch.device("meta"):
        module = Decoder(spec.model)
    seen = {id(p): p.numel() for p_name, p in module.named_parameters() if not p_name.endswith("expert_bias")}
    assert sum(seen.values()) == parameter_counts(spec.model)["total"]


def test_window_in_three_of_four_layers() -> None:
    config = load_spec(SPECS / "models" / "mobilellm-pro.yaml").model
    assert isinstance(config, DecoderConfig)
    assert [config.window(layer) for layer in range(8)] == [512, 512, 512, 0, 512, 512, 512, 0]


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.stem)
def test_every_spec_round_trips_and_names_its_schema(file: Path) -> None:
    spec = load_spec(file)
    again = parse_spec(yaml.safe_dump(spec.model_dump(mode="json")))
    assert again == spec
    assert spec.name == file.stem
    assert file.read_text().startswith("# yaml-language-server: $schema=../schema.json\n")


def test_schema_is_fresh() -> None:
    """`moec schema --out specs/schema.json` after a change of the spec's classes."""
    targets = sorted(f.parent.name for f in (SPECS.parent / "targets").glob("*/options.py"))
    assert (SPECS / "schema.json").read_text() == json_text(spec_schema(targets)) + "\n"


def test_schema_accepts_the_shipped_specs() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the jsonschema package is not installed")
    schema = json.loads((SPECS / "schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for file in MODELS:
        assert not list(validator.iter_errors(yaml.safe_load(file.read_text()))), file
    broken = yaml.safe_load(MODELS[0].read_text())
    broken["quantization"]["routr"] = "fp32"
    assert list(validator.iter_errors(broken))


# dotted path, value (DROPPED: the key goes), whether it makes a spec; a change of mobilemoe-tiny each
DROPPED = object()
CHANGES: list[tuple[str, object, bool]] = [
    ("targets", "xnnpack", True),
    ("targets", ["metal", {"xnnpack": {"threads": 2}}], True),
    ("targets", {"xnnpack": None}, True),
    ("targets", {"xnnpack": {"threads": 0}}, False),
    ("targets", ["xnpack"], False),
    ("targets", [], False),
    ("name", "my model", False),
    ("name", "a" * 101, False),
    ("checkpoint", "../weights", True),
    ("quantization", "none", True),
    ("quantization", None, False),
    ("quantization", "int4", False),
    ("quantization.weights", DROPPED, False),
    ("quantization.router", "int8", False),
    ("quantization.group_size", 48, False),
    ("quantization.embedding", {"weights": "int8", "group_size": 64}, True),
    ("quantization.embedding", {"weights": "int8", "groupsize": 64}, False),
    ("model.moe", DROPPED, False),
    ("model.moe", None, False),
    ("model.ffn_width", 128, False),
    ("model.ffn_width", None, True),
    ("model.architecture", "mobilellm", False),
    ("model.head_dim", 31, False),
    ("model.layers", "4", False),
    ("model.rope.theta", 500000, True),
    ("model.rope.theta", 0, False),
    ("model.rope.scaling", None, True),
    ("model.moe.score", "softmax", False),
    ("model.eos_ids", [], True),
    ("model.eos_ids", 1, False),
    ("model", {"transformers": "folder"}, True),
    ("model", {"python": "module:function"}, True),
    ("model", {"transformers": "folder", "architecture": "mobilemoe"}, False),
    ("training.stages", [], False),
    ("training", None, True),
]


@pytest.mark.parametrize(("path", "value", "valid"), CHANGES, ids=lambda v: v if isinstance(v, str) else None)
def test_schema_and_loader_agree(path: str, value: object, valid: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the jsonschema package is not installed")
    raw = yaml.safe_load((SPECS / "models" / "mobilemoe-tiny.yaml").read_text())
    *parents, key = path.split(".")
    section = raw
    for parent in parents:
        section = section[parent]
    section.pop(key, None)
    if value is not DROPPED:
        section[key] = value
    schema = json.loads((SPECS / "schema.json").read_text())
    assert jsonschema.Draft202012Validator(schema).is_valid(raw) == valid
    try:
        as_spec(raw)
    except SpecError:
        assert not valid
    else:
        assert valid


def test_scheme_by_role() -> None:
    text = (SPECS / "models" / "mobilemoe-tiny.yaml").read_text()
    text = text.replace("embedding: int4", "embedding: {weights: int8, group_size: 64}\n  attention: fp32")
    quantization = parse_spec(text).quantization
    assert quantization is not None
    found = {role: quantization.scheme(role) for role in Role}
    assert found[Role.EXPERT] == WeightScheme(4, 32, "out")
    assert found[Role.SHARED] == found[Role.FFN] == WeightScheme(4, 32, "in")
    assert found[Role.EMBEDDING] == found[Role.HEAD] == WeightScheme(8, 64, "in")
    for role in (Role.ATTENTION, Role.ROUTER, Role.NORM, Role.CACHE, Role.CONSTANT, Role.OTHER):
        assert found[role] is None, role


def test_the_spec_of_the_documentation() -> None:
    """docs/specs.md shows the spec of MobileMoE-S, and the faults of two mistakes in it as they are reported."""
    page = (SPECS.parent / "docs" / "specs.md").read_text()
    block = page.split("```yaml\n")[1].split("```")[0]
    spec = parse_spec(block)
    assert isinstance(spec.model, DecoderConfig)
    assert tuple(parameter_counts(spec.model).values()) == PUBLISHED["mobilemoe-s"]
    with pytest.raises(SpecError) as raised:
        parse_spec(block.replace("kv_heads:", "kv_head:").replace("top_k: 4", "top_k: 64"), file="my.yaml")
    assert str(raised.value).splitlines() == [line for line in page.splitlines() if line.startswith("my.yaml:")]
