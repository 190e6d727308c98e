"""ONNX from end to end: from spec and checkpoint to an artifact that ONNX Runtime runs and `moec verify` accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the onnx extra: pip install 'moec[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the onnx extra: pip install 'moec[onnx]'")

import onnx
import onnxruntime

from moec.analysis.verify.prompts import WordHashEncoder, prompt_ids
from moec.checkpoints import open_store
from moec.cli import main as cli
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError, RunError
from moec.compiler.spec import load_spec
from moec.compiler.spec.quantization import FLOAT_ACTIVATIONS
from moec.sources.decoder.simulate import Reference
from tests.tiny import TinyModels, tiny_text
from tests.variants import quick

DENSE = """
name: dense-small
model:
  architecture: mobilellm
  layers: 4
  d_model: 64
  heads: 4
  kv_heads: 2
  head_dim: 16
  vocab_size: 512
  context: 96
  qk_norm: true
  tied_embeddings: {tied}
  rope: {{theta: 500000.0, interleaved: true}}
  attention_window: {{size: 7, every_nth_global: 4}}
  ffn_width: 96
quantization: {quantization}
targets: [{{onnx: {{{options}}}}}]
"""
Q4 = "{weights: int4, kv_cache: fp32, expert_group_axis: in}"
Q8 = "{weights: int8, kv_cache: fp32, expert_group_axis: in}"
Make = Callable[..., Path]

# fp32 sums in another order: 1e-5 for values of order one, and in proportion for the logits of 13 that occur here
FLOAT = {"atol": 1e-5, "rtol": 1e-5}
# relative to the largest logit; the codes are the same, so this too is the order of sums (asked: 1e-4, measured 1e-6)
CODES_LIMIT = 1e-5


@pytest.fixture(scope="module")
def make(tiny: TinyModels) -> Make:
    def get(
        options: str = "", quantization: str = Q4, *, qat: bool = False, dense: bool = False, tied: bool = True
    ) -> Path:
        if dense:
            return tiny(DENSE.format(tied=str(tied).lower(), quantization=quantization, options=options), qat=qat)
        head = tiny_text(context=300).partition("quantization:")[0]
        return tiny(f"{head}quantization: {quantization}\ntargets: [{{onnx: {{{options}}}}}]\n", qat=qat)

    return get


def logits_pair(folder: Path, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(the artifact's, in chunks and single steps; the eager model's with the same codes and float activations)."""
    spec = load_spec(folder / "spec.yaml")
    store = open_store(folder / "checkpoint", spec.model)
    scheme = spec.quantization
    if scheme is not None:
        scheme = scheme.model_copy(update={"activations": FLOAT_ACTIVATIONS})
    ids = prompt_ids(WordHashEncoder(spec.model.vocab_size), tokens=4 * tokens)["prose"][:tokens]
    with build.load(folder / "artifact") as session:  # type: ignore[attr-defined]
        got = np.concatenate([session.prefill(ids[:-9], "all"), *(session.decode(i)[None] for i in ids[-9:])])
    return got, Reference(spec.model, store, scheme).forward(ids).logits


@pytest.mark.parametrize("form", quick(["moe", "dense", "untied"], ("moe",)))
def test_without_quantization_equals_the_eager_model(make: Make, form: str) -> None:
    folder = make(quantization="none", dense=form != "moe", tied=form != "untied")
    got, wanted = logits_pair(folder, 70)
    np.testing.assert_allclose(got, wanted, **FLOAT)


CASES = {
    "int4 in": ("", Q4, False),
    "int4 out, codes of the checkpoint": ("", "{weights: int4, kv_cache: fp32, expert_group_axis: out}", True),
    "int8": ("", Q8, False),
    "ort int4": ("flavour: ort", Q4, False),
    "ort, other roles int8": ("flavour: ort", "{weights: int8, experts: int4, shared: int4, kv_cache: fp32, "
                              "expert_group_axis: in}", False),
    "mixed groups": ("", "{weights: int4, group_size: 64, embedding: {weights: int8, group_size: 32}, "
                     "kv_cache: fp32}", False),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", quick(CASES, ("int4 in", "int4 out, codes of the checkpoint", "int8", "ort, other roles int8"))
)
def test_equals_the_eager_model_with_the_same_codes(make: Make, case: str) -> None:
    options, quantization, qat = CASES[case]
    got, wanted = logits_pair(make(options, quantization, qat=qat), 150)
    assert np.abs(got - wanted).max() < CODES_LIMIT * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


