"""The HTTP interface: routes, access checks, and the errors that clients get.

Bodies above a limit are refused, before they are read where Content-Length gives their size. POST accepts only
`application/json`: a browser sends that to another origin only after a CORS preflight, which this server does not
grant. Without a token the Host header must name this machine, so that DNS rebinding does not reach the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from moec.assistant.answer import Answer, ContextFull, Limits, Step
from moec.assistant.assistant import Assistant, Prompt
from moec.assistant.sampling import TokenScore
from moec.assistant.server.connections import AtMost
from moec.assistant.server.engine import Ended, Engine, Job, QueueFull, Scores
from moec.assistant.server.metrics import CONTENT_TYPE, Metrics, resident_bytes
from moec.assistant.server.replies import (
    DONE,
    TokenTexts,
    error_body,
    event,
    finish_reason,
    message,
    tool_calls,
    usage,
)
from moec.assistant.server.requests import BadRequest, ChatBody, CompletionBody, parsed, refused
from moec.compiler.errors import LostFileError, RunError, UserError
from moec.compiler.target import Session

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'; \
form-action 'none'; frame-ancestors 'none'"
)
_MOST_PROMPTS = 64  # in one completion request
_LENGTH_DIGITS = 20  # of a Content-Length that is converted to a number
_MORE_REQUESTS = 256  # at once, besides those that wait for an answer: their bodies are in memory
_BODY_SECONDS = 120.0  # for a body to arrive


@dataclass(frozen=True)
class Settings:
    """token: what clients must send; None only on a loopback address. most_bytes: of a body. created: Unix time of the
    model's entry. conversations: how many keep their caches. host: the address that the server listens at, which the
    Host header may name. context_full: of requests that say nothing of it (`Limits`)."""

    model: str
    token: str | None = None
    most_waiting: int = 64
    most_bytes: int = 8 << 20
    created: int = 0
    conversations: int = 1
    host: str = "127.0.0.1"
    context_full: ContextFull = "error"


class Server:
    """The application for one artifact: `app` is what an ASGI server runs."""

    def __init__(self, assistant: Assistant, session: Session, settings: Settings) -> None:
        self.settings = settings
        self.assistant = assistant
        self.engine = Engine(
            assistant, session, most_waiting=settings.most_waiting, conversations=settings.conversations
        )
        self.texts = TokenTexts(assistant.tokenizer)
        self.metrics = Metrics(
            {
                "moec_waiting_requests": ("Requests that wait for their turn.", lambda: self.engine.waiting),
                "moec_running_requests": ("Requests that are being answered.", lambda: self.engine.running),
                "moec_context_tokens": ("Tokens that the context holds.", lambda: session.context),
                "process_resident_memory_bytes": ("Memory of this process in RAM.", resident_bytes),
            }
        )
        routes = [
            Route("/", self._guarded(self._page, open_to_all=True)),
            Route("/health", self._guarded(self._health, open_to_all=True)),
            Route("/metrics", self._guarded(self._metrics)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
        ]
        handlers: Any = {HTTPException: self._http_error}
        self._hosts = {*_LOOPBACK, settings.host.lower(), f"[{settings.host.lower().strip('[]')}]"}
        self.app = AtMost(Starlette(routes=routes, exception_handlers=handlers), settings.most_waiting + _MORE_REQUESTS)

    # --- around every route ------------------------------------------------------------------------------------------

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]], *, open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._check_client(request, open_to_all=open_to_all)
                response = await answer(request)
            except BadRequest as error:
                response = self._refusal(error)
            except QueueFull:
                what = f"{self.settings.most_waiting} requests wait already"
                response = JSONResponse(
                    error_body(what, "server_error", code="queue_full"), 503, headers={"Retry-After": "1"}
                )
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            self.metrics.add("moec_requests_total", path=_route(request), status=str(response.status_code))
            response.headers.setdefault("X-Content-Type-Options", "nosniff")
            return response

        return guarded

    def _check_client(self, request: Request, *, open_to_all: bool) -> None:
        if self.settings.token is None:
            host = request.headers.get("host", "")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name.lower() not in self._hosts:
                raise BadRequest("this server answers only requests to localhost", status=403, code="host")
        elif not open_to_all:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            given, wanted = token.strip().encode(), self.settings.token.encode()
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, wanted):
                raise BadRequest("no valid token: send Authorization: Bearer TOKEN", status=401, code="invalid_api_key")

    def _refusal(self, error: BadRequest) -> JSONResponse:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        if error.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse(error_body(error.message, kind, error.param, error.code), error.status, headers=headers)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        what = {404: "no such path", 405: "no such method here"}.get(error.status_code, str(error.detail))
        self.metrics.add("moec_requests_total", path="other", status=str(error.status_code))
        return JSONResponse(
            error_body(what, "invalid_request_error"), error.status_code, headers=dict(error.headers or {})
        )

    async def _body(self, request: Request) -> bytes:
        """A JSON body within the limit. BadRequest."""
        most = self.settings.most_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest("send Content-Type: application/json", status=415)
        length = request.headers.get("content-length")
        # digits are counted first: Python refuses to convert numbers of thousands of digits
        if length is not None and (not length.isdecimal() or len(length) > _LENGTH_DIGITS or int(length) > most):
            raise BadRequest(f"a body of {length[:20]} bytes; at most {most} are read", status=413)
        found = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    found += chunk
                    if len(found) > most:
                        raise BadRequest(f"a body of more than {most} bytes", status=413)
        except TimeoutError:
            raise BadRequest(f"no whole body within {_BODY_SECONDS:.0f} seconds", status=408) from None
        return bytes(found)

    # --- health, metrics, models, page --------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        told = {"status": "ok", "model": self.settings.model}
        fault = await run_in_threadpool(self._fault_of_workers)
        return JSONResponse(told) if fault is None else JSONResponse({**told, "status": "failed", "reason": fault}, 503)

    def _fault_of_workers(self) -> str | None:
        """Why nothing can be answered, if so. A tokenizer's process that has ended is started anew."""
        if not self.engine.alive:
            return "the thread that answers has ended"
        try:
            self.assistant.tokenizer.ready()
        except UserError as error:
            return error.message
        return None

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.model:
            raise BadRequest(f"this server has {self.settings.model}", status=404, code="model_not_found")
        return JSONResponse(self._model_entry())

    def _model_entry(self) -> dict[str, Any]:
        made = self.settings.created
        return {"id": self.settings.model, "object": "model", "created": made, "owned_by": "moec"}

    async def _page(self, _: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = resources.files("moec.assistant.server").joinpath("page.html").read_text("utf-8")
        headers = {"Content-Security-Policy": _PAGE_POLICY.format(nonce), "Referrer-Policy": "no-referrer"}
        return HTMLResponse(text.replace("NONCE", nonce), headers=headers)

    # --- answers ------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        raw = await self._body(request)

        def prepared() -> tuple[ChatBody, Any]:
            body = parsed(raw, ChatBody, self.settings.model)
            limits = body.limits(self.assistant.sampling, body.most, body.top_scores, self.settings.context_full)
            format = body.format()
            must_call, only = body.must_call()
            if body.reasoning_effort is not None and not self.assistant.reads("reasoning_effort"):
                raise BadRequest("the model's chat template reads no reasoning_effort", param="reasoning_effort")
            given: dict[str, Any] = {"tools": body.offered_tools(), "variables": body.variables()}
            if limits.drops:
                prompt = self.assistant.fitting_prompt(body.messages, self.engine.context, **given)
            else:
                prompt = self.assistant.chat_prompt(body.messages, **given)
            prompt = replace(prompt, one_call=body.parallel_tool_calls is False)
            if must_call:
                format = self.assistant.must_call(prompt, only, several=not prompt.one_call)
            return body, self._job(prompt, limits, format)

        body, job = await self._prepared(prepared)
        base: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.settings.model,
        }
        self.engine.submit(job)
        if body.stream:
            return await self._streamed(
                request, job, _ChatStream(self, base, logprobs=bool(body.logprobs)), body.include_usage
            )
        answer, _ = await self._whole(request, job)
        choice: dict[str, Any] = {
            "index": 0,
            "message": message(answer, base["id"][-12:]),
            "finish_reason": finish_reason(answer),
            "logprobs": await run_in_threadpool(self.texts.chat, answer.scores) if body.logprobs else None,
        }
        return JSONResponse({"object": "chat.completion", **base, "choices": [choice], "usage": usage([answer])})

    async def _completions(self, request: Request) -> Response:
        raw = await self._body(request)

        def prepared() -> tuple[CompletionBody, list[Any]]:
            body = parsed(raw, CompletionBody, self.settings.model)
            if not 0 < len(body.prompts) <= _MOST_PROMPTS:
                raise BadRequest(f"{len(body.prompts)} prompts; give 1 to {_MOST_PROMPTS}", param="prompt")
            if body.stream and (len(body.prompts) > 1 or body.echo):
                raise BadRequest("a stream takes one prompt and no echo", param="stream")
            limits = body.limits(self.assistant.sampling, body.most, body.logprobs, self.settings.context_full)
            format = body.format()
            top = body.logprobs if body.echo and body.logprobs is not None else None
            jobs = []
            for given in body.prompts:
                # nothing of a text is shared: a prefix cache keeps system prompts, and would give them up for texts
                ids = self.assistant.text_prompt(given, "prompt").ids if isinstance(given, str) else list(given)
                jobs.append(self._job(Prompt(ids), limits, format, top))
            return body, jobs

        body, jobs = await self._prepared(prepared)
        base: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.settings.model,
        }
        if body.stream:
            self.engine.submit(jobs[0])
            stream = _TextStream(self, base, logprobs=body.logprobs is not None)
            return await self._streamed(request, jobs[0], stream, body.include_usage)
        answers, choices = [], []
        for index, job in enumerate(jobs):
            self.engine.submit(job)
            answer, scores = await self._whole(request, job)
            answers.append(answer)
            choices.append(await run_in_threadpool(self._choice, index, body, job, answer, scores))
        return JSONResponse({"object": "text_completion", **base, "choices": choices, "usage": usage(answers)})

    def _choice(
        self, index: int, body: CompletionBody, job: Job, answer: Answer, scores: list[TokenScore]
    ) -> dict[str, Any]:
        before = self.assistant.tokenizer.decode(job.prompt.ids) if body.echo else ""
        logprobs = None
        if body.logprobs is not None:
            every: list[TokenScore | None] = [*([None, *scores] if body.echo else []), *answer.scores]
            tokens = [*(job.prompt.ids if body.echo else []), *answer.ids]
            logprobs = self.texts.completion(every, tokens)
        reason = finish_reason(answer)
        return {"index": index, "text": before + answer.text, "finish_reason": reason, "logprobs": logprobs}

    async def _prepared(self, make: Callable[[], Any]) -> Any:
        """What `make` returns; it tokenizes and renders, and so runs in a thread. BadRequest."""
        try:
            return await run_in_threadpool(make)
        except RunError as error:
            raise refused(error) from None
        except UserError as error:  # the chat template fails on these messages
            raise BadRequest(error.message, status=500, code="model_error") from None

    def _job(self, prompt: Prompt, limits: Limits, format: Any, score_prompt: int | None = None) -> Job:
        context = self.engine.context
        if len(prompt.ids) > context and (not limits.drops or score_prompt is not None):
            what = f"the prompt has {len(prompt.ids)} tokens, the context holds {context}"
            raise BadRequest(what, code="context_length_exceeded")
        if not prompt.ids:
            raise BadRequest("the prompt has no tokens", param="prompt")
        return Job(prompt, limits, format, score_prompt)

    async def _events(self, request: Request, job: Job) -> AsyncGenerator[Scores | Step | Ended, None]:
        """The events of a job, which is cancelled when its client disconnects (ClientDisconnect) or this is closed."""
        left = asyncio.ensure_future(_disconnected(request))
        left.add_done_callback(lambda _: self.engine.cancel(job))  # also while nobody iterates
        first, ended = True, False
        try:
            while True:
                next_event = asyncio.ensure_future(job.event())
                await asyncio.wait({next_event, left}, return_when=asyncio.FIRST_COMPLETED)
                if not next_event.done():
                    next_event.cancel()
                    raise ClientDisconnect
                found = next_event.result()
                if first and isinstance(found, Step):
                    first = False
                    self.metrics.add("moec_first_token_seconds_sum", time.monotonic() - job.asked)
                    self.metrics.add("moec_first_token_seconds_count")
                if isinstance(found, Ended):
                    ended = True
                    self._count(job, found.answer)
                yield found
                if isinstance(found, Ended):
                    return
        finally:
            left.cancel()
            self.engine.cancel(job)
            if not ended:
                self.metrics.add("moec_cancelled_total")

    def _count(self, job: Job, answer: Answer | None) -> None:
        if answer is None:
            return
        self.metrics.add("moec_prompt_tokens_total", answer.stats.prompt_tokens)
        self.metrics.add("moec_reused_tokens_total", answer.stats.reused_tokens)
        self.metrics.add("moec_generated_tokens_total", answer.stats.new_tokens)
        self.metrics.add("moec_answer_seconds_sum", time.monotonic() - job.asked)
        self.metrics.add("moec_answer_seconds_count")

    async def _whole(self, request: Request, job: Job) -> tuple[Answer, list[TokenScore]]:
        scores: list[TokenScore] = []
        async with contextlib.aclosing(self._events(request, job)) as events:
            async for found in events:
                if isinstance(found, Scores):
                    scores = list(found.scores)
                elif isinstance(found, Ended):
                    if found.error is not None or found.answer is None:
                        raise _fault(found)
                    return found.answer, scores
        raise AssertionError("a job ends with Ended")

    async def _streamed(self, request: Request, job: Job, shape: _Stream, with_usage: bool) -> Response:
        """A stream whose HTTP status waits for the first event, so that a faulty request gets an error status."""
        events = self._events(request, job)
        first = await anext(events)
        if isinstance(first, Ended) and (first.error is not None or first.answer is None):
            await events.aclose()
            raise _fault(first)

        async def chunks() -> AsyncIterator[bytes]:
            try:
                found: Scores | Step | Ended = first
                while True:
                    if isinstance(found, Step):
                        for part in await run_in_threadpool(shape.parts, found):
                            yield event(part)
                    elif isinstance(found, Ended):
                        if found.error is not None or found.answer is None:
                            error = _fault(found)
                            yield event(error_body(error.message, "server_error", code=error.code))
                            return
                        yield event(shape.last(found.answer))
                        if with_usage:
                            yield event({**shape.base, "choices": [], "usage": usage([found.answer])})
                        yield DONE
                        return
                    found = await anext(events)
            except ClientDisconnect:
                pass
            finally:
                await events.aclose()

        return StreamingResponse(chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


class _Stream:
    """The events of one answer; a subclass for each endpoint. base: the fields that all of them have."""

    def __init__(self, server: Server, base: dict[str, Any], *, logprobs: bool) -> None:
        self._server, self._logprobs = server, logprobs
        self.base = base

    def parts(self, step: Step) -> list[dict[str, Any]]:
        raise NotImplementedError  # abstract

    def last(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError  # abstract


class _ChatStream(_Stream):
    def __init__(self, server: Server, base: dict[str, Any], *, logprobs: bool) -> None:
        super().__init__(server, {"object": "chat.completion.chunk", **base}, logprobs=logprobs)
        self._calls = 0
        self._begun = False

    def parts(self, step: Step) -> list[dict[str, Any]]:
        found = []
        if not self._begun:
            self._begun = True
            found.append(self._part({"role": "assistant", "content": ""}))
        for piece in step.pieces:
            if piece.call is not None:
                calls = tool_calls([piece.call], self.base["id"][-12:], first=self._calls, indexed=True)
                self._calls += 1
                found.append(self._part({"tool_calls": calls}))
            elif piece.text:
                found.append(self._part({"content" if piece.kind == "text" else "reasoning_content": piece.text}))
        if self._logprobs and step.scores:
            if len(found) == 0 or "role" in found[-1]["choices"][0]["delta"]:
                found.append(self._part({"content": ""}))
            found[-1]["choices"][0]["logprobs"] = self._server.texts.chat(step.scores)
        return found

    def last(self, answer: Answer) -> dict[str, Any]:
        return self._part({} if self._begun else {"role": "assistant", "content": ""}, finish_reason(answer))

    def _part(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**self.base, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}


class _TextStream(_Stream):
    def __init__(self, server: Server, base: dict[str, Any], *, logprobs: bool) -> None:
        super().__init__(server, {"object": "text_completion", **base}, logprobs=logprobs)
        self._length = 0

    def parts(self, step: Step) -> list[dict[str, Any]]:
        text = "".join(piece.text for piece in step.pieces)
        logprobs = None
        if self._logprobs and step.scores:
            logprobs = self._server.texts.completion(step.scores, [s.token for s in step.scores], self._length)
        self._length += len(text)
        return [self._part(text, logprobs)] if text or logprobs else []

    def last(self, answer: Answer) -> dict[str, Any]:
        return self._part("", None, finish_reason(answer))

    def _part(self, text: str, logprobs: Any, reason: str | None = None) -> dict[str, Any]:
        return {**self.base, "choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}]}


def _fault(ended: Ended) -> BadRequest:
    if isinstance(ended.error, LostFileError):
        return BadRequest(ended.error.message, status=500, code="model_error")
    if isinstance(ended.error, RunError):
        return refused(ended.error)
    if ended.error is None:
        return BadRequest("the server is shutting down", status=503, code="stopping")
    return BadRequest("the model failed; the server's log says why", status=500, code="model_error")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _route(request: Request) -> str:
    return "/v1/models" if request.url.path.startswith("/v1/models") else request.url.path
