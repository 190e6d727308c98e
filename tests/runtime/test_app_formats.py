"""Structured output of the C interface: masks of llguidance by moec_llguidance.h, and masks of a program's own."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.runtime.native import find_compiler, runtime_library
from tests.runtime import app
from tests.tiny import TinyModels, tiny_text

ROOT = Path(__file__).parents[2]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ulm", "Åbo", 'q"'], "type": "string"}, "n": {"type": "integer", "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
PROMPT = "A city as JSON: "


@pytest.fixture(scope="module")
def folder(tiny: TinyModels) -> Path:
    return tiny(tiny_text()) / "artifact"


class Glue:
    """moec_llguidance.h, compiled as an application does, with llguidance's C library, which its wheel has."""

    def __init__(self, folder: Path) -> None:
        spec = importlib.util.find_spec("llguidance")
        assert spec is not None
        assert spec.origin is not None
        ctypes.CDLL(str(next(Path(spec.origin).parent.glob("_lib*.so"))), mode=ctypes.RTLD_GLOBAL)
        here, library = Path(__file__).parent / "native" / "llguidance", runtime_library()
        compiler = find_compiler().replace("g++", "gcc").replace("c++", "cc")
        build = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{here}"]
        build += [
            f"-I{ROOT / 'runtime' / 'include'}",
            str(here / "glue.c"),
            str(library),
            "-o",
            str(folder / "glue.so"),
        ]
        subprocess.run([*build, f"-Wl,-rpath,{library.parent}"], check=True, capture_output=True)
        self._made = ctypes.CDLL(str(folder / "glue.so"))
        for name in ("tokenizer", "matcher"):
            getattr(self._made, f"glue_{name}").restype = ctypes.c_void_p
        self._made.glue_constraint.restype = app.Constraint

    def tokenizer(self, artifact: int, text: str) -> int:
        return self._of("tokenizer", app.I64(artifact), text.encode())

    def matcher(self, tokenizer: int, kind: str, text: str) -> int:
        return self._of("matcher", ctypes.c_void_p(tokenizer), kind.encode(), text.encode())

    def constraint(self, matcher: int) -> app.Constraint:
        return self._made.glue_constraint(ctypes.c_void_p(matcher))  # type: ignore[no-any-return]

    def free(self, matcher: int | None, tokenizer: int | None = None) -> None:
        self._made.glue_free(ctypes.c_void_p(matcher), ctypes.c_void_p(tokenizer))

    def _of(self, name: str, *arguments: Any) -> int:
        error = ctypes.create_string_buffer(400)
        found = getattr(self._made, f"glue_{name}")(*arguments, error, ctypes.c_size_t(400))
        if not found:
            raise ValueError(error.value.decode())
        return int(found)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Glue:
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    return Glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def tokenizer(glue: Glue, opened: int, folder: Path) -> Iterator[int]:
    made = glue.tokenizer(opened, (folder / "tokenizer.json").read_text("utf-8"))
    yield made
    glue.free(None, made)


def answer(session: int, opened: int, constraint: app.Constraint | None, **values: Any) -> tuple[str, str]:
    """Text, and why it ended."""
    given = app.options(opened, **values)
    given.constraint = ctypes.addressof(constraint) if constraint is not None else None
    generation = app.begin(session, app.tokenize(opened, PROMPT), given)
    text = "".join(app.pieces(generation))
    stopped = app.STOPPED[app.stats(generation).stopped]
    app.call("close", generation)
    return text, stopped