@pytest.mark.parametrize(
    ("options", "weights", "tied"),
    [
        ("", "int4", True),
        pytest.param("", "int8", False, marks=pytest.mark.slow),
        pytest.param("flavour: ort", "int4", False, marks=pytest.mark.slow),
        ("flavour: ort", "int8", True),
    ],
)
def test_dense_with_a_sliding_window(make: Make, options: str, weights: str, tied: bool) -> None:
    quantization = f"{{weights: {weights}, kv_cache: fp32}}"
    got, wanted = logits_pair(make(options, quantization, dense=True, tied=tied), 60)
    assert np.abs(got - wanted).max() < CODES_LIMIT * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("options", "quantization", "qat"),
    [
        pytest.param("", "{weights: int4}", True, marks=pytest.mark.slow),  # the shipped default: INT8 cache
        pytest.param("kv_cache: fp32", "{weights: int4}", True, marks=pytest.mark.slow),
        ("flavour: ort", "{weights: int4, expert_group_axis: in}", False),
        ("", "none", False),
    ],
)
def test_verify_passes(make: Make, options: str, quantization: str, qat: bool, tmp_path: Path) -> None:
    folder, report = make(options, quantization, qat=qat), tmp_path / "report.json"
    assert cli.run(["verify", str(folder / "artifact"), "--tokens", "48", "--json", str(report), "--quiet"]) == 0
    assert json.loads(report.read_text())["passed"]


def test_what_differs_from_the_spec_is_said(make: Make) -> None:
    manifest = Artifact.open(make("kv_cache: fp32", "{weights: int4}", qat=True) / "artifact").manifest
    assert manifest.details["computes"] == {"activations": "fp32", "kv_cache": "fp32"}
    assert any("activations are float32" in note for note in manifest.notes)
    assert any("KV cache is float32" in note for note in manifest.notes)
    plain = Artifact.open(make("", "{weights: int4}", qat=True) / "artifact").manifest
    assert plain.details["computes"] == {"activations": "fp32"}
    assert plain.details["kv_cache"] == "int8"


