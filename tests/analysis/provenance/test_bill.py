"""The bill of an artifact: valid by CycloneDX's schema, complete, and the same whenever and wherever it is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Moec, refused

pytest.importorskip("cyclonedx", reason="needs the sbom extra: pip install 'moec[sbom]'")


@pytest.fixture
def bill(artifact: Path, moec: Moec) -> dict:
    status, out, said = moec("sbom", artifact, "--license", "apache-2.0")
    assert (status, said) == (0, "")
    return dict(json.loads(out))


def test_the_schema_holds(bill: dict) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bill)) is None
    bill["components"][0]["hashes"][0]["content"] = "none"
    assert validator.validate_str(json.dumps(bill)) is not None, "the validator does not validate"


def test_every_file_of_the_folder_but_the_mark_is_a_component(artifact: Path, bill: dict) -> None:
    stated = {c["name"]: c["hashes"] for c in bill["components"] if c["type"] == "file"}
    assert set(stated) == {f.name for f in artifact.iterdir()} - {".moec"}
    for name, hashes in stated.items():
        digest = hashlib.sha256((artifact / name).read_bytes()).hexdigest()
        assert hashes == [{"alg": "SHA-256", "content": digest}]


def test_libraries_have_versions_licences_and_what_they_are_for(artifact: Path, bill: dict) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    found = {c["name"]: c for c in bill["components"] if c["type"] == "library"}
    assert set(found) == {"moec-kernels", "moec", "executorch", "torch", "torchao", "numpy"}
    assert {name for name, c in found.items() if c["scope"] == "required"} == {"moec-kernels", "executorch"}
    assert all(found[name]["version"] == manifest["versions"][name] for name in ("executorch", "torch", "torchao"))
    assert all(c["licenses"] for c in found.values())
    assert found["executorch"]["purl"] == f"pkg:pypi/executorch@{found['executorch']['version']}"
    kernel = {"name": "moec:digest:source", "value": manifest["digests"]["kernel"]}
    assert kernel in found["moec-kernels"]["properties"]
    needs = {d["ref"]: d.get("dependsOn", []) for d in bill["dependencies"]}
    assert needs["moec-kernels"] == [found["executorch"]["bom-ref"]]
    assert {"moec-kernels", "file:model.pte", "file:manifest.json"} < set(needs["artifact"])


def test_the_model_is_the_subject(bill: dict) -> None:
    subject = bill["metadata"]["component"]
    assert subject["type"] == "machine-learning-model"
    assert subject["licenses"] == [{"license": {"id": "Apache-2.0"}}]


def test_another_place_and_time_give_the_same_bytes(artifact: Path, tmp_path: Path, moec: Moec) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    out = tmp_path / "bill.json"
    assert moec("sbom", tmp_path / "copy", "--out", out) == (0, "", "")
    _, first, _ = moec("sbom", artifact)
    assert out.read_text() == first
    assert "timestamp" not in first
    assert str(tmp_path) not in first
    assert '"licenses"' not in json.dumps(json.loads(first)["metadata"]), "no licence of the model was stated"


def test_other_contents_have_another_serial_number(artifact: Path, bill: dict, moec: Moec) -> None:
    _, out, _ = moec("sbom", artifact, "--license", "MIT")
    assert json.loads(out)["serialNumber"] != bill["serialNumber"]


def test_versions_that_are_not_installed_have_no_licence(artifact: Path, tmp_path: Path, moec: Moec) -> None:
    """Nothing is said of them from what another version states."""
    folder = tmp_path / "a"
    shutil.copytree(artifact, folder)
    manifest = folder / "manifest.json"
    manifest.write_text(
        manifest.read_text()
        .replace('"executorch": "1.5.1"', '"executorch": "9.9"')
        .replace('"executorch":"1.5.1"', '"executorch":"9.9"')
    )
    _, out, _ = moec("sbom", folder)
    found = next(c for c in json.loads(out)["components"] if c["name"] == "executorch")
    assert found["version"] == "9.9"
    assert "licenses" not in found


def test_what_is_no_licence_or_a_damaged_artifact_is_said(artifact: Path, tmp_path: Path, moec: Moec) -> None:
    refused(moec("sbom", artifact, "--license", "free for all"), "free for all", "SPDX")
    folder = tmp_path / "a"
    shutil.copytree(artifact, folder)
    program = bytearray((folder / "model.pte").read_bytes())
    program[-1] ^= 1
    (folder / "model.pte").write_bytes(program)
    refused(moec("sbom", folder), "differ")
