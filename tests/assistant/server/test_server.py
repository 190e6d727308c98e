"""The server through OpenAI's own client, and what everybody else is told."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
pytest.importorskip("uvicorn", reason="the server: pip install 'moec[serve]'")
openai = pytest.importorskip("openai", reason="the official client: pip install 'moec[dev]'")
import httpx  # noqa: E402

from moec.assistant.template import ChatTemplate  # noqa: E402
from tests.assistant.server.running import Running, running  # noqa: E402
from tests.assistant.speaking import VOCABULARY, Speaking, assistant, tokenizer  # noqa: E402

ASK: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def client(at: Running, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{at.url}/v1", api_key="none", max_retries=0, timeout=30, **options)


def test_a_chat_completion(tmp_path: Path) -> None:
    session = Speaking(["Hello 日本!", "Two.", "Three words here.", "x" * 50])
    with running(tmp_path, session) as at:
        api = client(at)
        first = api.chat.completions.create(model="small", messages=ASK, seed=1)
        assert first.choices[0].message.content == "Hello 日本!"
        assert (first.choices[0].finish_reason, first.object, first.model) == ("stop", "chat.completion", "small")
        assert first.usage.prompt_tokens == len(session.prompts[0])
        assert first.usage.completion_tokens == len(tokenizer().encode("Hello 日本!").ids)
        said = {"role": "assistant", "content": "Hello 日本!"}
        second = api.chat.completions.create(model="small", messages=[*ASK, said, *ASK])
        assert second.choices[0].message.content == "Two."
        assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens
        stopped = api.chat.completions.create(model="small", messages=ASK, stop=[" here", "never"])
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Three words", "stop")
        cut = api.chat.completions.create(model="small", messages=ASK, max_tokens=7)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("x" * 7, "length")


def test_a_call_is_forced(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    row = np.random.default_rng(1).standard_normal(VOCABULARY).astype(np.float32)
    with running(tmp_path, Speaking(likes=lambda _: row, context=2000), "hermes") as at:
        named = {"type": "function", "function": {"name": "add"}}
        options: Any = {"model": "small", "messages": ASK, "tools": [TOOL], "tool_choice": named}
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 22]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        options["tools"] = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
        found = client(at).chat.completions.create(**options, parallel_tool_calls=False).choices[0]
        assert found.finish_reason == "tool_calls"
        (call,) = found.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)["a"] in (1, 22)) == ("add", True)
        with pytest.raises(openai.BadRequestError, match="no tool named sub"):
            client(at).chat.completions.create(**{**options, "tool_choice": {**named, "function": {"name": "sub"}}})


def test_a_stream(tmp_path: Path) -> None:
    with running(tmp_path, Speaking(["Hé 日!"])) as at:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
        chunks = list(client(at).chat.completions.create(model="small", messages=ASK, **options))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hé 日!"
        assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens == 8  # bytes
        told = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert len(told) == 8
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in told)


def test_logprobs_are_the_models(tmp_path: Path) -> None:
    with running(tmp_path, Speaking(["ab"])) as at:
        found = client(at).chat.completions.create(
            model="small", messages=ASK, logprobs=True, top_logprobs=3, temperature=0.7, seed=0, logit_bias={"70": -9}
        )
        # logit 9 for one token and 0 for the rest, before temperature and bias
        wanted = 9 - np.log(np.exp(9) + VOCABULARY - 1)
        content = found.choices[0].logprobs.content
        assert [t.token for t in content] == ["a", "b"]
        for token in content:
            assert token.logprob == pytest.approx(wanted, abs=1e-9)
            assert token.top_logprobs[0].token == token.token
            assert token.bytes == list(token.token.encode())


def test_completions(tmp_path: Path) -> None:
    with running(tmp_path, Speaking([" there", "one", "two", "three"])) as at:
        api = client(at)
        found = api.completions.create(model="small", prompt="Hi", max_tokens=20)
        assert (found.choices[0].text, found.object) == (" there", "text_completion")
        several = api.completions.create(model="small", prompt=["a", "b"], echo=True)
        assert [c.text for c in several.choices] == ["aone", "btwo"]
        assert [c.index for c in several.choices] == [0, 1]
        chunks = list(api.completions.create(model="small", prompt=[20, 21], stream=True))
        assert "".join(c.choices[0].text for c in chunks) == "three"


@pytest.mark.parametrize(("memory_mb", "rows", "size"), [(None, 1, 64), (500, 10, 10), (500, 0.5, 1)])
def test_a_prompt_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_mb: int | None, rows: float, size: int
) -> None:
    """What an evaluation asks for: echo with log-probabilities of every token of the prompt, in pieces that a memory
    budget can bear."""
    monkeypatch.setattr("moec.assistant.server.engine._SCORED_BYTES", int(rows * 4 * VOCABULARY))

    def likes(position: int) -> np.ndarray:
        return np.linspace(0, 1, VOCABULARY, dtype=np.float32) * position

    ids = list(range(20, 170))  # more than the server scores at once
    session = Speaking(likes=likes)
    session.memory_mb = memory_mb
    with running(tmp_path, session) as at:
        found = client(at).completions.create(
            model="small", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0
        )
        told = found.choices[0].logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids) + 1
        assert told.token_logprobs[0] is None
        # a chunk's rows are alike in this model: those of the position behind its last token
        for index in (1, 63, 64, 65, 149):
            chunk_end = min((index - 1) // size * size + size, 150)
            row = likes(chunk_end).astype(np.float64)
            wanted = row[ids[index]] - np.log(np.exp(row).sum())
            assert told.token_logprobs[index] == pytest.approx(wanted, abs=1e-6)
            assert max(told.top_logprobs[index].values()) >= told.token_logprobs[index]


def test_tools(tmp_path: Path) -> None:
    said = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    with running(tmp_path, Speaking([said, said, "It is 3."]), "hermes") as at:
        api = client(at)
        found = api.chat.completions.create(model="small", messages=ASK, tools=[TOOL])
        call = found.choices[0].message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        assert (found.choices[0].finish_reason, found.choices[0].message.content) == ("tool_calls", "Let me see.")
        chunks = list(api.chat.completions.create(model="small", messages=ASK, tools=[TOOL], stream=True))
        parts = [p for c in chunks for p in c.choices[0].delta.tool_calls or []]
        assert [(p.index, p.function.name) for p in parts] == [(0, "add")]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        answered: list[Any] = [
            *ASK,
            found.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "3"},
        ]
        last = api.chat.completions.create(model="small", messages=answered, tools=[TOOL])
        assert last.choices[0].message.content == "It is 3."


def test_tools_whose_calls_are_not_known_are_refused(tmp_path: Path) -> None:
    unknown = assistant(tmp_path, chat=ChatTemplate("{{ tools }}<TOOLCALL>", {}, "unknown.jinja"))
    with running(tmp_path, Speaking(["a"]), speaks=unknown) as at:
        for stream in (False, True):
            reply = post(at, {"messages": ASK, "tools": [TOOL], "stream": stream})
            assert (reply.status_code, "does not know how a model" in reply.text) == (400, True)
        assert post(at, {"messages": ASK, "tools": [TOOL], "tool_choice": "none"}).status_code == 200


def test_one_call_where_several_are_not_wanted(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    # one behind the other, and a form in which they come together at the end
    said = f"Two:\n{call}\n{call}\nand more", '<|tool_call|>[{"name": "add", "arguments": {}}, {"name": "add"}]'
    for name, text in zip(("hermes", "granite"), said, strict=True):
        with running(tmp_path, Speaking([text] * 3), name) as at:
            asked = {"messages": ASK, "tools": [TOOL]}
            both = post(at, asked).json()["choices"][0]
            one = post(at, {**asked, "parallel_tool_calls": False}).json()
            assert (len(both["message"]["tool_calls"]), len(one["choices"][0]["message"]["tool_calls"])) == (2, 1)
            assert one["choices"][0]["finish_reason"] == "tool_calls"
            if name == "hermes":
                assert one["usage"]["completion_tokens"] == len(f"Two:\n{call}")  # nothing is computed behind it
            lines = post(at, {**asked, "parallel_tool_calls": False, "stream": True}).text.splitlines()
            assert sum('"tool_calls": [' in line for line in lines) == 1


def test_thinking_is_told_apart(tmp_path: Path) -> None:
    with running(tmp_path, Speaking(["<think>\nHm.\n</think>\n\nFour."] * 2), "hermes") as at:
        found = client(at).chat.completions.create(model="small", messages=ASK).choices[0].message
        assert (found.content, found.reasoning_content) == ("Four.", "Hm.")
        chunks = list(client(at).chat.completions.create(model="small", messages=ASK, stream=True))
        thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks)
        assert thought.strip() == "Hm."


def test_structured_output(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    given: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    with running(tmp_path, Speaking(likes=lambda _: np.arange(VOCABULARY, dtype=np.float32))) as at:
        api = client(at)
        found = api.chat.completions.create(model="small", messages=ASK, response_format=given)
        assert json.loads(found.choices[0].message.content) in ({"n": 1}, {"n": 2})
        cut = api.chat.completions.create(model="small", messages=ASK, response_format=given, max_tokens=2)
        assert cut.choices[0].finish_reason == "length"
        regex = api.chat.completions.create(model="small", messages=ASK, extra_body={"regex": "[ab]{3}"})
        assert re.fullmatch("[ab]{3}", regex.choices[0].message.content)
        bad: Any = {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "integer", "minimum": 2, "maximum": 1}},
        }
        with pytest.raises(openai.BadRequestError, match="nsatisfiable"):
            api.chat.completions.create(model="small", messages=ASK, response_format=bad)
        with pytest.raises(openai.BadRequestError, match="nsatisfiable"):
            api.chat.completions.create(model="small", messages=ASK, response_format=bad, stream=True)


def test_models_health_and_metrics(tmp_path: Path) -> None:
    with running(tmp_path, Speaking(["Hello."])) as at:
        api = client(at)
        assert [m.id for m in api.models.list()] == ["small"]
        assert api.models.retrieve("small").id == "small"
        with pytest.raises(openai.NotFoundError, match="this server has small"):
            api.models.retrieve("large")
        assert httpx.get(f"{at.url}/health").json() == {"status": "ok", "model": "small"}
        api.chat.completions.create(model="small", messages=ASK)
        at.idle()
        told = httpx.get(f"{at.url}/metrics")
        assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
        for line in told.text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+0-9.e]+', line), line
        assert 'moec_requests_total{path="/v1/chat/completions",status="200"} 1\n' in told.text
        assert "moec_generated_tokens_total 6\n" in told.text
        assert float(re.search(r"^process_resident_memory_bytes (\S+)", told.text, re.M)[1]) > 1e6  # type: ignore[index]


def post(at: Running, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    raw = body if isinstance(body, (bytes, str)) else json.dumps(body)
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(at.url + path, content=raw, headers=headers, timeout=30, **options)


MALFORMED: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "not JSON"),
    "no UTF-8": (b"\xff\xfe", 400, "not JSON"),
    "deep": ("[" * 100_000, 400, "not JSON"),
    "a list": ([], 400, "dictionary"),
    "no messages": ({"model": "small"}, 400, "messages"),
    "empty messages": ({"messages": []}, 400, "no messages"),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role: unknown role robot"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half a character"),
    "unknown field": ({"messages": ASK, "temprature": 1}, 400, "temprature"),
    "unknown model": ({"messages": ASK, "model": "gpt"}, 404, "this server has small"),
    "temperature": ({"messages": ASK, "temperature": -1}, 400, "temperature -1"),
    "temperature NaN": ('{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature nan"),
    "a text as a number": ({"messages": ASK, "top_p": "1"}, 400, "top_p"),
    "negative tokens": ({"messages": ASK, "max_tokens": -1}, 400, "max_tokens"),
    "too many tokens": ({"messages": ASK, "max_tokens": 1 << 40}, 400, "max_tokens"),
    "n": ({"messages": ASK, "n": 2}, 400, "n 2"),
    "an empty stop string": ({"messages": ASK, "stop": [""]}, 400, "has no characters"),
    "a million stop strings": ({"messages": ASK, "stop": [str(i) for i in range(10**6)]}, 413, "at most"),
    "too many stop strings": ({"messages": ASK, "stop": [str(i) for i in range(2000)]}, 400, "2000 stop strings"),
    "bias": ({"messages": ASK, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    "bias out of the vocabulary": ({"messages": ASK, "logit_bias": {"99999999": 1}}, 400, "not in the vocabulary"),
    "bias of more than 64 bits": ({"messages": ASK, "logit_bias": {"9" * 30: 1}}, 400, "token ids"),
    "bias of thousands of digits": ({"messages": ASK, "logit_bias": {"9" * 5000: 1}}, 400, "token ids"),
    "half a variable": ({"messages": ASK, "chat_template_kwargs": {"x": ["\ud800"]}}, 400, "half a character"),
    "top_logprobs alone": ({"messages": ASK, "top_logprobs": 2}, 400, "needs logprobs"),
    "tools without a template for them": ({"messages": ASK, "tools": [TOOL]}, 400, "reads no tools"),
    "tool_choice without tools": ({"messages": ASK, "tool_choice": "required"}, 400, "no tools to call"),
    "tool_choice of no form": ({"messages": ASK, "tools": [TOOL], "tool_choice": {"name": "x"}}, 400, "tool_choice"),
    "response_format": ({"messages": ASK, "response_format": {"type": "xml"}}, 400, "unknown type 'xml'"),
    "no schema": ({"messages": ASK, "response_format": {"type": "json_schema"}}, 400, "no schema"),
    "regex": ({"messages": ASK, "regex": "("}, 400, "regex"),
    "an unknown stream option": ({"messages": ASK, "stream": True, "stream_options": {"usage": True}}, 400, "usage"),
    "obfuscation": (
        {"messages": ASK, "stream": True, "stream_options": {"include_obfuscation": True}}, 400, "include_obfuscation"),
    "stream_options without a stream": (
        {"messages": ASK, "stream": False, "stream_options": {"include_usage": True}}, 400, "only with stream: true"),
    "an effort that the template does not read": (
        {"messages": ASK, "reasoning_effort": "low"}, 400, "reads no reasoning_effort"),
    "two formats": ({"messages": ASK, "regex": "a", "grammar": "b"}, 400, "at once"),
    "a long prompt": ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "the context holds 512"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(tmp_path_factory.mktemp("server"), Speaking([]), most_bytes=1 << 20) as at:
        yield at


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bodies_are_refused(kind: str, small: Running) -> None:
    body, status, what = MALFORMED[kind]
    reply = post(small, body)
    assert reply.status_code == status, reply.text
    assert what in reply.json()["error"]["message"]
    assert "\n" not in reply.json()["error"]["message"]
    if not isinstance(body, bytes) and status == 400 and kind not in ("deep",):
        raw = body if isinstance(body, str) else json.dumps(body)
        if raw.startswith("{") and '"messages"' in raw:
            streamed = post(small, raw[:1] + '"stream": true, ' + raw[1:])
            assert streamed.status_code == 400, streamed.text  # a status, not an event behind a 200
    assert post(small, {"messages": ASK}).status_code == 200  # the next one is answered


@pytest.mark.slow
def test_a_template_that_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.assistant.template.SECONDS", 2.0)
    endless = ChatTemplate(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}, "t.jinja"
    )
    with running(tmp_path, Speaking(["Hello."]), speaks=assistant(tmp_path, chat=endless)) as at:
        reply = post(at, {"messages": ASK})
        assert (reply.status_code, "does not end" in reply.json()["error"]["message"]) == (500, True)
        assert post(at, {"prompt": "a"}, "/v1/completions").status_code == 200


def test_a_schema_that_nothing_satisfies_is_told(small: Running) -> None:
    pytest.importorskip("llguidance", reason="structured output: pip install 'moec[structured]'")
    schema = {"type": "integer", "minimum": 2, "maximum": 1}
    body = {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    reply = post(small, body)
    assert reply.status_code == 400, reply.text
    assert "nsatisfiable" in reply.json()["error"]["message"]


def test_a_context_that_ends_in_a_tool_call(tmp_path: Path) -> None:
    """What came of the call is text, the reason says why, and the session serves the next request."""
    said = '<tool_call>\n{"name": "add", "arguments": {"a": "' + "1" * 900 + '"}}\n</tool_call>'
    with running(tmp_path, Speaking([said, "Two."], context=700), "hermes") as at:
        reply = post(at, {"messages": ASK, "tools": [TOOL]}).json()["choices"][0]
        assert reply["finish_reason"] == "length"
        assert not reply["message"].get("tool_calls")
        assert reply["message"]["content"].startswith('<tool_call>\n{"name": "add"')
        assert post(at, {"messages": ASK}).json()["choices"][0]["message"]["content"] == "Two."


def test_malformed_completions_are_refused(small: Running) -> None:
    for body, what in [
        ({"prompt": []}, "0 prompts"),
        ({"prompt": ["a"] * 65}, "65 prompts"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1, 99999999]}, "99999999 is not in the vocabulary"),
        ({"prompt": [-1]}, "-1 is not in the vocabulary"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "x" * 1000}, "the context holds 512"),
        ({"prompt": ["a", "b"], "stream": True}, "a stream takes one prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ]:
        reply = post(small, body, "/v1/completions")
        assert reply.status_code == 400, (body, reply.text)
        assert what in reply.json()["error"]["message"]


def test_what_is_not_there(small: Running) -> None:
    assert httpx.get(f"{small.url}/v2/x").status_code == 404
    assert httpx.get(f"{small.url}/v1/chat/completions").status_code == 405
    form = post(small, {"messages": ASK}, headers={"Content-Type": "text/plain"})
    assert (form.status_code, "application/json" in form.json()["error"]["message"]) == (415, True)


def test_a_template_may_be_told_a_variable_of_any_name(small: Running) -> None:
    for name in ("self", "context", "message", "args"):  # names of Python's own parameters on the way
        reply = post(small, {"messages": ASK, "chat_template_kwargs": {name: 1}})
        assert reply.status_code == 200, reply.text


def test_the_address_that_is_listened_at_is_a_name_of_this_machine(tmp_path: Path) -> None:
    for host, given in (("127.0.0.2", "127.0.0.2:80"), ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]:80")):
        with running(tmp_path, Speaking([]), host=host) as at:
            for name, status in ((given, 200), ("localhost", 200), ("127.0.0.3", 403)):
                assert httpx.get(f"{at.url}/health", headers={"Host": name}).status_code == status, name


def test_another_host_is_refused_without_a_token(small: Running) -> None:
    """A name of an attacker's that DNS points here: the browser sends it as Host."""
    for host, status in (
        ("evil.example", 403),
        ("localhost:1", 200),
        ("[::1]:80", 200),
        ("127.0.0.1.evil.example", 403),
    ):
        assert httpx.get(f"{small.url}/health", headers={"Host": host}).status_code == status, host


