"""`moec quantize` on small models: sizes that compiling keeps, what parts cost measured apart, faults in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

from moec.analysis.bits.parts import measure_parts, parts_of
from moec.analysis.plan.planner import architecture_of_spec, plan_spec
from moec.checkpoints.synthesize import synthesize
from moec.compiler import build
from moec.compiler.pipeline import run_passes
from moec.compiler.program import LazyWeight, Program
from moec.compiler.progress import Progress
from moec.compiler.quantizer import codes_of, last_axis
from moec.compiler.spec import Spec, load_spec, parse_spec
from moec.passes.pipelines import fusion
from moec.passes.quantize_weights import reads
from tests.analysis.calibration.models import MODEL, TEXTS, float_program, spec_of
from tests.assistant.conversations import template
from tests.assistant.speaking import VOCABULARY, tokenizer
from tests.conftest import Moec, refused

QUIET = Progress(quiet=True)
_STEP = 6 * (64 * 64 + 64 * 32 + 2 * 64 * 64) // 2  # bytes between INT4 and INT8 of the largest part, a layer's experts
_RESERVED = 40960  # bytes kept free for the manifest, whose length is not known before, and for what planning rounds up
DENSE = {"moe": None, "ffn_width": 96, "architecture": "mobilellm"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CALIBRATION_DIR", str(folder))
        yield folder  # type: ignore[misc]


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    raw = {"name": "small", "checkpoint": "weights", "model": MODEL, "quantization": {"weights": "int8"}}
    raw["quantization"] |= {"calibration": {"tokens": 320, "tokens_per_expert": 8}}  # type: ignore[operator]
    raw["targets"] = ["xnnpack"]
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    spec: Spec = load_spec(file)
    synthesize(spec, folder / "weights", seed=3)
    return file


def test_what_was_measured_is_found_for_the_same_options_alone(
    spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal stores scales, and what is not quantized, in the type that its options name."""
    from moec.analysis.bits import choose

    asked: list[str] = []
    monkeypatch.setattr(choose, "_read", lambda file: asked.append(file.name) or choose.Costs((), (), ()))
    for dtype in ("float16", "float32", "float16"):
        raw = yaml.safe_load(spec_file.read_text()) | {"targets": {"metal": {"dtype": dtype}}}
        spec = parse_spec(yaml.safe_dump(raw), folder=spec_file.parent)
        choose.measured(spec, build.open_checkpoint(spec, None), "metal", QUIET)  # type: ignore[arg-type]
    assert asked[0] != asked[1]
    assert asked[0] == asked[2]


@pytest.mark.parametrize("model", [{}, DENSE], ids=["mixture", "dense"])
def test_a_part_alone_is_measured(model: dict[str, object]) -> None:
    """Beside the program run once for each part with that part's weights replaced, on the whole text."""
    program = float_program(model)
    quantization = spec_of(model).quantization
    assert quantization is not None
    parts = parts_of(program, quantization)
    assert len(parts) == (1 + 2 * (4 + 3) if model else 1 + 2 * (4 + 1)), "experts of a layer are one part"

    def coded(name: str) -> torch.Tensor:
        read = next(r for p in parts for r in p.weights if r.name == name)
        tensor = codes_of(program.weights[name], read.scheme, orientation=read.orientation).dequantize()
        turned = last_axis(read.orientation) != read.scheme.axis
        return tensor.transpose(-1, -2) if turned else tensor

    texts = [t for t in TEXTS if len(t) > 1]
    found = measure_parts(program, parts, coded, texts, QUIET)
    plain = _logits(program, texts)
    for part, kld in zip(parts, found, strict=True):
        weights = dict(program.weights)
        for read in part.weights:
            old = weights[read.name]
            weights[read.name] = LazyWeight(old.shape, old.dtype, lambda n=read.name: coded(n))  # type: ignore[misc]
        changed = _logits(replace(program, weights=weights), texts)
        p, q = functional.log_softmax(plain, -1), functional.log_softmax(changed, -1)
        expected = float(functional.kl_div(q, p, log_target=True, reduction="sum")) / len(plain)
        assert kld == pytest.approx(expected, rel=1e-3, abs=1e-6), part.name
        assert kld > 0


def _logits(program: Program, texts: list[list[int]]) -> torch.Tensor:
    from moec.analysis.verify.interpret import GraphRunner

    rows = []
    for ids in texts:
        runner = GraphRunner(program)
        longest = program.info.max_tokens
        rows += [runner(ids[s : s + longest], s).reshape(-1, 97) for s in range(0, len(ids), longest)]
    return torch.cat(rows)


