"""`bench_assistant.py mask`: what the masks of JSON Schema take, over a large vocabulary.

A tokenizer of that vocabulary is trained once on the text of the Python packages that are installed. A model that says
tokens at random, and the ends of strings and lists a little more, answers to five schemas; the time is that of the
thread, the mask's as booleans with it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moec.assistant.structured import Format, Formats
from moec.cli.output import table

KEPT = Path(__file__).parents[1] / "build" / "bench"  # tokenizers, once trained
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "name": {"const": "weather"},
            "arguments": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 20},
    {
        "type": "object",
        "properties": {
            "date": {"type": "string", "format": "date"},
            "lines": {
                "type": "array",
                "maxItems": 8,
                "items": {
                    "type": "object",
                    "properties": {"text": {"type": "string", "maxLength": 40}, "amount": {"type": "number"}},
                    "required": ["text", "amount"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["date", "lines"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "string"},
                    "children": {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/tree"}},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
]


def trained_tokenizer(vocabulary: int) -> str:
    """The text of a byte-level BPE of so many tokens, of the Python sources and documents that are installed."""
    place = KEPT / f"tokenizer-{vocabulary}.json"
    if not place.exists():
        folders = {Path(os.__file__).parent, Path(tokenizers.__file__).parents[1]}
        files = sorted(
            f for folder in folders for kind in ("*.py", "*.md", "*.txt", "*.rst") for f in folder.rglob(kind)
        )
        random.Random(1).shuffle(files)
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(_texts(files, min(120_000_000, 1000 * vocabulary)), trainer)
        place.parent.mkdir(parents=True, exist_ok=True)
        made.save(str(place))
    return place.read_text("utf-8")


def _texts(files: Sequence[Path], most: int) -> Iterator[str]:
    left = most
    for file in files:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        left -= len(text)
        yield text
        if left < 0:
            return


def measure(vocabulary: int, *, rounds: int) -> dict[str, Any]:
    """Microseconds of processor time for the tokens of answers to SCHEMAS, in which a model says what it likes."""
    text = trained_tokenizer(vocabulary)
    words = tokenizers.Tokenizer.from_str(text)
    size = words.get_vocab_size()
    end = words.token_to_id("<|end|>")
    formats = Formats(text, size, frozenset([end]), "bench")
    closing = [*(words.token_to_id(one) for one in ('"', "]", "}", '"}', '"]', '",') if words.token_to_id(one)), end]
    numbers = np.random.default_rng(1)
    taken: dict[str, list[float]] = {"mask": [], "take": []}
    begun, answers = [], 0
    for turn in range(rounds):
        for given in SCHEMAS:
            began = time.thread_time()
            matcher = formats.matcher(Format.of(json_schema=given))  # type: ignore[arg-type]
            if turn:  # the first one of all makes the tokenizer
                begun.append(time.thread_time() - began)
            said: list[int] = []
            while not matcher.complete and len(said) < 400:
                began = time.thread_time()
                allowed = matcher.allowed()
                taken["mask"].append((time.thread_time() - began) * 1e6)
                logits = numbers.normal(size=size)
                logits[closing] += 3
                logits[~allowed] = -np.inf
                token = int(logits.argmax())
                if token == end:
                    break
                began = time.thread_time()
                matcher.take(token)
                taken["take"].append((time.thread_time() - began) * 1e6)
                said.append(token)
            if matcher.accepting:
                json.loads(words.decode(said, skip_special_tokens=False))
                answers += 1
    found: dict[str, Any] = {"vocabulary": size, "tokens": len(taken["mask"]), "answers": answers}
    found |= {"of": rounds * len(SCHEMAS), "begin_ms": statistics.median(begun or [0.0]) * 1e3}
    for name, each in taken.items():
        found[name] = {"median": float(np.median(each)), "p99": float(np.quantile(each, 0.99)), "most": max(each)}
    return found


def tell(found: dict[str, Any]) -> None:
    rows = [[n, *(f"{found[n][m]:.1f}" for m in ("median", "p99", "most"))] for n in ("mask", "take")]
    table(
        f"{found['tokens']} tokens of {found['vocabulary']}, microseconds",
        ["", "median", "99%", "most"],
        rows,
        right=(1, 2, 3),
    )
    print(f"{found['answers']} of {found['of']} answers ended, all of them JSON")
    print(f"a schema is made ready in {found['begin_ms']:.1f} ms")