def test_a_token_is_required_where_one_is_set(tmp_path: Path) -> None:
    with running(tmp_path, Speaking(["Hello."]), token="secret") as at:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            sent = {key: value.encode() for key, value in headers.items()}
            for path in ("/v1/models", "/metrics"):
                assert httpx.get(at.url + path, headers=sent).status_code == 401
            assert post(at, {"messages": ASK}, headers=sent).status_code == 401
        assert httpx.get(f"{at.url}/health").status_code == 200
        assert httpx.get(f"{at.url}/").status_code == 200
        api = openai.OpenAI(base_url=f"{at.url}/v1", api_key="secret", max_retries=0)
        assert api.chat.completions.create(model="small", messages=ASK).choices[0].message.content == "Hello."


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_a_gigabyte_is_refused_unread(small: Running, chunked: bool) -> None:
    """The answer is there before a megabyte was sent, or soon after the limit where no length was told."""
    host, port = small.url.removeprefix("http://").split(":")
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {1 << 30}"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        if chunked:
            for _ in range(17):
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        reply = connection.recv(4096).decode()
    assert reply.startswith("HTTP/1.1 413"), reply
    assert small.server.metrics.text().count("413") >= 1


def test_a_length_of_thousands_of_digits_is_refused(small: Running) -> None:
    """Python reads no number of so many digits: it was an error of the server."""
    host, port = small.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall((head + "9" * 5000 + "\r\n\r\n").encode())
        reply = connection.recv(4096).decode()
    assert reply.startswith(("HTTP/1.1 413", "HTTP/1.1 400")), reply


