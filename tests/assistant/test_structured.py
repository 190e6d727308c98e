"""Structured output over generated schemas: every answer parses and satisfies its schema, whatever the model likes."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from typing import Any

import numpy as np
import pytest

llguidance = pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
jsonschema = pytest.importorskip("jsonschema", reason="the independent party: pip install 'moec[dev]'")

from moec.assistant.structured import MAX_CHARACTERS, Format, Formats, Matcher  # noqa: E402
from moec.compiler.errors import MissingExtra, RunError  # noqa: E402
from tests.assistant.speaking import EOS, VOCABULARY, tokenizer  # noqa: E402
from tests.conftest import one_line  # noqa: E402

NAMES = ["city", "n", "tags", "é", "with space", 'q"', "x" * 30]


def schema(draw: random.Random) -> dict[str, Any]:
    """With what it refers to."""
    inner: dict[str, Any] = {}
    found = part(draw, inner, 3)
    return {"$defs": inner, **found} if inner else found


def part(draw: random.Random, inner: dict[str, Any], depth: int) -> dict[str, Any]:
    """A schema of the kinds that people write: nested objects, arrays, ranges, patterns, choices, references."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    kind = draw.choice([*kinds, *(["object", "object", "array", "anyOf", "ref"] if depth else [])])
    if kind == "object":
        names = draw.sample(NAMES, draw.randint(0, 4))
        found = {"type": "object", "properties": {name: part(draw, inner, depth - 1) for name in names}}
        found["required"] = [name for name in names if draw.random() < 0.6]
        return found | ({} if draw.random() < 0.2 else {"additionalProperties": False})
    if kind == "array":
        least = draw.randint(0, 2)
        found = {"type": "array", "items": part(draw, inner, depth - 1), "minItems": least}
        return found | ({"maxItems": least + draw.randint(0, 2)} if draw.random() < 0.8 else {})
    if kind == "anyOf":
        return {"anyOf": [part(draw, inner, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "ref":
        found = part(draw, inner, depth - 1)
        inner[f"d{len(inner)}"] = found
        return {"$ref": f"#/$defs/d{len(inner) - 1}"}
    if kind == "string":
        least = draw.randint(0, 5)
        return draw.choice(
            [{"type": "string"}, {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 9)}]
        )
    if kind == "integer":
        least = draw.randint(-1000, 1000)
        return draw.choice(
            [{"type": "integer"}, {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 500)}]
        )
    if kind == "number":
        return draw.choice([{"type": "number"}, {"type": "number", "minimum": 0, "exclusiveMaximum": 1}])
    if kind == "enum":
        return {"enum": draw.sample([1, 2.5, "a", "é", None, True, [], {"k": 1}, 'with "quotes"'], draw.randint(1, 4))}
    if kind == "const":
        return {"const": draw.choice(["x", 0, None, [1, "a"], {"a": {"b": 1}}])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": draw.choice(["^[A-Z]{2}[0-9]+$", "^(yes|no)$", "^a*b?$", "^\\d{3}-\\d{4}$"]),
        }
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "uuid", "time"])}
    return {"type": kind}


@pytest.fixture(scope="module")
def formats() -> Formats:
    return Formats(tokenizer().to_str(), VOCABULARY, frozenset([EOS]), "test")


def answer(matcher: Matcher, draw: random.Random, most: int = 3000) -> str:
    """What a model says that likes tokens at random, and the ends of strings and lists a little more."""
    words, numbers = tokenizer(), np.random.default_rng(draw.randint(0, 1 << 30))
    closing = [*words.encode('"]})', add_special_tokens=False).ids, EOS]
    taken: list[int] = []
    while not matcher.complete:
        assert len(taken) < most, words.decode(taken)[:200]
        logits = numbers.normal(size=VOCABULARY)
        logits[closing] += 3
        logits[~matcher.allowed()] = -np.inf
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        if token == EOS:
            break
        matcher.take(token)
        taken.append(token)
    assert matcher.accepting
    return str(words.decode(taken, skip_special_tokens=False))


def check_schemas(formats: Formats, count: int, seed: int) -> None:
    valid = 0
    for index in range(count):
        draw = random.Random(f"{seed} {index}")
        given = schema(draw)
        text = answer(formats.matcher(Format.of(json_schema=given)), draw)  # type: ignore[arg-type]
        value = json.loads(text)  # any JSON reader
        jsonschema.Draft202012Validator(given, format_checker=jsonschema.FormatChecker(["date", "uuid"])).validate(
            value
        )
        valid += 1
    assert valid == count


def test_answers_to_fifty_schemas_are_valid(formats: Formats) -> None:
    check_schemas(formats, 50, 1)


@pytest.mark.slow
def test_answers_to_a_thousand_schemas_are_valid(formats: Formats) -> None:
    check_schemas(formats, 1000, 2)


