"""A byte-level BPE tokenizer for synthesized checkpoints, trained on text that every Python installation has."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_BYTES = 256  # a byte-level vocabulary holds at least every byte
_TRAINED = 8192  # tokens; more would not be learned from this much text
# Modules with long documentation; their docstrings and the language reference of `pydoc` make about 1 MB of English.
_MODULES = (
    "argparse", "ast", "asyncio.base_events", "asyncio.tasks", "bdb", "calendar", "cmd", "collections",
    "configparser", "contextlib", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest",
    "email.message", "enum", "fractions", "functools", "gettext", "heapq", "http.client", "inspect", "ipaddress",
    "json", "logging", "logging.handlers", "mailbox", "multiprocessing.pool", "optparse", "os", "pathlib", "pdb",
    "pickle", "pickletools", "platform", "pprint", "random", "re", "shutil", "smtplib", "socket", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "turtle",
    "typing", "unittest.case", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "weakref",
    "xml.dom.minidom", "zipfile",
)  # fmt: skip
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_END_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def train_tokenizer(vocab_size: int, *, bos_id: int | None, eos_ids: Sequence[int]) -> str | None:
    """The text of a `tokenizer.json` whose ids are below `vocab_size`, with special tokens at the ids given.

    None if the vocabulary has no room for every byte. The same installation gives the same text.
    """
    specials: dict[str, int] = {}
    if bos_id is not None:
        specials["<|begin_of_text|>"] = bos_id
    for index, eos_id in enumerate(dict.fromkeys(eos_ids)):
        if eos_id not in specials.values():
            specials[_END_NAMES[index] if index < len(_END_NAMES) else f"<|end_{index}|>"] = eos_id
    room = min(vocab_size - len(specials), _TRAINED)
    if room < _BYTES:
        return None
    raw = _with_specials(_first(room), specials)
    if bos_id is not None:
        raw["post_processor"] = _begins_with("<|begin_of_text|>", bos_id)
    return json.dumps(raw, ensure_ascii=False)


def _begins_with(token: str, id_: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text, as Llama's tokenizers have it."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {token: {"id": token, "ids": [id_], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b], "special_tokens": special}


def _first(count: int) -> dict[str, Any]:
    """A tokenizer of the first `count` tokens: what training to so few gives, since merges follow from those before."""
    raw: dict[str, Any] = json.loads(_trained())
    model = raw["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < count}
    del model["merges"][count - _BYTES :]
    return raw


@cache
def _trained() -> str:
    """Of `_TRAINED` tokens; seconds, once a process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TRAINED, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer.to_str()


def _with_specials(raw: dict[str, Any], specials: dict[str, int]) -> dict[str, Any]:
    """Move the learned tokens to the ids that the special tokens leave free, and add these."""
    taken = set(specials.values())
    learned = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    free = (i for i in range(len(learned) + len(taken)) if i not in taken)
    vocabulary = dict(zip(learned, free, strict=False)) | specials
    raw["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    raw["added_tokens"] = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, i in sorted(specials.items(), key=lambda item: item[1])
    ]
    return raw


def _texts() -> Iterator[str]:
    for name in (*_MODULES, "pydoc_data.topics"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        yield from _long_strings(tree)


def _long_strings(tree: ast.AST) -> Iterator[str]:
    """Docstrings and other prose: every string of some length."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 60:
            yield node.value
