"""Every fault of a spec has a place and a remedy, all come at once, and no text makes the loader fall over."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from moec.compiler.errors import SpecError
from moec.compiler.spec import load_spec, parse_spec
from moec.sources.exported_program_source import ExportedProgramModel
from moec.sources.python_source import PythonModel
from moec.sources.transformers_source import TransformersModel

TINY = (Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml").read_text().split("training:")[0]
LINE = re.compile(r"f\.yaml:\d+:\d+: .+")


def faults(text: str) -> list[str]:
    """The faults of `text` without the file name; the form of every line is checked."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, file="f.yaml")
    lines = str(caught.value).split("\n")
    assert all(LINE.fullmatch(line) for line in lines), lines
    return [line.removeprefix("f.yaml:") for line in lines]


def changed(old: str, new: str) -> str:
    assert TINY.count(old) == 1, old
    return TINY.replace(old, new)


# name of the case: (text of mobilemoe-tiny.yaml, its replacement, part of a fault that must be reported)
ONE_FAULT = {
    "unknown key": ("router: fp32", "routr: fp32", "quantization.routr: unknown key; did you mean 'router'?"),
    "unknown section": ("quantization:", "quantisation:", "quantisation: unknown key; did you mean 'quantization'?"),
    "top_k": ("top_k: 4", "top_k: 17", "model.moe.top_k: must be at most model.moe.experts (16), got 17"),
    "kv heads": ("kv_heads: 2", "kv_heads: 3", "model.kv_heads: heads (4) must be a multiple of kv_heads, got 3"),
    "odd head": ("head_dim: 32", "head_dim: 33", "model.head_dim: must be even"),
    "group": ("d_model: 128", "d_model: 144", "model.d_model: the embedding is grouped along this width"),
    "shared group": (
        "shared_width: 256",
        "shared_width: 250",
        "model.moe.shared_width: down of the shared expert is grouped",
    ),
    "zero": ("layers: 4", "layers: 0", "model.layers: must be at least 1, got 0"),
    "negative": ("scale: 2.5", "scale: -2.5", "model.moe.scale: must be above 0, got -2.5"),
    "infinite": ("scale: 2.5", "scale: .inf", "model.moe.scale: expected a finite number"),
    "nan": ("theta: 500000.0", "theta: .nan", "model.rope.theta: "),
    "huge": ("layers: 4", "layers: 99999999999999999999999", "model.layers: must be at most 1024"),
    "digits": ("layers: 4", "layers: " + "9" * 5000, "model.layers: a number of more than 30 digits"),
    "octal": ("layers: 4", "layers: 012", "model.layers: 012 is octal to some YAML readers; write 12"),
    "sexagesimal": ("layers: 4", "layers: 1:30", "model.layers: 1:30 is a base-60 number"),
    "underscores": ("vocab_size: 4096", "vocab_size: 4_096", "model.vocab_size: 4_096 is a number to some"),
    "binary": ("layers: 4", "layers: 0b100", "model.layers: 0b100 is a number to some"),
    "yes": ("qk_norm: true", "qk_norm: yes", "model.qk_norm: yes is a boolean to some YAML readers only; write true"),
    "off": ("qk_norm: true", "qk_norm: Off", "model.qk_norm: Off is a boolean to some YAML readers only; write false"),
    "text boolean": ("qk_norm: true", "qk_norm: 'true'", "model.qk_norm: expected true or false, got 'true'"),
    "number as boolean": ("qk_norm: true", "qk_norm: 1", "model.qk_norm: expected true or false, got 1"),
    "boolean as number": ("layers: 4", "layers: true", "model.layers: expected an integer, got true"),
    "float as integer": ("layers: 4", "layers: 4.0", "model.layers: expected an integer, got 4.0"),
    "text as integer": ("layers: 4", "layers: '4'", "model.layers: expected an integer, got '4'"),
    "null": ("layers: 4", "layers:", "model.layers: expected an integer, got null"),
    "duplicate": ("layers: 4", "layers: 4\n  layers: 5", "model.layers: duplicate key; it is first given in line 6"),
    "tag": ("layers: 4", "layers: !!int 4", "model.layers: tags have no meaning in a spec"),
    "python tag": ("layers: 4", "layers: !!python/object/apply:os.system [id]", "model.layers: "),
    "router": ("router: fp32", "router: int8", "quantization.router: the router is always fp32"),
    "activations": ("activations: int8", "activations: int6", "quantization.activations.bits: expected 8 or 32, got"),
    "block": (
        "activations: int8",
        "activations: {bits: 8, group: 64}",
        "quantization.activations.group: expected 32, 'token' or 'auto', got 64",
    ),
    "block of fp32": (
        "activations: int8",
        "activations: {bits: 32, group: 32}",
        "quantization.activations.group: fp32 activations have no scales: leave group out",
    ),
    "scheme": (
        "weights: int4",
        "weights: int5",
        "quantization.weights: expected 'nl3', 'int4', 'iq4_nl', 'fp4', 'int8' or 'fp32', got 'int5'",
    ),
    "target": ("[xnnpack]", "[xnpack]", "targets.xnpack: unknown target; did you mean 'xnnpack'?"),
    "no target": ("[xnnpack]", "[]", "targets: name a target; known here:"),
    "target twice": ("[xnnpack]", "[xnnpack, xnnpack]", "targets[1]: target 'xnnpack' is listed twice"),
    "target option": ("[xnnpack]", "{xnnpack: {thread: 4}}", "targets.xnnpack.thread: unknown key; did you mean 'thr"),
    "listed option": ("[xnnpack]", "[{xnnpack: {threads: 0}}]", "targets.xnnpack.threads: must be at least 1, got 0"),
    "token": ("eos_ids: [1]", "eos_ids: [1, 4096]", "model.eos_ids[1]: token 4096 is outside the vocabulary of 4096"),
    "name": ("name: mobilemoe-tiny", "name: a/b", "name: use letters, digits"),
    "no form": ("architecture: mobilemoe", "architecture: mobilenet", "model.architecture: expected 'mobilemoe' or"),
    "dense": ("architecture: mobilemoe", "architecture: mobilellm", "model.ffn_width: architecture mobilellm needs"),
    "recursion": ("\nmodel:", "\nmodel: &m\n  <<: *m", "an anchor that contains itself"),
    "merge": ("\nmodel:", "\nmodel:\n  <<: 5", "model: << takes a mapping or a list of mappings"),
    "syntax": ("layers: 4", "layers: [4", "expected ',' or ']'"),
    "tab": ("  layers: 4", "\tlayers: 4", "found character '\\t' that cannot start any token"),
    "control": ("layers: 4", "layers: \x01", "a character that YAML does not allow"),
    "escape": ("layers: 4", 'layers: "\\UFFFFFFFF"', "1:1: "),
    "two documents": ("quantization:", "---\nquantization:", "but found another document"),
}


