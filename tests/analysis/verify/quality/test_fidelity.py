"""An artifact against its float model: the streamed run, the figures, the gate, what is said when there are none."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.analysis.verify.artifact import open_artifact_checkpoint, verify_artifact
from moec.analysis.verify.quality import fidelity
from moec.analysis.verify.quality.fidelity import ArtifactModel, FloatModel
from moec.analysis.verify.quality.streamed import stream_logits
from moec.analysis.verify.quality.texts import Chunk
from moec.checkpoints import synthesize
from moec.cli.main import run
from moec.compiler import build
from moec.compiler.artifact import Artifact
from moec.compiler.program import LazyWeight, Role
from moec.compiler.spec import Spec
from moec.sources.decoder.simulate import Reference

MODEL = {
    "architecture": "mobilemoe", "layers": 3, "d_model": 64, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "vocab_size": 512, "context": 96, "qk_norm": True, "rope": {"theta": 10000.0, "interleaved": True},
    "moe": {"experts": 8, "top_k": 2, "expert_width": 32, "shared_width": 64, "scale": 2.5},
}  # fmt: skip
CHUNKS = [Chunk("a", tuple(range(3, 90))), Chunk("b", (5, 9)), Chunk("a", tuple(range(400, 330, -1)))]


def spec_of(quantization: object) -> Spec:
    return Spec.model_validate({"name": "fine", "model": MODEL, "quantization": quantization})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(spec_of("none"), tmp_path_factory.mktemp("fidelity") / "float", seed=3)


@pytest.fixture(scope="module")
def artifacts(checkpoint: Path) -> dict[str, Artifact]:
    schemes = {"int4": {"weights": "int4"}, "int8": {"weights": "int8"}, "none": "none"}
    return {
        name: build.compile(spec_of(scheme), checkpoint=checkpoint, out=checkpoint.parent / name)
        for name, scheme in schemes.items()
    }


def test_the_streamed_run_is_the_float_model(checkpoint: Path) -> None:
    # the eager decoder shares no code with the graph; fp32 sums in another order differ by some 1e-6
    spec = spec_of("none")
    store = build.open_checkpoint(spec, checkpoint)
    found = list(FloatModel(spec, store, 96).logits(CHUNKS))
    reference = Reference(spec.model, store, None)  # type: ignore[arg-type]
    for chunk, logits_TV in zip(CHUNKS, found, strict=True):
        np.testing.assert_allclose(logits_TV, reference.forward(chunk.ids).logits, atol=1e-4, rtol=1e-4)


def test_each_weight_is_read_once_for_all_chunks(checkpoint: Path) -> None:
    spec = spec_of("none")
    program = FloatModel(spec, build.open_checkpoint(spec, checkpoint), 96)._program
    read: Counter[str] = Counter()

    def counted(name: str, weight: LazyWeight) -> LazyWeight:
        def load() -> torch.Tensor:
            read[name] += 1
            return weight.load()

        return replace(weight, load=load)

    program = replace(program, weights={name: counted(name, weight) for name, weight in program.weights.items()})
    assert len(list(stream_logits(program, [chunk.ids for chunk in CHUNKS]))) == len(CHUNKS) > 1
    states = set(program.state_tensors())
    constants = {name for name, role in program.roles.items() if role == Role.CONSTANT}  # tables of positions: small
    assert set(read) | constants == set(program.weights)
    tied = "model.embed_tokens.weight"  # read at both ends: the table is not kept while the layers run
    assert {name: n for name, n in read.items() if n != 1 and name not in states | constants} == {tied: 2}
    assert {read[name] for name in states} == {len(CHUNKS)}


def test_fewer_bits_cost_more_and_none_cost_nothing(artifacts: dict[str, Artifact], checkpoint: Path) -> None:
    spec = spec_of("none")
    models = [ArtifactModel(artifacts[name]) for name in ("none", "int8", "int4")]
    found = fidelity.measure(FloatModel(spec, build.open_checkpoint(spec, checkpoint), 96), models, CHUNKS)
    none, int8, int4 = (f.overall for f in found)
    assert none is not None
    assert int8 is not None
    assert int4 is not None
    assert none.kld < 1e-6 < int8.kld < int4.kld / 4
    assert (none.top1, none.tokens) == (1, 159)
    assert int4.top1 < 1
    assert set(found[0].domains) == {"a", "b"}


def test_verify_states_it_and_passed_does_not_stand_alone(
    artifacts: dict[str, Artifact], tmp_path: Path, capsys
) -> None:
    folder = artifacts["int4"].folder
    assert run(["verify", str(folder), "--tokens", "40", "-q", "--json", str(tmp_path / "r.json")]) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("passed; KL divergence 0.")
    document = json.loads((tmp_path / "r.json").read_text())["fidelity"]
    assert document["measured"] is True
    assert 0 < document["median"] <= document["p99"] <= document["worst"]
    assert set(document["domains"]) == {"prose", "code", "chat"}
    assert run(["verify", str(folder), "--tokens", "40", "-q", "--quality-tokens", "0"]) == 0
    assert "passed; what quantization cost was not measured" in capsys.readouterr().out


def test_the_gate(artifacts: dict[str, Artifact], tmp_path: Path, capsys) -> None:
    text = tmp_path / "text"
    text.write_text("a few words of one's own, and then a few more of them")
    common = ["verify", str(artifacts["int4"].folder), "--tokens", "20", "-q", "--text", str(text)]
    assert run([*common, "--max-kld", "1e-9"]) == 1
    out = capsys.readouterr().out
    assert "FAILED quantization: mean KL divergence" in out
    assert run([*common, "--max-kld", "100"]) == 0
    assert run([*common, "--max-kld", "100", "--quality-tokens", "0"]) == 1  # what is not measured meets no limit
    assert "no tokens were given" in capsys.readouterr().out


def test_codes_are_no_float_model(tmp_path: Path, checkpoint: Path) -> None:
    scheme = {"weights": "int4", "group_size": 32}
    packed = synthesize(spec_of(scheme), tmp_path / "packed", seed=3, qat=True)
    artifact = build.compile(spec_of(scheme), checkpoint=packed, out=tmp_path / "artifact")
    report = verify_artifact(artifact.folder, tokens=40)
    assert report.fidelity is not None
    assert report.fidelity.overall is None
    assert "stored as codes" in report.fidelity.why
    assert "--reference" in report.text()
    given = verify_artifact(artifact.folder, tokens=40, reference=checkpoint)
    assert given.fidelity is not None
    assert given.fidelity.overall is not None
    assert given.fidelity.reference == str(checkpoint)
    assert open_artifact_checkpoint(artifact, spec_of(scheme), None).folder == packed


def test_the_command_compares_what_it_is_given(artifacts, checkpoint, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra: pip install 'moec[report]'")
    paths = [str(artifacts["int4"].folder), str(artifacts["int8"].folder), str(checkpoint)]
    plot = tmp_path / "plot.svg"
    assert run(["quality", *paths, "-q", "--tokens", "96", "--json", "--plot", str(plot)]) == 0
    int4, int8, own = json.loads(capsys.readouterr().out)["models"]
    assert int4["kld"] > int8["kld"] > own["kld"] == 0
    assert int4["bytes"] == artifacts["int4"].bytes < int8["bytes"]
    assert {m["reference"] for m in (int4, int8, own)} == {str(checkpoint)}
    assert {name: d["tokens"] for name, d in int4["domains"].items()} == dict.fromkeys(("prose", "code", "chat"), 96)
    drawn = plot.read_text()
    assert "<svg" in drawn
    assert run(["quality", *paths[:2], "-q", "--tokens", "96", "--max-kld", str((int4["kld"] + int8["kld"]) / 2)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len({line.rindex("%") for line in lines[2:]}) == 1  # columns of numbers end at one place
    assert run(["quality", paths[1], "-q", "--tokens", "96", "--max-kld", str(int4["kld"])]) == 0


def dense_checkpoint(folder: Path, **changes: object) -> Path:
    model = {k: v for k, v in MODEL.items() if k != "moe"} | {"architecture": "mobilellm", "ffn_width": 96} | changes
    return synthesize(Spec.model_validate({"name": "dense", "model": model, "quantization": "none"}), folder, seed=5)


@pytest.mark.slow
def test_another_model_of_the_same_tokens_may_be_the_reference(artifacts, checkpoint, tmp_path, capsys) -> None:
    dense, artifact = dense_checkpoint(tmp_path / "dense"), str(artifacts["none"].folder)
    assert run(["quality", artifact, "--reference", str(dense), "-q", "--tokens", "96", "--json"]) == 0
    (far,) = json.loads(capsys.readouterr().out)["models"]
    assert far["reference"] == str(dense)
    assert run(["quality", artifact, str(dense), "--reference", str(checkpoint), "-q", "--tokens", "96", "--json"]) == 0
    near, other = json.loads(capsys.readouterr().out)["models"]
    # the same two models the other way round: neither figure is that of the artifact's own checkpoint
    assert near["kld"] < 1e-6 < other["kld"]
    assert far["reference_perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


def test_a_reference_of_other_tokens_is_refused(artifacts, tmp_path, capsys) -> None:
    artifact = str(artifacts["none"].folder)
    wider = dense_checkpoint(tmp_path / "wider", vocab_size=640)
    assert run(["quality", artifact, "--reference", str(wider), "-q", "--tokens", "96"]) == 2
    assert "it predicts 640 tokens" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_line(artifacts: dict[str, Artifact], tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([str(tmp_path / "empty")], "which float model"),
        ([str(artifacts["int4"].folder), str(tmp_path / "empty")], "neither an artifact nor a checkpoint"),
        ([str(artifacts["int4"].folder), "--reference", str(tmp_path / "empty")], "config.json"),
        ([str(artifacts["int4"].folder), "--text", str(tmp_path / "nothing")], "cannot be read"),
    ):
        assert run(["quality", "-q", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
