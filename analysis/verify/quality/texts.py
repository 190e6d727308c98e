"""The held-out text that the cost of quantization is measured on, as chunks of token ids, each from an empty context.

The shipped text (specs/quality: prose, code, chat; about 3,000 tokens each) was written for this project and is used
for nothing else. Chats are written with the model's own chat template where it has one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from moec.analysis.verify.prompts import TextEncoder
from moec.compiler.errors import CheckpointError, UserError

LENGTH = 512  # tokens of a chunk
DOMAINS = ("prose", "code", "chat")
ALL_TOKENS = 9216  # what the shipped text gives, more or less, depending on the tokenizer


@dataclass(frozen=True)
class Chunk:
    """`ids` of one domain, to be read from position 0."""

    domain: str
    ids: tuple[int, ...]


def held_out(
    encoder: TextEncoder, *, template: str | None, tokens: int, longest: int, text: str | None = None
) -> list[Chunk]:
    """About `tokens` ids in chunks of LENGTH or of `longest`, the model's context, if that is less.

    tokens: shared evenly between the domains of the shipped text, or taken from `text` alone; a domain gives at least
    one chunk, and no more than it has. UserError if there are not two tokens, since the second is the first that can
    be predicted.
    """
    length = min(LENGTH, longest)
    bodies = {"text": text} if text is not None else shipped(template)
    each = max(1, tokens // len(bodies) // length)
    chunks = [Chunk(name, ids) for name, body in bodies.items() for ids in _cut(encoder.encode(body), length, each)]
    if not chunks:
        raise UserError("there are not two tokens in the text to measure with", remedy="give a longer text")
    return chunks


def _cut(ids: Sequence[int], length: int, most: int) -> list[tuple[int, ...]]:
    whole = [tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)][:most]
    return whole or ([tuple(ids)] if len(ids) > 1 else [])


def shipped(template: str | None) -> dict[str, str]:
    """The text of each domain."""
    folder = files("moec") / "specs" / "quality"
    lines = (folder / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return {
        "prose": (folder / "prose.txt").read_text(encoding="utf-8"),
        "code": (folder / "code.txt").read_text(encoding="utf-8"),
        "chat": "".join(written(template, chat) for chat in chats),
    }


def written(template: str | None, chat: Sequence[dict[str, str]]) -> str:
    """A conversation as a template of the transformers library writes it, or plainly. It is data: it runs in a sandbox.

    CheckpointError for a template that cannot.
    """
    if template is None:
        return "".join(f"{said['role'].capitalize()}: {said['content']}\n\n" for said in chat)
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    names: dict[str, Any] = {"bos_token": "", "eos_token": "", "add_generation_prompt": False, "tools": None}
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=chat, raise_exception=refuse, **names)
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"its chat template cannot write a conversation: {str(error).splitlines()[0] if str(error) else error!r}",
            remedy="measure on a text of yours: --text FILE",
        ) from error
