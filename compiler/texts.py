"""The text shipped in specs/prompts/ (four domains), and JSON lines of the user's: read by verify, profile,
calibration.

Real text matters: repeated or random tokens reach few experts, or all of them evenly, and understate both the memory
and the routing of a Mixture of Experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from moec.compiler.errors import UserError

DOMAINS = ("code", "knowledge", "math", "prose")
DUMMY = "dummy"  # the name of streams of one repeated token: no domain may be called so


def prompts() -> dict[str, str]:
    """The shipped texts by domain (code, knowledge, math, prose), each of several hundred to two thousand tokens."""
    folder = files("moec") / "specs" / "prompts"
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in DOMAINS}


@dataclass(frozen=True)
class Prompt:
    """One text; `place` says where it stands, for messages."""

    domain: str
    text: str
    place: str


def shipped_prompts() -> list[Prompt]:
    """The shipped texts: code (CPython, PSF-2.0), knowledge (World Factbook, public domain), math (GSM8K, MIT)."""
    file = files("moec") / "specs" / "prompts" / "profile.jsonl"
    return parse_lines(file.read_text("utf-8"), "specs/prompts/profile.jsonl")


def parse_lines(text: str, name: str) -> list[Prompt]:
    """Prompts of JSON lines; UserError, which names `name` and the line, for a line that is none."""
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {error}", place=place, remedy="write one JSON object a line") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("text"), str):
            raise UserError("no `text`", place=place, remedy='write lines such as {"domain": "code", "text": "..."}')
        domain = raw.get("domain", "text")
        if not isinstance(domain, str) or not domain.strip() or domain == DUMMY or len(domain) > 60:
            raise UserError(f"{domain!r} is no name of a domain", place=place, remedy="use a short word such as code")
        prompts.append(Prompt(domain, raw["text"], place))
    return prompts