def test_a_client_that_leaves_is_not_answered_further(tmp_path: Path) -> None:
    session = Speaking(["x" * 400, "y" * 400, "Here."], slow=lambda: time.sleep(0.01))
    with running(tmp_path, session) as at:
        address = f"{at.url}/v1/chat/completions"
        for stream in (True, False):
            asked = {"messages": ASK, "stream": stream}
            if stream:
                with httpx.stream("POST", address, json=asked, timeout=30) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(address, json=asked, timeout=httpx.Timeout(30, read=0.5))
            at.idle(3)  # of the 4 seconds and more that an answer takes
            assert session.calls < 300
            session.calls = 0
        assert post(at, {"messages": ASK}).json()["choices"][0]["message"]["content"] == "Here."
        assert "moec_cancelled_total 2\n" in at.server.metrics.text()


def test_the_queue_has_a_limit(tmp_path: Path) -> None:
    import threading

    go = threading.Event()
    with running(tmp_path, Speaking(["a", "b", "c"], slow=lambda: go.wait(30) and None), most_waiting=1) as at:
        replies: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: replies.append(post(at, {"messages": ASK}))) for _ in range(2)]
        for thread, state in zip(threads, ((1, 0), (1, 1)), strict=True):
            thread.start()
            end = time.monotonic() + 20
            while (at.server.engine.running, at.server.engine.waiting) != state:
                assert time.monotonic() < end
                time.sleep(0.01)
        full = post(at, {"messages": ASK})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        assert full.headers["retry-after"] == "1"
        go.set()
        for thread in threads:
            thread.join(30)
        assert [reply.status_code for reply in replies] == [200, 200]