@pytest.mark.parametrize(
    ("kind", "text", "option"),
    [
        ("json_schema", json.dumps(SCHEMA), {"json_schema": SCHEMA}),
        ("json_schema", " { } ", {"json_schema": {}}),
        ("regex", "[a-c]{3,9}x|日本", {"regex": "[a-c]{3,9}x|日本"}),
        ("lark", 'start: "yes" | "no" " "+ "!"', {"grammar": 'start: "yes" | "no" " "+ "!"'}),
    ],
    ids=["schema", "any JSON", "regex", "grammar"],
)
def test_answers_follow_their_format(
    folder: Path, opened: int, session: int, glue: Glue, tokenizer: int, kind: str, text: str, option: dict[str, Any]
) -> None:
    for values in ({}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.0, "top_p": 0.9, "seed": 2}):
        matcher = glue.matcher(tokenizer, kind, text)
        found, stopped = answer(session, opened, glue.constraint(matcher), max_new_tokens=60, **values)
        glue.free(matcher)
        with moec.load(folder) as python:
            wanted = python.generate(PROMPT, max_new_tokens=60, **option, **values)
            for _ in wanted.steps():
                pass
        assert (found, stopped) == (wanted.text, wanted.stats.stopped)
        if option.get("json_schema") == SCHEMA:
            assert stopped in ("complete", "stop token")
            assert json.loads(found)["name"] in ("Ulm", "Åbo", 'q"')


def test_formats_that_are_refused(glue: Glue, tokenizer: int, opened: int) -> None:
    for kind, text, words in (
        ("json_schema", '{"type": "objec"}', "objec"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", "{", "EOF"),
        ("regex", "(", "regex"),
        ("nothing", "x", "nothing"),
    ):
        with pytest.raises(ValueError, match=words):
            glue.matcher(tokenizer, kind, text)
    with pytest.raises(ValueError, match="no open artifact"):
        glue.tokenizer(987654, "{}")
    with pytest.raises(ValueError, match=r"\w"):
        glue.tokenizer(opened, "{}")


def constraint(
    allowed: Callable[[Any], int], take: Callable[[int], int] = lambda _: 0, error: bytes | None = b"why\nnot"
) -> tuple[app.Constraint, Any]:
    """A mask of Python's; what must be kept alive beside it."""
    reason = None if error is None else ctypes.create_string_buffer(error)
    kept = (
        app.ALLOWED(lambda _, mask, words: allowed((ctypes.c_uint32 * words).from_address(mask))),
        app.TAKE(lambda _, token: take(token)),
        app.REASON(lambda _: None if reason is None else ctypes.addressof(reason)),
    )
    return app.Constraint(ctypes.sizeof(app.Constraint), 0, None, *kept), (kept, reason)


def test_a_mask_of_the_program_itself(opened: int, session: int) -> None:
    """Any tokens, at random for each step; the others are never taken, with and without drafts."""
    for speculate in (0, 1):
        drawn, taken, masks = random.Random(3), [], []

        def allowed(mask: Any) -> int:
            assert not any(mask)
            masks.append({drawn.randrange(5, 4096) for _ in range(drawn.choice((1, 2, 500)))})  # noqa: B023
            for token in masks[-1]:  # noqa: B023
                mask[token // 32] |= 1 << token % 32
            return 0

        def take(token: int) -> int:
            taken.append(token)  # noqa: B023
            return len(taken) == 50  # noqa: B023

        made, _kept = constraint(allowed, take)
        _, stopped = answer(session, opened, made, temperature=1.0, seed=4, speculate=speculate)
        assert stopped == "complete"
        assert [token in mask for token, mask in zip(taken, masks, strict=True)] == [True] * 50


def test_a_mask_that_fails_is_told(opened: int, session: int) -> None:
    for made, words in (
        (constraint(lambda _: -1), "the constraint: why not"),
        (constraint(lambda _: -1, error=None), "the constraint: failed"),
        (constraint(lambda _: 0), "biases and constraint exclude all"),
        (constraint(lambda mask: mask.__setitem__(3, 1) or 0, lambda _: 5), "the constraint: why not"),
    ):
        with pytest.raises(app.AppError, match=words):
            answer(session, opened, made[0])
    bad, _kept = constraint(lambda _: 0)
    bad.size = 3
    with pytest.raises(app.AppError, match=r"constraint\.size is 3"):
        answer(session, opened, bad)
    with pytest.raises(app.AppError, match="allowed or take is NULL"):
        answer(session, opened, app.Constraint(ctypes.sizeof(app.Constraint)))
    assert answer(session, opened, None, max_new_tokens=3)[1] == "length"  # the session is as good as before
