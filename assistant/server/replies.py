"""Answers in the shape of OpenAI's interface: whole, or as the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moec.assistant.answer import Answer
from moec.assistant.sampling import TokenScore
from moec.assistant.tool_formats import ToolCall
from moec.compiler.tokenizer import TextTokenizer

_REASONS = {"stop token": "stop", "stop string": "stop", "complete": "stop", "length": "length", "context": "length"}
DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def finish_reason(answer: Answer) -> str:
    """`tool_calls`, `length` or `stop`, which a cancelled answer has too: nobody reads it."""
    return "tool_calls" if answer.calls else _REASONS.get(answer.stats.stopped, "stop")


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    prompt = sum(answer.stats.prompt_tokens for answer in answers)
    new = sum(answer.stats.new_tokens for answer in answers)
    reused = sum(answer.stats.reused_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reused},
        "dropped_tokens": sum(answer.stats.dropped_tokens for answer in answers),
        "dropped_messages": sum(answer.stats.dropped_messages for answer in answers),
    }


def tool_calls(
    calls: Sequence[ToolCall], identity: str, *, first: int = 0, indexed: bool = False
) -> list[dict[str, Any]]:
    """identity: the answer's, a part of the ids of its calls."""
    found = []
    for index, call in enumerate(calls, first):
        function = {"name": call.name, "arguments": call.arguments}
        one = {"id": f"call_{identity}_{index}", "type": "function", "function": function}
        found.append({"index": index, **one} if indexed else one)
    return found


def message(answer: Answer, identity: str) -> dict[str, Any]:
    text = answer.text.rstrip() if answer.calls else answer.text
    found: dict[str, Any] = {"role": "assistant", "content": text if text or not answer.calls else None}
    if answer.thinking:
        found["reasoning_content"] = answer.thinking.strip("\n")
    if answer.calls:
        found["tool_calls"] = tool_calls(answer.calls, identity)
    return found


class TokenTexts:
    """Texts of tokens, cached: the likeliest tokens recur."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """What a token adds after another one; U+FFFD where it is a part of a character."""
        if token not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            whole = self._tokenizer.decode([token, token], skip_special_tokens=False)
            # decoders strip a space at the beginning of a text, so the token is decoded twice in a row
            half = len(whole) // 2
            once = self._tokenizer.decode([token], skip_special_tokens=False)
            self._known[token] = whole[len(once) :] if whole.startswith(once) and len(whole) > half else once
        return self._known[token]

    def chat(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """`logprobs` of a choice of a chat completion."""

        def one(token: int, value: float) -> dict[str, Any]:
            text = self.text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}

        content = [{**one(s.token, s.log_probability), "top_logprobs": [one(*pair) for pair in s.top]} for s in scores]
        return {"content": content, "refusal": None}

    def completion(self, scores: Sequence[TokenScore | None], tokens: Sequence[int], offset: int = 0) -> dict[str, Any]:
        """`logprobs` of a choice of a completion; None: a first token, which has no context."""
        texts = [self.text(token) for token in tokens]
        offsets, at = [], offset
        for text in texts:
            offsets.append(at)
            at += len(text)
        tops = [None if s is None else {self.text(t): v for t, v in reversed(_with_own(s))} for s in scores]
        return {
            "tokens": texts,
            "token_logprobs": [None if s is None else s.log_probability for s in scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _with_own(given: TokenScore) -> list[tuple[int, float]]:
    """The likeliest tokens, and the chosen one if it is not among them."""
    own = [] if any(token == given.token for token, _ in given.top) else [(given.token, given.log_probability)]
    return [*given.top, *own]
