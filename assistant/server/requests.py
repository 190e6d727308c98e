"""Bodies of /v1/chat/completions and /v1/completions, checked.

Fields are OpenAI's, and `top_k`, `min_p`, `repetition_penalty`, `regex`, `grammar`, `chat_template_kwargs`,
`context_full`, `keep_first`.
An unknown field is refused, so that no request is silently ignored in part.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moec.assistant.answer import ContextFull, Limits
from moec.assistant.sampling import Sampling
from moec.assistant.structured import Format
from moec.compiler.errors import RunError

_MOST_TOKENS = 1 << 31
_ID_DIGITS = 10  # of a token id; Python refuses to convert numbers of thousands of digits
_Tokens = Annotated[int, Field(ge=0, lt=_MOST_TOKENS)]


class BadRequest(Exception):
    """A request that is refused: an HTTP status, what is wrong, and the field."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # nothing is added to hide lengths


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    max_tokens: _Tokens | None = None
    regex: str | None = None
    grammar: str | None = None
    context_full: ContextFull | None = None
    keep_first: _Tokens | None = None
    # accepted without effect: they choose among services or what a service stores
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def limits(
        self, default: Sampling, most: int | None, top_scores: int | None, context_full: ContextFull = "error"
    ) -> Limits:
        """The limits of the answer: what the body omits is as the model recommends, an omitted seed is random.

        context_full: where the body does not say it.

        BadRequest, or RunError for values out of range.
        """
        if self.n not in (None, 1):
            raise BadRequest(f"n {self.n}: only one answer per request", param="n")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options: only with stream: true", param="stream_options")
        biases = None
        if self.logit_bias is not None:
            if not all(key.isascii() and key.isdigit() and len(key) <= _ID_DIGITS for key in self.logit_bias):
                raise BadRequest("logit_bias: keys are token ids", param="logit_bias")
            biases = {int(key): bias for key, bias in self.logit_bias.items()}
        sampling = default.given(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repeat_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=biases,
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 64),
        )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        policy = self.context_full or context_full
        return Limits(sampling, most, stop, top_scores, context_full=policy, keep_first=self.keep_first)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_scores(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered_tools(self) -> list[Any] | None:
        """The tools that the prompt lists: none where the answer may not call one."""
        return None if self.tool_choice == "none" else self.tools

    def must_call(self) -> tuple[bool, str | None]:
        """(Whether the answer must call a tool, its name or None for any). BadRequest."""
        given = self.tool_choice
        if given in (None, "auto", "none"):
            return False, None
        name = None
        if isinstance(given, dict):
            function = given.get("function")
            name = function.get("name") if isinstance(function, dict) and given.get("type") == "function" else None
        if given != "required" and not isinstance(name, str):
            what = 'tool_choice: use auto, none, required or {"type": "function", "function": {"name": ...}}'
            raise BadRequest(what, param="tool_choice")
        if self.format() is not None:
            raise BadRequest("tool_choice: a required call excludes other formats", param="tool_choice")
        return True, name

    def variables(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    def format(self) -> Format | None:
        """The format that the answer must have, or None. RunError, BadRequest."""
        given = self.response_format or {"type": "text"}
        kind, schema = given.get("type"), None
        if kind == "json_object":
            schema = {"type": "object"}
        elif kind == "json_schema":
            inner = given.get("json_schema")
            if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), (Mapping, bool)):
                raise BadRequest("json_schema has no schema", param="response_format.json_schema")
            schema = inner["schema"]
        elif kind != "text":
            remedy = "use text, json_object or json_schema"
            raise BadRequest(f"unknown type {str(kind)[:40]!r}; {remedy}", param="response_format.type")
        return Format.of(json_schema=schema, regex=self.regex, grammar=self.grammar)


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = "<|endoftext|>"
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or list of ids for each answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(i) for i in self.prompt if isinstance(i, int)]]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def most(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    def format(self) -> Format | None:
        return Format.of(regex=self.regex, grammar=self.grammar)


B = TypeVar("B", bound=_Body)


def parsed(raw: bytes, kind: type[B], model: str) -> B:
    """A checked body; BadRequest for what is not JSON, unknown or wrong fields, and another model's name."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {str(error).splitlines()[0][:200]}") from None
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise BadRequest(f"{where}: {first['msg']}" if where else first["msg"], param=where or None) from None
    except RecursionError:
        raise BadRequest("nested too deeply") from None
    if body.model not in ("", model):
        what = f"no model {body.model[:80]!r}; this server has {model}"
        raise BadRequest(what, param="model", status=404, code="model_not_found")
    return body


def refused(error: RunError) -> BadRequest:
    """What the client is told of a fault in its request."""
    param = error.place if error.place is not None and "/" not in error.place else None
    message = error.message if error.place is None else f"{error.place}: {error.message}" if param else error.message
    return BadRequest(f"{message}; {error.remedy}" if error.remedy else message, param=param)