def test_the_file_runs_in_onnx_runtime_as_it_is(make: Make) -> None:
    """No session of ours: names, types and open dimensions as ONNX Runtime's users know them, default options."""
    folder = make()
    session = onnxruntime.InferenceSession(str(folder / "artifact" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {i.name: i for i in session.get_inputs()}
    assert list(names)[:2] == ["input_ids", "attention_mask"]
    assert names["past_key_values.1.value"].shape == [1, 2, "past_sequence_length", 32]
    assert [o.name for o in session.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    past = {n: np.zeros((1, 2, 0, 32), np.float32) for n in names if n.startswith("past")}
    ids = np.array([[5, 9, 3, 700, 2]])
    outputs = [o.name for o in session.get_outputs()]
    whole = dict(
        zip(outputs, session.run(None, {"input_ids": ids, "attention_mask": ids * 0 + 1, **past}), strict=True)
    )
    first = dict(
        zip(outputs, session.run(None, {"input_ids": ids[:, :3], "attention_mask": np.ones((1, 3), np.int64), **past}),
            strict=True)
    )  # fmt: skip
    past = {n: first[n.replace("past_key_values", "present")] for n in past}
    rest = session.run(["logits"], {"input_ids": ids[:, 3:], "attention_mask": np.ones((1, 5), np.int64), **past})[0]
    np.testing.assert_allclose(rest, whole["logits"][:, 3:], atol=1e-5)
    # a hidden position is as if it were not there, but for where the others stand: rotary positions are relative
    hidden = np.array([[0, 1, 1, 1, 1]])
    past = {n: np.zeros((1, 2, 0, 32), np.float32) for n in past}
    masked = session.run(["logits"], {"input_ids": ids, "attention_mask": hidden, **past})[0]
    feeds = {"input_ids": ids[:, 1:], "attention_mask": np.ones((1, 4), np.int64), **past}
    np.testing.assert_allclose(masked[:, 1:], session.run(["logits"], feeds)[0], atol=1e-4)


def test_onnxruntime_genai_finds_the_names_that_it_looks_for(make: Make) -> None:
    folder = make() / "artifact"
    config = json.loads((folder / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    model = onnx.load(str(folder / decoder["filename"]), load_external_data=False)
    inputs, outputs = ({v.name for v in values} for values in (model.graph.input, model.graph.output))

    def named(names: dict[str, str]) -> set[str]:
        layers = range(decoder["num_hidden_layers"])
        return {name % n for name in names.values() for n in layers if "%d" in name} | {
            name for name in names.values() if "%d" not in name
        }

    assert named(decoder["inputs"]) == inputs
    assert named(decoder["outputs"]) == outputs
    assert config["model"]["eos_token_id"] == [1]
    assert not (make("", "{weights: int4}", qat=True) / "artifact" / "genai_config.json").exists()  # an INT8 cache


def test_onnxruntime_genai_continues_as_we_do(make: Make) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the genai extra: pip install 'moec[genai]'")
    folder, prompt = make() / "artifact", [0, 5, 9, 100, 7]
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + 6)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array([prompt], np.int32))
    theirs = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    with build.load(folder) as session:  # type: ignore[attr-defined]
        logits, ours = session.prefill(prompt)[0], []
        while len(ours) < 6 and (not ours or ours[-1] != 1):
            ours.append(int(logits.argmax()))
            logits = session.decode(ours[-1])
    assert theirs == ours


def test_bytes_are_counted_by_role(make: Make) -> None:
    folder = make("", "{weights: int4}", qat=True)
    artifact = Artifact.open(folder / "artifact")
    spec = load_spec(folder / "spec.yaml")
    moe = spec.model.moe
    experts = spec.model.layers * moe.experts * 3 * moe.expert_width * spec.model.d_model
    assert artifact.manifest.sizes_by_role["expert"] == experts * 9 // 16  # 4 bits, and 16 for each group of 32
    data = next(f for f in artifact.manifest.files if f.name == "model.onnx.data")
    weights = sum(n for role, n in artifact.manifest.sizes_by_role.items() if role != "program")
    assert weights <= data.bytes <= weights + 4096 * len(artifact.manifest.sizes_by_role) * spec.model.layers * 4


def test_commands(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make()
    artifact = str(folder / "artifact")
    assert cli.run(["run", artifact, "--ids", "0,5,9", "--max-new-tokens", "5"]) == 0
    assert cli.run(["inspect", artifact]) == 0
    shown = capfd.readouterr().out
    for part in ("moec::FusedMoE", "DequantizeLinear", "past_key_values.0..1.key", "external data", "expert"):
        assert part in shown
    assert cli.run(["bench", artifact, "--prefill", "8", "--decode", "2", "--repeats", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["prefill_tokens_per_s"] > 0
    assert report["isa"].startswith("ONNX Runtime")


def test_a_fork_and_a_rewound_session_go_on_as_an_unbroken_one(make: Make, tmp_path: Path) -> None:
    with build.load(make() / "artifact") as session:  # type: ignore[attr-defined]
        session.prefill([5, 6, 7, 8])
        expected = session.prefill([9, 10], "all")
        session.rewind(4)
        with session.fork() as fork:
            np.testing.assert_array_equal(session.prefill([11, 12]), fork.prefill([11, 12]))
            fork.rewind(4)
            np.testing.assert_array_equal(fork.prefill([9, 10], "all"), expected)
            assert (session.tokens[4:], fork.tokens[4:]) == ([11, 12], [9, 10])
        with pytest.raises(RunError, match="sessions of this target cannot be saved; compile the spec for xnnpack"):
            session.save(tmp_path / "s")


def test_a_session_refuses_what_it_cannot_do(make: Make) -> None:
    with build.load(make() / "artifact") as session:  # type: ignore[attr-defined]
        for ids, fault in (([], "empty"), ([4096], "vocabulary"), ([-1], "vocabulary"), ([1] * 301, "do not fit")):
            with pytest.raises(RunError, match=fault):
                session.prefill(ids)
            assert session.position == 0
        session.prefill([1] * 299)
        session.decode(1)
        with pytest.raises(RunError, match="300 of which are used"):
            session.decode(1)
        session.reset()
        session.decode(1)
    with pytest.raises(RunError, match="closed"):
        session.decode(1)


def test_qmoe_s_limit_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Make) -> None:
    folder = make("", "{weights: int4}", qat=True)
    spec = tmp_path / "spec.yaml"
    spec.write_text((folder / "spec.yaml").read_text().replace("onnx: {}", "onnx: {flavour: ort}"))
    capfd.readouterr()
    arguments = ["compile", str(spec), "--checkpoint", str(folder / "checkpoint"), "--out", str(tmp_path / "a"), "-q"]
    assert cli.run(arguments) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    assert "grouped along their output" in error
    assert "expert_group_axis: in" in error
    assert not (tmp_path / "a").exists()


class TestDamage:
    """Each fault of a file is one line that names it."""

    @pytest.fixture
    def copy(self, make: Make, tmp_path: Path) -> Path:
        target = tmp_path / "artifact"
        target.mkdir()
        for file in (make() / "artifact").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    def expect(self, folder: Path, fault: str) -> None:
        with pytest.raises((ArtifactError, RunError), match=fault) as caught:
            build.load(folder)
        assert "\n" not in str(caught.value)
        assert caught.value.remedy

    def test_missing_external_data(self, copy: Path) -> None:
        (copy / "model.onnx.data").unlink()
        self.expect(copy, "missing")

    def test_truncated_external_data(self, copy: Path) -> None:
        data = copy / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-100])
        self.expect(copy, "truncated")

    def test_damaged_head(self, copy: Path) -> None:
        model = copy / "model.onnx"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 0xFF
        model.write_bytes(bytes(content))
        self.expect(copy, "damaged")

    def rewritten(self, copy: Path, **details: Any) -> None:
        """A manifest that agrees with the files but for the details given."""
        from moec.compiler.artifact import record_file

        raw = json.loads((copy / "manifest.json").read_text())
        raw["files"] = [record_file(copy / f["name"]).model_dump() for f in raw["files"]]
        raw["details"].update(details)
        (copy / "manifest.json").write_text(json.dumps(raw))

    def test_what_the_runtime_refuses(self, copy: Path) -> None:
        model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
        model.graph.node[0].op_type = "NoSuchOperator"
        (copy / "model.onnx").write_bytes(model.SerializeToString())
        self.rewritten(copy)
        self.expect(copy, "does not load it.*NoSuchOperator")

    def test_an_opset_of_the_future(self, copy: Path) -> None:
        model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
        model.opset_import[0].version = 99
        (copy / "model.onnx").write_bytes(model.SerializeToString())
        self.rewritten(copy)
        self.expect(copy, "does not load it")

    def test_details_that_lie(self, copy: Path) -> None:
        self.rewritten(copy, caches=[{"key": "?"}])
        self.expect(copy, "details.caches")
        self.rewritten(copy, caches=Artifact.open(copy).manifest.details["caches"])

    def test_taps_that_are_not_there(self, copy: Path) -> None:
        self.rewritten(copy, moe_taps=[{"x": "nowhere"}])
        with pytest.raises(ArtifactError, match=r"details\.moe_taps\.0\.indices"):
            build.load(copy)
        self.rewritten(copy, moe_taps=[dict.fromkeys(("x", "indices", "weights", "y"), "nowhere")])
        session = build.load(copy)
        with pytest.raises(ArtifactError, match="moe_taps"):
            session.trace(True)

    def test_an_old_runtime(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnxruntime, "__version__", "1.17.3")
        self.expect(copy, "1.17.3 is too old")


def test_a_missing_extra_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from moec.compiler.errors import MissingExtra

    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else known(name))
    with pytest.raises(MissingExtra, match=r"moec\[onnx\]"):
        build.load(make() / "artifact")