def test_texts_take_no_place_in_the_prefix_cache(tmp_path: Path) -> None:
    kept: list[int] = []

    class Prefixes:
        def restore(self, session: Speaking, ids: list[int], same: int) -> int:
            return same

        def keep(self, session: Speaking, name: str | None = None) -> None:
            kept.append(session.position)

    speaks = assistant(tmp_path)
    speaks.prefixes = Prefixes()  # type: ignore[assignment]
    with running(tmp_path, Speaking(["a", "b"]), speaks=speaks) as at:
        assert post(at, {"prompt": "A text of more than sixteen tokens."}, "/v1/completions").status_code == 200
        assert kept == []
        system = {"role": "system", "content": "Answer briefly."}
        assert post(at, {"messages": [system, *ASK]}).status_code == 200
        assert len(kept) == 1


def test_what_fails_inside_is_a_500_and_the_next_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = iter([True])

    def slow() -> None:
        if next(broken, False):
            raise ZeroDivisionError("inside")

    with running(tmp_path, Speaking(["Hello.", "Hello."], slow=slow)) as at:
        reply = post(at, {"messages": ASK})
        assert (reply.status_code, "inside" in reply.text) == (500, False)
        assert "ZeroDivisionError" in caplog.text
        assert post(at, {"messages": ASK}).status_code == 200


