"""The table of config fields in Python and in the C header are one table."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import pytest

from moec.compiler.ops.attributes import ACTIVATIONS, SCORES, Experts, Routing
from moec.runtime import kernel_api, moe_config, native
from moec.runtime.moe_config import Kind, MoeConfig, WeightFormat
from tests.runtime.kernel_cases import LEVELS

KERNEL = Path(kernel_api.__file__).resolve().parent / "kernels"


def _enumerators(prefix: str) -> dict[str, int]:
    text = (KERNEL / "moe_config.h").read_text()
    return {name: int(value) for name, value in re.findall(rf"{prefix}(\w+) = (\d+),", text)}


@pytest.mark.parametrize(
    ("prefix", "fields"), [("MOEC_CONFIG_", moe_config.Config), ("MOEC_PARAMS_", moe_config.Params)]
)
def test_fields_are_numbered_as_in_the_header(prefix: str, fields: type[IntEnum]) -> None:
    assert _enumerators(prefix) == {f.name: f.value for f in fields}


def test_lengths_and_versions_agree() -> None:
    constants = _enumerators("MOEC_MOE_")
    assert constants["CONFIG_LENGTH"] == len(moe_config.Config)
    assert constants["PARAMS_LENGTH"] == len(moe_config.Params)
    assert constants["VERSION_NUMBER"] == moe_config.VERSION
    version = re.search(r"#define MOEC_ABI_VERSION (\d+)", (KERNEL / "moec_kernel.h").read_text())
    assert version is not None
    assert int(version[1]) == kernel_api.ABI_VERSION
    threads = re.search(r"kMostThreads = (\d+);", (KERNEL / "core/parallel.cpp").read_text())
    assert threads is not None
    assert int(threads[1]) == native.MAX_THREADS


def test_every_attribute_value_has_a_code() -> None:
    assert set(moe_config.SCORE) == set(SCORES)
    assert set(moe_config.ACTIVATION) == set(ACTIVATIONS)
    for how in (
        Routing(bias_on=b, group_score=g, fill=f, normalize=n, apply=a)
        for b in moe_config.BIAS_ON
        for g in moe_config.GROUP_SCORE
        for f in moe_config.FILL
        for n in moe_config.NORMALIZE
        for a in moe_config.APPLY
    ):
        config, params = MoeConfig(4, 32, 32, 2, how, Experts(), WeightFormat(), WeightFormat()).encode()
        assert len(config) == len(moe_config.Config)
        assert len(params) == moe_config.Params.THRESHOLD  # as lists were before there was a threshold
    near = Routing(score="sparsemixer", threshold=0.02)
    _, params = MoeConfig(4, 32, 32, 2, near, Experts(), WeightFormat(), WeightFormat()).encode()
    assert len(params) == len(moe_config.Params)
    assert params[moe_config.Params.THRESHOLD] == 0.02


def test_kinds_are_numbered_as_in_the_header() -> None:
    text = (KERNEL / "moec_kernel.h").read_text()
    found = re.search(r"enum \{ (MOEC_F32 = 0.*?) \};", text)
    assert found is not None
    assert {name: int(value) for name, value in re.findall(r"MOEC_(\w+) = (\d+)", found[1])} == {
        kind.name: kind.value for kind in Kind
    }


def test_levels_are_those_of_the_header() -> None:
    text = (KERNEL / "core/levels.h").read_text()
    for name, kind in (("kIq4NlLevels", Kind.IQ4_NL), ("kFp4Levels", Kind.FP4), ("kNl3Levels", Kind.NL3)):
        found = re.search(rf"int8_t {name}\[{len(LEVELS[kind])}\] = \{{([^}}]*)\}};", text)
        assert found is not None
        assert tuple(map(int, found[1].split(","))) == LEVELS[kind]
        stated = " ".join(str(level) for level in LEVELS[kind])
        assert stated in (KERNEL / "moec_kernel.h").read_text()


def test_formats_survive_encoding() -> None:
    quantized = [k for k in Kind if k != Kind.F32]
    formats = [WeightFormat(kind, 128, *[on] * 4) for kind in quantized for on in (False, True)]
    for fmt in (WeightFormat(), WeightFormat(Kind.INT4, 32), *formats):
        assert WeightFormat.decode(fmt.encode()) == fmt


@pytest.mark.parametrize(
    "value", [-1, 3, 4, 5, 32 << 8 | 6, 32 << 8 | 15, 0x80, 1, 33 << 8 | 1, 32 << 8, 32 << 8 | 0x81]
)
def test_what_is_not_a_format_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"format|group"):
        WeightFormat.decode(value)
