"""Structured output: JSON Schema, regular expressions and grammars, by the library llguidance (extra `structured`).

A `Matcher` gives the tokens that may come next: the text so far is always a prefix of one that the format allows, and
the model may end it only where it is complete. JSON is written on one line, with one space after `:` and `,`: a small
model that may choose its white space can go on writing white space without end.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moec.compiler.errors import RunError
from moec.compiler.extras import require

MAX_CHARACTERS = 1 << 20  # of a schema, an expression or a grammar
#: How JSON is spaced: options of llguidance.
JSON_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Format:
    """The format of an answer. text: a JSON Schema, a regular expression, or a grammar in Lark or GBNF."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    place: str | None = None  # where it comes from, for messages; by default its kind

    @staticmethod
    def of(
        *,
        json_schema: Mapping[str, Any] | bool | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Format | None:
        """The one that is given, or None; RunError for more than one, and for a schema that is not JSON."""
        given = [name for name, v in (("schema", json_schema), ("regex", regex), ("grammar", grammar)) if v is not None]
        if len(given) > 1:
            raise RunError(f"{' and '.join(given)} at once", remedy="give one of them")
        if json_schema is not None:
            try:
                schema = json.loads(json_schema) if isinstance(json_schema, str) else json_schema
                if not isinstance(schema, (Mapping, bool)):
                    raise RunError(
                        "a JSON Schema is an object", place="json_schema", remedy='such as {"type": "object"}'
                    )
                if schema is False:
                    raise RunError("nothing satisfies it", place="json_schema", remedy="give another JSON Schema")
                return Format("json_schema", json.dumps({} if schema is True else schema))
            except (TypeError, ValueError, RecursionError) as error:
                what = f"not JSON: {str(error).splitlines()[0]}"
                raise RunError(what, place="json_schema", remedy="give a JSON Schema") from None
        if regex is not None:
            return Format("regex", regex)
        return None if grammar is None else Format("grammar", grammar)


class Formats:
    """Makes matchers for one tokenizer. tokenizer: the text of a tokenizer.json that a `TextTokenizer` has loaded.

    vocab_size: length of a row of logits; eos_ids: tokens that end a text. place: the artifact, for messages.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_ids: frozenset[int], place: str) -> None:
        self._text, self._vocab_size, self._eos_ids, self._place = tokenizer, vocab_size, eos_ids, place
        self._made: Any = None
        self._lock = threading.Lock()

    def matcher(self, given: Format) -> Matcher:
        """RunError if the format is invalid, cannot be satisfied, or has parts that cannot be enforced."""
        require("llguidance", "structured", "structured output")
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import any_to_lark

        if len(given.text) > MAX_CHARACTERS:
            remedy = f"give at most {MAX_CHARACTERS}"
            raise RunError(f"a format of {len(given.text)} characters", place=given.place or given.kind, remedy=remedy)
        try:
            if given.kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(given.text, overrides=JSON_SPACING)
            elif given.kind == "regex":
                grammar = LLMatcher.grammar_from_regex(given.text)
            else:
                grammar = LLMatcher.grammar_from_lark(any_to_lark(given.text))
        except Exception as error:  # ValueError, and for grammars whatever the library's parser raises
            raise RunError(_line(str(error)), place=given.place or given.kind, remedy="correct it") from None
        found = LLMatcher(self._tokenizer(), grammar, log_level=0)
        if found.is_error():
            raise RunError(_line(found.get_error()), place=given.place or given.kind, remedy="correct it")
        if warnings := found.get_grammar_warnings():
            remedy = "leave out what cannot be enforced"
            raise RunError(_line(warnings[0]), place=given.place or given.kind, remedy=remedy)
        return Matcher(found, self._vocab_size, given.place or given.kind)

    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._made is None:
                eos = sorted(self._eos_ids)
                try:
                    self._made = LLTokenizer(self._text, n_vocab=self._vocab_size, eos_token=eos or None)
                except Exception as error:
                    what = f"the tokenizer cannot be used for structured output: {_line(str(error))}"
                    raise RunError(what, place=self._place) from None
            return self._made


class Matcher:
    """A `Constraint` (`assistant/generate.py`) of one answer."""

    def __init__(self, matcher: Any, vocab_size: int, place: str) -> None:
        self._matcher, self._vocab_size, self._place = matcher, vocab_size, place
        self._mask = np.zeros((vocab_size + 31) // 32, np.int32)

    @property
    def accepting(self) -> bool:
        return not self._matcher.is_error() and bool(self._matcher.is_accepting())

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and self.accepting

    def allowed(self) -> np.ndarray:
        """bool [V]. RunError where the library gives up, as it does on formats that grow without bound."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RunError(_line(self._matcher.get_error()), place=self._place, remedy="ask for a simpler format")


def _line(text: str) -> str:
    words = " ".join(text.split()) or "refused"
    return "".join(c if c.isprintable() else "?" for c in words)[:300]
