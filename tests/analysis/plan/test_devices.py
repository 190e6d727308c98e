"""Device files: the shipped ones, strictness with places, and the commands over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moec.analysis.plan.devices import REFERENCE, check_runs, load_device
from moec.analysis.plan.measured import device_yaml, figure, known
from moec.cli.output import json_text
from moec.compiler.errors import SpecError, UserError
from moec.compiler.spec.device import Device, device_files
from moec.compiler.spec.loader import load_device_file, load_spec, parse_spec
from moec.compiler.spec.schema import device_schema
from tests.conftest import Moec

SPECS = Path(__file__).parents[3] / "specs"
FILES = sorted((SPECS / "devices").glob("*.yaml"))
TINY = (SPECS / "models" / "mobilemoe-tiny.yaml").read_text()


def test_the_devices_that_ship() -> None:
    asked = {"galaxy-s25", "iphone-16-pro", "iphone-17", "phone-4gb", "wearable", REFERENCE}
    assert asked <= set(device_files())
    assert device_files() == {f.stem: f for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_device_loads_and_cites(file: Path) -> None:
    device = load_device_file(file)
    assert device.name == file.stem
    assert file.read_text().startswith("# yaml-language-server: $schema=../device-schema.json\n")
    figures = [value for _, value in device if hasattr(value, "source")]
    assert len(figures) >= 5
    assert all(len(f.source.split()) >= 3 for f in figures)
    assert 0 < device.budget <= device.memory_total_mb.number * 1e6


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_written_device_reads_back(file: Path, tmp_path: Path) -> None:
    device = load_device_file(file)
    again = tmp_path / "again.yaml"
    again.write_text(device_yaml(device, "A comment. " * 30))
    assert load_device_file(again) == device


def test_schema_is_fresh_and_accepts_the_devices() -> None:
    """`moec schema --device --out specs/device-schema.json` after a change of the classes."""
    assert (SPECS / "device-schema.json").read_text() == json_text(device_schema()) + "\n"
    jsonschema = pytest.importorskip("jsonschema", reason="the jsonschema package is not installed")
    validator = jsonschema.Draft202012Validator(device_schema())
    for file in FILES:
        assert not list(validator.iter_errors(yaml.safe_load(file.read_text()))), file
    broken = yaml.safe_load(FILES[0].read_text())
    broken["memory_budget"] = broken.pop("memory_budget_mb")
    assert list(validator.iter_errors(broken))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("number: 5000", "number: -5000", "7:11: memory_budget_mb.number: must be above 0, got -5000"),
        ("number: 5000", "number: 50000", "7:11: memory_budget_mb.number: must be at most memory_total_mb (12000"),
        ("number: 5000", "numbr: 5000", "memory_budget_mb.numbr: unknown key; did you mean 'number'?"),
        ("number: 5000", "number: .nan", "7:11: memory_budget_mb.number: expected a finite number"),
        ("number: 5000", "number: 5000\n  low: 4000", "6:1: memory_budget_mb.high: a spread has both ends"),
        ("number: 5000", "number: 5000\n  low: 1\n  high: 2", "must lie in its spread, 1.0 to 2.0"),
        ("backend: xnnpack", "backend: metal", "gpu_fp16_gflop_per_s: a device whose backend is metal needs this key"),
        ("backend: xnnpack", "backend: npu", "backend: unknown target 'npu'; known here: "),
        ("threads: 4", "threads: 9", "cores.threads: must be at most big + little (8), got 9"),
        ("isa: [neon, i8mm]", "isa: [neon, sse]", "isa[1]: expected one of "),
        ("isa: [neon, i8mm]", "isa: [4]", "isa[0]: expected"),
        ("backend: xnnpack", "backend: [xnnpack]", "backend: expected"),
        ("isa: [neon, i8mm]", "isa: []", "isa"),
        ("name: galaxy-s25", "name: Galaxy S25", "name"),
        ("dram_gb_per_s:", "dram_gbps:", "dram_gb_per_s: this key is required"),
    ],
)
def test_faults_have_places(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (SPECS / "devices" / "galaxy-s25.yaml").read_text()
    assert old in text
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(SpecError) as caught:
        load_device(str(file))
    assert all(line.startswith(f"{file}:") for line in str(caught.value).splitlines())
    assert message in str(caught.value)


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = (SPECS / "devices" / "galaxy-s25.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("number: 5000", "number: 0").replace("backend: xnnpack", "backend: x"))
    with pytest.raises(SpecError) as caught:
        load_device(str(file))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the file is empty"), ("- a", "a device is a mapping"), ("name: [", "mine.yaml:"), ("a: &x [*x]", "anchor")],
)
def test_no_device_at_all(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_device(str(file))


def test_unknown_devices() -> None:
    with pytest.raises(UserError, match="unknown device 'galxy-s25'; did you mean 'galaxy-s25'"):
        load_device("galxy-s25")
    with pytest.raises(UserError, match=r"known here: .*wearable"):
        load_device("zzz")
    with pytest.raises(SpecError, match=r"nowhere\.yaml: no such device"):
        load_device("nowhere.yaml")


def test_a_device_has_what_the_target_needs() -> None:
    check_runs(load_device("iphone-17"), "metal")
    with pytest.raises(UserError, match="galaxy-s25 cannot run target metal: its file gives no gpu_fp16_gflop_per_s"):
        check_runs(load_device("galaxy-s25"), "metal")


def test_a_spec_names_a_device(tmp_path: Path) -> None:
    assert parse_spec(TINY + "device: wearable\n").device == "wearable"
    with pytest.raises(SpecError, match=r"device: unknown device 'warable'; did you mean 'wearable'\?"):
        parse_spec(TINY + "device: warable\n")
    file = tmp_path / "a.yaml"
    file.write_text(TINY + "device: ./mine.yaml\n")
    assert load_spec(file).device == str(tmp_path / "mine.yaml")


def test_figures_of_rounds() -> None:
    assert figure([3e9, 1e9, 2e9], "s", unit=1e9) == {"number": 3.0, "low": 1.0, "high": 3.0, "source": "s"}
    assert figure([3.0, 1.23456789], "s", least=True)["number"] == 1.235
    assert known(12.0, "s") == {"number": 12.0, "source": "s"}


def test_list_and_show(moec: Moec) -> None:
    status, out, err = moec("device", "list")
    assert (status, err) == (0, "")
    assert all(name in out for name in device_files())
    status, out, _ = moec("device", "list", "--json")
    assert {d["name"] for d in json.loads(out)} == set(device_files())
    status, out, _ = moec("device", "show", "galaxy-s25")
    assert status == 0
    assert "arXiv 2605.27358" in out
    status, out, _ = moec("device", "show", "galaxy-s25", "--json")
    assert Device.model_validate(json.loads(out)) == load_device("galaxy-s25")
    status, out, err = moec("device", "show", "nothing")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_schema_command(moec: Moec) -> None:
    assert json.loads(moec("schema", "--device")[1])["title"] == "moec device"


@pytest.mark.parametrize(
    "command", [["plan"], ["search"], ["fit"], *(["device", c] for c in ("list", "show", "measure"))]
)
def test_help(moec: Moec, command: list[str]) -> None:
    status, out, err = moec(*command, "--help")
    assert (status, err) == (0, "")
    assert "Example: moec" in out


@pytest.mark.slow
def test_measure_this_machine(moec: Moec, tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    status, out, _ = moec("device", "measure", "--out", file, "--rounds", 2, "--name", "here")
    assert status == 0
    assert "dram_gb_per_s" in out
    device = load_device(str(file))
    assert device.kernels is not None
    low, high = device.dram_gb_per_s.spread
    assert low <= device.dram_gb_per_s.number <= high
    # any machine that runs this: between a wearable and a large server
    assert 1 < device.dram_gb_per_s.number < 5000
    assert 1 < device.int8_gop_per_s.number < 20_000
    both = (device.storage_gb_per_s, device.storage_sequential_gb_per_s)
    assert (both[0] is None) == (both[1] is None)  # none where files are in memory alone
    for rate in both:
        assert rate is None or 0 < rate.number < 1000