def test_the_page_runs_what_it_brings_and_nothing_else(small: Running) -> None:
    reply = httpx.get(small.url + "/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    nonce = re.search(r"nonce-([\w-]+)'", policy)
    assert nonce is not None
    assert reply.text.count(f'nonce="{nonce[1]}"') == 2
    assert "NONCE" not in reply.text
    # nothing from elsewhere, no handler in an attribute, no text as markup
    assert not re.search(r"(src|href)\s*=|https?:|//[a-z]|\bon\w+=|innerHTML|insertAdjacentHTML|eval\(", reply.text)
    assert httpx.get(small.url + "/").text != reply.text  # a nonce is used once


def test_a_full_context(tmp_path: Path) -> None:
    """An error, unless the server or the request says otherwise; what was dropped is in `usage`."""
    row = np.zeros(VOCABULARY, np.float32)
    row[40] = 9
    long = [{"role": "user", "content": "x" * 120}, {"role": "assistant", "content": "y"}, *ASK]
    for default in ("error", "drop_oldest"):
        session = Speaking(likes=lambda _: row, context=150)
        with running(tmp_path, session, context_full=default) as at:
            said: dict[str, Any] = {} if default == "drop_oldest" else {"context_full": "drop_oldest"}
            reply = post(at, {"messages": long, "max_tokens": 400, **said}).json()
            usage = reply["usage"]
            assert (usage["completion_tokens"], usage["dropped_messages"]) == (400, 2)
            assert usage["dropped_tokens"] > 200
            assert reply["choices"][0]["finish_reason"] == "length"
            endless = post(at, {"messages": ASK, **said}).json()["usage"]  # as many tokens as the context holds
            assert endless["completion_tokens"] == 150
            text = httpx.post(f"{at.url}/v1/completions", json={"prompt": "x" * 400, "max_tokens": 3, **said}).json()
            assert (text["usage"]["prompt_tokens"], text["usage"]["dropped_tokens"]) == (400, 300)
            kept = {"prompt": "x" * 400, "max_tokens": 3, "keep_first": 100, **said}
            assert httpx.post(f"{at.url}/v1/completions", json=kept).json()["usage"]["dropped_tokens"] == 275
            assert session.tokens[:3] == tokenizer().encode("xxx").ids
            reply = post(at, {"messages": ASK, "context_full": "error"}).json()
            assert reply["usage"]["dropped_tokens"] == 0
            for body, word in (
                ({"messages": long, "context_full": "error"}, "the context holds 150"),
                ({"messages": ASK, "context_full": "forget"}, "context_full"),
                ({"messages": ASK, "context_full": "error", "keep_first": 2}, "keep_first: nothing is dropped"),
                ({"messages": ASK, "keep_first": 150, **said}, "keep_first: 150 tokens leave nothing to drop"),
                ({"messages": [{"role": "user", "content": "x" * 200}], **said}, "no room for an answer"),
            ):
                found = post(at, body)
                assert found.status_code == 400, body
                assert word in found.text
            echo = {"prompt": "x" * 400, "echo": True, "logprobs": 1, **said}
            assert httpx.post(f"{at.url}/v1/completions", json=echo).status_code == 400
