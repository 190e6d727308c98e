"""Damaged Metal artifacts: every fault is an ArtifactError that names the file, never a crash."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

pytest.importorskip("mlx.core", reason="needs the metal extra: pip install 'moec[metal]'")

from moec.compiler.errors import ArtifactError, MissingExtra
from moec.compiler.progress import Progress
from moec.targets.metal import delegate_package
from moec.targets.metal.facts import MetalFacts
from moec.targets.metal.instructions import HANDLERS
from moec.targets.metal.lower import lower
from moec.targets.metal.options import Options
from moec.targets.metal.payload import PteFile, parse_payload
from moec.targets.metal.session import MetalSession
from tests.targets.metal_models import Shape, make_weights, program_of

SHAPE = Shape(layers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any], bytes]:
    """(the file, the manifest's details, the payload of `forward`)."""
    out = tmp_path_factory.mktemp("metal")
    lowered = lower(program_of(make_weights(SHAPE)), out, Options(dtype="float32"), Progress(quiet=True))
    payload = PteFile(out / "model.pte").payloads["forward"]
    return (out / "model.pte").read_bytes(), lowered.facts.model_dump(mode="json"), payload


def open_and_run(file: Path, details: dict[str, Any]) -> np.ndarray:
    with MetalSession(
        file, vocab_size=SHAPE.vocab, context=SHAPE.context, max_tokens=32, facts=MetalFacts.model_validate(details)
    ) as session:
        return session.prefill([1, 2, 3], "last")


def without_digests(details: dict[str, Any]) -> dict[str, Any]:
    methods = {k: {f: v for f, v in m.items() if f != "payload_sha256"} for k, m in details["methods"].items()}
    return {**details, "methods": methods}


def test_the_undamaged_file_runs(made: Any, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(made[0])
    assert np.isfinite(open_and_run(tmp_path / "model.pte", made[1])).all()


@pytest.mark.parametrize("keep", [0, 4, 40, 200, 4000, -1000, -1])
def test_a_truncated_file(made: Any, tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(made[0][:keep])
    with pytest.raises(ArtifactError, match=r"model\.pte"):
        open_and_run(file, made[1])


def test_a_missing_file(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_and_run(tmp_path / "model.pte", made[1])


def test_instructions_that_are_not_the_manifests(made: Any, tmp_path: Path) -> None:
    """One flipped bit in an instruction's literal parses well: the digest tells."""
    data, details, payload = made
    at = data.index(payload)
    changed = bytearray(data)
    changed[at + len(payload) // 2] ^= 1
    (tmp_path / "model.pte").write_bytes(changed)
    with pytest.raises(ArtifactError, match="differ from the manifest's digest"):
        open_and_run(tmp_path / "model.pte", details)


def test_another_schema_version(made: Any) -> None:
    MLXGraph = delegate_package.bindings("mlx_delegate.MLXGraph").MLXGraph

    header, payload = 24, bytearray(made[2])
    table = MLXGraph.GetRootAs(payload, header)._tab
    text = table.Indirect(table.Pos + table.Offset(4)) + 4  # the first field; four bytes of length before its text
    assert payload[text : text + 2] == b"1\x00"
    payload[text] = ord("2")
    with pytest.raises(ValueError, match="schema version '2', this moec reads version 1"):
        parse_payload(bytes(payload))


@pytest.mark.parametrize("damage", ["magic", "offset", "short"])
def test_a_payload_that_is_none(made: Any, damage: str) -> None:
    payload = bytearray(made[2])
    if damage == "magic":
        payload[4] ^= 0xFF
    elif damage == "offset":
        payload[8:16] = (1 << 40).to_bytes(8, "little")
    else:
        del payload[10:]
    with pytest.raises(ValueError, match="payload"):
        parse_payload(bytes(payload))


def test_an_unknown_instruction_is_an_error(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pte").write_bytes(made[0])
    monkeypatch.delitem(HANDLERS, "GatherQmm")
    with pytest.raises(ArtifactError, match="cannot execute: GatherQmm"):
        open_and_run(tmp_path / "model.pte", made[1])


def test_random_bytes_never_crash(made: Any, tmp_path: Path) -> None:
    """200 files with a few random bytes each, in the program and the payloads, digests left out: either a clear error
    or an answer of the right shape. A crash of the process would end the test run."""
    data, details, payload = made
    details = without_digests(details)
    begin = data.index(payload)
    draw = random.Random(0)
    told: list[str] = []
    for trial in range(200):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            where = draw.randrange(0, 3000) if trial % 2 else begin + draw.randrange(len(payload))
            changed[where] = draw.randrange(256)
        file = tmp_path / "model.pte"
        file.write_bytes(changed)
        try:
            answer = open_and_run(file, details)
        except ArtifactError as e:
            told.append(str(e))
        else:
            assert answer.shape == (1, SHAPE.vocab)
    assert len(told) > 50  # most of the bytes matter
    assert all("model.pte" in line and "\n" not in line for line in told)


def test_taps_of_another_artifact(made: Any) -> None:
    """A manifest that a trace cannot follow is refused when it is read, by the field's name."""
    details = json.loads(json.dumps(made[1]))
    details["methods"]["forward"]["moe_taps"] = [{"layer": 0, "after": 5}]
    with pytest.raises(ValidationError, match="moe_taps"):
        MetalFacts.model_validate(details)


def test_without_mlx_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlx", None)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(MissingExtra, match=r"pip install 'moec\[metal\]'") as caught:
        delegate_package.require_mlx()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "said"), [("tpu", "set it to cpu or gpu"), ("gpu", "no Metal device")])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    import mlx.core as mx

    if value == "gpu" and mx.metal.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.setenv("MOEC_MLX_DEVICE", value)
    with pytest.raises(MissingExtra, match=said):
        delegate_package.require_mlx()


def test_generated_modules_are_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    folder = delegate_package.generated_folder()
    names = {str(p.relative_to(folder)) for p in folder.rglob("*.py")}
    assert {"_generated_inspector.py", "serialization/mlx_graph_schema.py"} <= names
    before = folder.stat().st_mtime_ns
    assert delegate_package.generated_folder() == folder
    assert folder.stat().st_mtime_ns == before
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