def size_of(moec: Moec, spec: Path, out: Path) -> int:
    status, said, error = moec("compile", spec, "--out", out, "-q", "--json")
    assert status == 0, error
    return int(json.loads(said)["bytes"])


def chosen(moec: Moec, *words: object) -> dict[str, object]:
    status, said, error = moec("quantize", *words, "--quiet", "--json", "--tokens", 128)
    assert status == 0, error
    found: dict[str, object] = json.loads(said)
    return found


@pytest.mark.slow
def test_the_artifact_has_the_size(spec_file: Path, tmp_path: Path, moec: Moec) -> None:
    """Whole artifacts of three sizes between all INT4 and all INT8, compiled from the spec that was written."""
    small, large = (chosen(moec, spec_file, "--target-size", mb, "--out", tmp_path / f"{i}.yaml") for i, mb in
                    enumerate((0.2, 90)))  # fmt: skip
    low, high = int(str(small["bytes"])), int(str(large["bytes"]))
    assert low < high
    klds = []
    for share in (0.3, 0.7):
        out, most = tmp_path / f"{share}.yaml", low + round(share * (high - low))
        found = chosen(moec, spec_file, "--target-size", most / 1e6, "--out", out)
        assert most - _STEP <= int(str(found["bytes"])) <= most
        real = size_of(moec, out, tmp_path / f"a{share}")
        assert real <= most
        assert real >= most - _RESERVED - _STEP
        klds.append(float(str(found["expected_kld"])))
        bits = {p["bits"] for p in found["parts"]}  # type: ignore[attr-defined]
        assert bits == {4, 8}
    assert float(str(large["expected_kld"])) < klds[1] < klds[0] < float(str(small["expected_kld"]))
    text = out.read_text("utf-8")
    assert text.startswith("# moec quantize: ")
    again = load_spec(out)
    assert again.quantization is not None
    assert again.quantization.tensors


def test_the_size_counts_every_file(tmp_path: Path) -> None:
    """What an artifact holds beside its program and its manifest, tables for native apps included."""
    raw = {"name": "small", "checkpoint": str(tmp_path / "weights"), "targets": ["xnnpack"]}
    raw |= {"model": {**MODEL, **DENSE, "vocab_size": VOCABULARY}, "quantization": {"weights": "int4"}}
    spec = parse_spec(yaml.safe_dump(raw))
    synthesize(spec, tmp_path / "weights", seed=3)
    tokenizer().save(str(tmp_path / "weights/tokenizer.json"))
    (tmp_path / "weights/chat_template.jinja").write_text(template("chatml").text, "utf-8")
    folder = build.compile(spec, out=tmp_path / "artifact").folder
    beside = {f.name: f.stat().st_size for f in folder.iterdir()}
    assert {"tokenizer.json", "text.moec", "chat_roles.json"} <= set(beside)
    own = sum(size for name, size in beside.items() if name not in ("model.pte", "manifest.json", ".moec"))
    assert build.companion_bytes(build.open_checkpoint(spec, None)) == own
    given, kept = (f / "tokenizer.json" for f in (tmp_path / "weights", folder))
    assert json.loads(given.read_bytes()) == json.loads(kept.read_bytes())
    assert kept.stat().st_size < given.stat().st_size, "indentation is not carried"