@pytest.mark.parametrize("case", ONE_FAULT)
def test_one_fault(case: str) -> None:
    old, new, message = ONE_FAULT[case]
    assert any(message in line for line in faults(changed(old, new))), faults(changed(old, new))


def test_places_point_at_the_fault() -> None:
    def place(old: str, new: str, path: str) -> str:
        line = next(line for line in faults(changed(old, new)) if f" {path}: " in line)
        return line.split(" ")[0]

    def column(text: str, number: int) -> int:
        return TINY.splitlines()[number - 1].index(text) + 1

    lines = {text: i for i, line in enumerate(TINY.splitlines(), 1) for text in [line.strip()]}
    top_k, router = lines["top_k: 4"], lines["router: fp32"]
    assert place("top_k: 4", "top_k: 40", "model.moe.top_k") == f"{top_k}:{column('4', top_k)}:"  # the value
    assert place("router: fp32", "routr: fp32", "quantization.routr") == f"{router}:3:"  # the key
    assert place("  layers: 4\n", "", "model.layers") == f"{lines['model:']}:1:"  # the section that lacks it
    assert place("[xnnpack]", "[xnnpack, mtal]", "targets.mtal") == f"{lines['targets: [xnnpack]']}:20:"


def test_all_faults_at_once_in_the_order_of_the_file() -> None:
    text = TINY.replace("layers: 4", "layers: 0").replace("experts: 16", "expert: 16").replace("top_k: 4", "top_k: a")
    text = (
        text.replace("weights: int4", "weights: int3")
        .replace("[xnnpack]", "[cuda]")
        .replace("qk_norm: true", "qk_norm: on")
    )
    found = faults(text)
    paths = [re.sub(r"^\d+:\d+: ", "", line).split(": ")[0] for line in found]
    assert set(paths) == {
        "model.layers",
        "model.qk_norm",
        "model.moe.experts",
        "model.moe.expert",
        "model.moe.top_k",
        "quantization.weights",
        "targets.cuda",
    }
    numbers = [tuple(map(int, line.split(":")[:2])) for line in found]
    assert numbers == sorted(numbers)


