"""Figures of the assistant, on one artifact or one tokenizer. Each part is described in its file.

    python bench/bench_assistant.py prefix ARTIFACT [--tokens 4095] [--rounds 9]  saved_prefix.py: the first token
    python bench/bench_assistant.py serve ARTIFACT [--tokens 1000]                served_memory.py: memory of a server
    python bench/bench_assistant.py mask [--vocabulary 128256] [--rounds 40]      schema_masks.py: masks of JSON Schema

All take --json FILE, and the first two --threads N. Seconds are those of a clock: give a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import saved_prefix
import schema_masks
import served_memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_assistant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("prefix").set_defaults(rounds=9, tokens=4095)
    parts.add_parser("serve").set_defaults(tokens=1000)
    parts.add_parser("mask").set_defaults(rounds=40)
    for name, part in parts.choices.items():
        part.add_argument("--json", type=Path, metavar="FILE")
        if name == "mask":
            part.add_argument("--vocabulary", type=int, default=128_256)
        else:
            part.add_argument("artifact", type=Path)
            part.add_argument("--threads", type=int, default=2)
            part.add_argument("--tokens", type=int, help="of the prefix, or of the longest prompt")
        if name != "serve":
            part.add_argument("--rounds", type=int)
    given = parser.parse_args(arguments)
    if given.part == "prefix":
        found = saved_prefix.measure(given.artifact, tokens=given.tokens, threads=given.threads, rounds=given.rounds)
        saved_prefix.tell(found)
    elif given.part == "serve":
        found = served_memory.measure(given.artifact, tokens=given.tokens, threads=given.threads)
        served_memory.tell(found)
    else:
        found = schema_masks.measure(given.vocabulary, rounds=given.rounds)
        schema_masks.tell(found)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