@pytest.mark.parametrize(
    "expression", ["[0-9]{3}-[0-9]{4}", "(yes|no)( sir)?", "[^a-z\\s]{1,20}", "日本(語|人)", "a{50}"]
)
def test_answers_match_an_expression(expression: str, formats: Formats) -> None:
    for seed in range(5):
        text = answer(formats.matcher(Format("regex", expression)), random.Random(seed))
        assert re.fullmatch(expression, text)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: item ("," item)*\nitem: /[a-c]/ | "(" start ")"',
        'root ::= item ("," item)*\nitem ::= [a-c] | "(" root ")"',
    ],
    ids=["lark", "gbnf"],
)
def test_answers_derive_from_a_grammar(grammar: str, formats: Formats) -> None:
    def derives(text: str) -> bool:
        """Rewritten to one letter, as long as anything can be."""
        while (shorter := re.sub(r"\([abc]\)|[abc],[abc]", "a", text)) != text:
            text = shorter
        return text in ("a", "b", "c")

    assert not derives("a,(b")
    for seed in range(5):
        text = answer(formats.matcher(Format("grammar", grammar)), random.Random(seed))
        assert derives(text), text


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"json_schema": False}, "json_schema: nothing satisfies it"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "json_schema: .*nsatisfiable"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "json_schema: .*nsatisfiable"),
        (
            {"json_schema": {"type": "object", "required": ["a"], "properties": {"a": False}}},
            "json_schema: .*nsatisfiable",
        ),
        ({"json_schema": {"type": "thing"}}, "json_schema: .*thing"),
        ({"json_schema": {"type": "string", "format": "unheard-of"}}, "json_schema: .*unheard-of"),
        ({"json_schema": {"uniqueItems": True, "type": "array"}}, "json_schema: .*uniqueItems"),
        ({"json_schema": {"$ref": "https://example.org/schema"}}, "json_schema: .*does not fetch"),
        ({"json_schema": "{"}, "json_schema: not JSON"),
        ({"json_schema": "[1]"}, "json_schema: a JSON Schema is an object"),
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex: .*look"),
        ({"grammar": "nonsense"}, "grammar: "),
        ({"grammar": "start: missing"}, "grammar: .*missing"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, "regex: a format of 1048577 characters"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar at once"),
    ],
)
def test_what_cannot_be_met_is_one_line(given: dict[str, Any], what: str, formats: Formats) -> None:
    with one_line(RunError, what):
        formats.matcher(Format.of(**given))  # type: ignore[arg-type]
    assert Format.of() is None


def test_an_expression_that_explodes_ends_as_an_error(formats: Formats) -> None:
    """The library has limits of its own: a fault, and neither a crash nor a process that grows."""
    started = time.monotonic()
    with contextlib.suppress(RunError):  # an answer would be fine, too
        answer(formats.matcher(Format("regex", "(a|b|ab)*(c?){200}((a?){300}){300}d")), random.Random(0), most=20_000)
    assert time.monotonic() - started < 120


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, formats: Formats) -> None:
    from moec.compiler import extras

    monkeypatch.setattr(extras, "installed", lambda _: False)
    with pytest.raises(MissingExtra, match=r"moec\[structured\]"):
        formats.matcher(Format("regex", "a"))


@pytest.mark.slow
def test_a_mask_of_a_large_vocabulary_takes_less_than_a_hundred_microseconds() -> None:
    """128,256 tokens: bytes, letters by twos and threes, and words of the shipped texts; CPU time of this thread, which
    the load of other processes does not add to. The first masks of a state are computed, later ones may be found."""
    from itertools import product

    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    from moec.compiler.texts import prompts

    letters = "etaoinshrdlcumwfgypbvkjxqz"
    words = sorted({word for text in prompts().values() for word in re.findall(r" ?\w+|[^\w\s]+", text)})
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    for length in (2, 3, 4):
        tokens += [space + "".join(p).encode() for p in product(letters, repeat=length) for space in (b"", b" ")]
    tokens = [*list(dict.fromkeys(tokens))[:128_255], b"<end>"]

    class Known:
        eos_token_id, bos_token_id, unk_token_id = 128_255, None, None
        special_token_ids = (128_255,)

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    made = Formats("", 128_256, frozenset([128_255]), "test")
    made._made = LLTokenizer(TokenizerWrapper(Known()))
    given = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    numbers, taken = np.random.default_rng(0), []
    for _ in range(5):
        matcher = made.matcher(Format.of(json_schema=given))  # type: ignore[arg-type]
        for _ in range(200):
            if matcher.complete:
                break
            began = time.thread_time_ns()
            allowed = matcher.allowed()
            taken.append((time.thread_time_ns() - began) / 1000)
            token = int(numbers.choice(np.flatnonzero(allowed)))
            if token == 128_255:
                break
            matcher.take(token)
    assert len(taken) > 200
    print(f"\nmask of 128,256 tokens: median {np.median(taken):.0f} us, 99% {np.quantile(taken, 0.99):.0f} us")
    assert np.median(taken) <= 100