def test_numbers_that_are_not_ambiguous() -> None:
    spec = parse_spec(changed("norm_eps: 1.0e-5", "norm_eps: 1e-5").replace("layers: 4", "layers: 0x4"))
    assert spec.model.norm_eps == 1e-5  # type: ignore[union-attr]
    assert spec.model.layers == 4  # type: ignore[union-attr]
    assert parse_spec(changed("scale: 2.5", "scale: 2")).model.moe.scale == 2.0  # type: ignore[union-attr]


def test_anchors_and_merge_keys() -> None:
    text = changed("quantization:", "quantization:\n  <<: {weights: int8, activations: fp32}")
    quantization = parse_spec(text).quantization
    assert quantization is not None
    assert quantization.weights == "int4"  # its own key wins over the merged one
    text = TINY.replace("head_dim: 32", "head_dim: &d 32").replace("experts: 16", "experts: *d")
    assert parse_spec(text).model.moe.experts == 32  # type: ignore[union-attr]


def test_alias_bomb_ends_soon() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    started = time.perf_counter()
    assert "aliases" in faults(bomb)[0]
    assert time.perf_counter() - started < 5  # expanded, it would hold 9^12 values


@pytest.mark.parametrize(
    "text", ["[" * 5000, "{a: " * 3000, "- " * 5000, "a:\n" + "".join(" " * i + "a:\n" for i in range(1, 300))]
)
def test_deep_nesting(text: str) -> None:
    assert "nested more than" in faults(text)[0]


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), ("# only this", "empty"), ("- a", "mapping"), ("5", "mapping")]
)
def test_not_a_spec(text: str, message: str) -> None:
    assert message in faults(text)[0]


def test_files(tmp_path: Path) -> None:
    cases = {"missing.yaml": "no such spec", ".": "is a folder"}
    (tmp_path / "bytes.yaml").write_bytes(b"name: a\nmodel: \xff\xfe")
    cases["bytes.yaml"] = "not UTF-8"
    (tmp_path / "large.yaml").write_text("#" * 300_000)
    cases["large.yaml"] = "larger than 256 KiB"
    for name, message in cases.items():
        with pytest.raises(SpecError, match=message) as caught:
            load_spec(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec("a\0b")


def test_relative_paths_belong_to_the_spec(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("checkpoint: weights/here\n" + TINY)
    assert load_spec(file).checkpoint == tmp_path / "weights" / "here"
    file.write_text("checkpoint: /there\n" + TINY)
    assert load_spec(file).checkpoint == Path("/there")


def test_other_forms_of_a_model(tmp_path: Path) -> None:
    def model(section: str) -> object:
        (tmp_path / "a.yaml").write_text(f"name: a\nmodel: {section}\nquantization: none\ntargets: xnnpack\n")
        return load_spec(tmp_path / "a.yaml").model

    assert model("{transformers: olmoe}") == TransformersModel(transformers=tmp_path / "olmoe")
    assert model("{exported_program: m.pt2}") == ExportedProgramModel(exported_program=tmp_path / "m.pt2")
    assert model("{python: 'pack.mod:build'}") == PythonModel(python="pack.mod:build")
    for section, message in [
        ("{python: 'no colon'}", "model.python: expected 'module:function'"),
        ("{transformers: a, layers: 3}", "model.layers: unknown key"),
        ("{transformers: 5}", "model.transformers: "),
        ("5", "model: expected a mapping, got 5"),
    ]:
        assert any(message in line for line in faults(f"name: a\nmodel: {section}\nquantization: none\n"))


@pytest.mark.parametrize("value", ["", "null", "fp32", "[int4]", "5"])
def test_quantization_is_none_or_a_mapping(value: str) -> None:
    head = TINY[: TINY.index("quantization:")]
    assert any("quantization: " in line for line in faults(f"{head}quantization: {value}\n"))
    assert parse_spec(f"{head}quantization: none\n").quantization is None