@pytest.mark.slow
def test_several_sizes_are_of_one_measurement(
    spec_file: Path, tmp_path: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spec for each, the same as when it is chosen alone."""
    one = chosen(moec, spec_file, "--target-size", 0.2, "--out", tmp_path / "one.yaml")
    monkeypatch.setattr("moec.analysis.bits.choose.measure_parts", None)  # what was measured is found again
    both = chosen(moec, spec_file, "--target-size", "90,0.2", "--out", tmp_path / "of-{size}.yaml")["sizes"]
    large, small = both  # type: ignore[misc]
    assert [Path(r["spec"]).name for r in (large, small)] == ["of-90.yaml", "of-0.2.yaml"]
    assert small["bytes"] == one["bytes"] < large["bytes"]
    assert (tmp_path / "of-0.2.yaml").read_text("utf-8") == (tmp_path / "one.yaml").read_text("utf-8")
    assert load_spec(tmp_path / "of-90.yaml").quantization != load_spec(tmp_path / "of-0.2.yaml").quantization


@pytest.mark.slow  # two searches
def test_a_divergence_alone_gives_the_fewest_bytes(spec_file: Path, tmp_path: Path, moec: Moec) -> None:
    fine = chosen(moec, spec_file, "--target-size", 90, "--out", tmp_path / "fine.yaml")
    finest = float(fine["measured"]["kld"])  # type: ignore[index]
    found = chosen(moec, spec_file, "--max-kld", 8 * finest, "--out", tmp_path / "few.yaml")
    assert float(found["measured"]["kld"]) <= 8 * finest  # type: ignore[index]
    assert int(str(found["bytes"])) < int(str(fine["bytes"]))


def test_a_gate_that_fails_writes_nothing(spec_file: Path, tmp_path: Path, moec: Moec) -> None:
    out = tmp_path / "x.yaml"
    out.write_text("mine", "utf-8")
    status, _, error = moec("quantize", spec_file, "--target-size", 90, "--max-kld", 1e-9, "--out", out, "-q")
    assert status == 1
    assert "is more than 1e-09: nothing was written" in error
    assert out.read_text("utf-8") == "mine"


def test_faults(spec_file: Path, tmp_path: Path, moec: Moec) -> None:
    out = tmp_path / "out.yaml"
    words = ("quantize", spec_file, "-q", "--out", out)
    refused(moec(*words), "no size, device or divergence is given", "--target-size")
    refused(moec(*words, "--target-size", 0), "not a size in MB")
    refused(moec(*words, "--target-size", "92,small"), "'small' is not a size in MB")
    refused(moec(*words, "--target-size", "92,87"), "one file for 2 sizes", "out-{size}.yaml")
    twice = ("quantize", spec_file, "-q", "--out", tmp_path / "{size}.yaml", "--target-size", "92,92.0")
    refused(moec(*twice), "gives a size twice")
    refused(moec(*words, "--target-size", 0.01), "no mixture of bits", "the smallest has", "give at least")
    refused(moec(*words, "--max-kld", 1e-12), "no mixture of bits", "the finest costs")
    refused(moec(*words, "--device", "nowhere"), "nowhere")
    refused(moec("quantize", spec_file, "-q", "--target-size", 1, "--out", tmp_path), "is a folder")
    assert not out.exists()


def test_a_pattern_that_names_nothing_is_a_fault(spec_file: Path, tmp_path: Path, moec: Moec) -> None:
    raw = yaml.safe_load(spec_file.read_text("utf-8")) | {"checkpoint": str(spec_file.parent / "weights")}
    raw["quantization"] = {"weights": "int4", "tensors": {"model.layers.*.self_attn.w_proj.weight": "int8"}}
    file = tmp_path / "slip.yaml"
    file.write_text(yaml.safe_dump(raw), "utf-8")
    result = moec("compile", file, "-q", "--out", tmp_path / "out")
    refused(result, "no weight that can be quantized is called 'model.layers.*.self_attn.w_proj.weight'", "names are")


def test_experts_of_a_layer_are_stored_alike(spec_file: Path, tmp_path: Path, moec: Moec) -> None:
    raw = yaml.safe_load(spec_file.read_text("utf-8")) | {"checkpoint": str(spec_file.parent / "weights")}
    raw["quantization"] = {"weights": "int4", "tensors": {"model.layers.0.feed_forward.experts.down_proj": "int8"}}
    file = tmp_path / "unlike.yaml"
    file.write_text(yaml.safe_dump(raw), "utf-8")
    refused(moec("compile", file, "-q", "--out", tmp_path / "out"), "must be stored alike", "`tensors`")


@pytest.mark.parametrize("tied", [True, False])
def test_plans_count_exceptions_by_name(tied: bool, tmp_path: Path) -> None:
    """The planner's list of a transformers model has every weight of the graph that can be quantized, by its name."""
    transformers = pytest.importorskip("transformers", reason="pip install 'moec[transformers]'")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    raw = {"name": "llama", "model": {"transformers": str(tmp_path)}, "quantization": {"weights": "int4"}}
    spec = parse_spec(yaml.safe_dump({**raw, "targets": ["xnnpack"]}))
    assert spec.quantization is not None
    program, _ = build.program_and_passes(spec, None)
    graph = {r.name for r in reads(run_passes(program, fusion()), spec.quantization)}
    listed = {w.name: w for w in architecture_of_spec(spec).weights}
    assert graph <= set(listed), sorted(graph - set(listed))[:3]
    finer = {"*.down_proj.weight": "int8"}
    changed = parse_spec(
        yaml.safe_dump({**raw, "quantization": {"weights": "int4", "tensors": finer}, "targets": ["xnnpack"]})
    )
    more = plan_spec(changed).file_bytes - plan_spec(spec).file_bytes
    assert more == 2 * 64 * 96 // 2, "half a byte more for each weight of two layers"
