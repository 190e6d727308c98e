"""What prompt lookup gains on real text: generation with and without it, by turns in one process, equal text demanded.

    python bench/bench_speculation.py ARTIFACT [--rounds 7] [--threads 1] [--json FILE]

Decoding is greedy. Three prompts end where the answer repeats what stands in them (an edit of code, JSON, a summary
with quotes), two do not; a small model may repeat itself in any of them. Ratios are of processor time of the calling
thread: give one thread on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.assistant import assistant
from moec.assistant.load import load
from moec.cli.output import table
from moec.compiler.artifact import Artifact

_CODE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def __len__(self):
        return len(self.items)
"""
_JSON = (
    '{"name": "Ada", "age": 36, "city": "London", "languages": ["English", "French"], "address": {"street": "St James '
    'Square", "number": 12, "zip": "SW1Y 4LE"}, "active": true, "tags": ["mathematics", "engines", "poetry"]}'
)
_LETTER = (
    "The lighthouse keeper found a letter in a green bottle on the morning after the storm. It said: "
    '"Whoever reads this, know that the ship Aurora did not sink by chance. The captain, William Harrow, sold the lamp '
    'oil in the last port, and we sailed without light." The keeper read it twice.'
)
PROMPTS = {
    "edit of code": f"Original file:\n{_CODE}\nThe file with a docstring in the class:\nclass Stack:\n"
    '    """A stack."""\n\n    def __init__(self):\n        self.items = []\n',
    "JSON": f'Input: {_JSON}\nOutput, the same:\n{{"name": "Ada", "age": 36, "city"',
    "summary with quotes": f'{_LETTER}\n\nSummary with quotes: The letter said: "Whoever reads this, know that',
    "story": "Once upon a time there was a small village by the sea where",
    "essay": "The main causes of the French Revolution were",
}


class _Nothing:
    """A drafter without drafts."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        return []


def timed(speaker: assistant.Assistant, session: Any, prompt: str, drafter: type, new_tokens: int) -> tuple[float, str]:
    """Seconds from the first piece of text to the last, and the text."""
    session.reset()
    kept = assistant.PromptLookup
    assistant.PromptLookup = drafter  # type: ignore[misc]
    try:
        begin, pieces = 0.0, []
        for piece in speaker.generate(session, prompt, max_new_tokens=new_tokens, temperature=0):
            begin = begin or time.thread_time()
            pieces.append(str(piece))
        return time.thread_time() - begin, "".join(pieces)
    finally:
        assistant.PromptLookup = kept  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_speculation", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    artifact = Artifact.open(options.artifact).with_threads(options.threads)
    session, speaker = load(artifact), assistant.Assistant.of(artifact)
    sides = {"on": assistant.PromptLookup, "off": _Nothing}
    ratios: dict[str, list[float]] = {name: [] for name in PROMPTS}
    for turn in range(options.rounds):
        for name, prompt in PROMPTS.items():
            order = sorted(sides, reverse=bool(turn % 2))
            found = {side: timed(speaker, session, prompt, sides[side], options.new_tokens) for side in order}
            if found["on"][1] != found["off"][1]:
                print(f"{name}: the text differs with speculation", file=sys.stderr)
                return 1
            ratios[name].append(found["off"][0] / found["on"][0])
    rows = [[n, f"{statistics.median(r):.2f}", f"{min(r):.2f} to {max(r):.2f}"] for n, r in ratios.items()]
    table("decoding, without prompt lookup to with it", ["text", "times", "rounds"], rows, right=(1,))
    if options.json is not None:
        options.json.write_text(json.dumps(ratios), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
