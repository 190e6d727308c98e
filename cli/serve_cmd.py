"""`moec serve`: OpenAI's HTTP interface in front of an artifact."""

from __future__ import annotations

import asyncio
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer

from moec.cli.asking import (
    ChatTemplateFile,
    ContextFullOption,
    PrefixFolder,
    PrefixName,
    Threads,
    context_full_of,
    prefixes_in,
    tools_in,
)
from moec.cli.memory import CacheAware, MemoryMb, warn_of_preference
from moec.cli.trust import Trust
from moec.compiler.errors import UserError


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    host: Annotated[
        str, typer.Option(help="The address to listen at; one other than loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    token: Annotated[
        str | None, typer.Option(help="What clients must send as Authorization: Bearer TOKEN; default: MOEC_TOKEN.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: the artifact's name.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered with 503.")] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Longer bodies are refused unread.")] = 8,
    conversations: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="Conversations whose caches are kept; default: 4, or 1 within a memory budget."
        ),
    ] = None,
    context_full: ContextFullOption = "error",
    prefix_cache: PrefixFolder = None,
    prefix: PrefixName = None,
    system: Annotated[
        str | None, typer.Option(help="With --prefix: the clients' system prompt, computed or restored at the start.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --prefix: the clients' tools, as OpenAI's JSON.")
    ] = None,
    threads: Threads = None,
    memory_mb: MemoryMb = None,
    cache_aware: CacheAware = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; default: the artifact's.")] = None,
    chat_template: ChatTemplateFile = None,
    trust: Trust = False,
) -> None:
    """Serve chat completions, completions and models, with a chat page at /, until Ctrl-C.

    Example: [bold]moec serve build/s --port 8080[/bold], and http://localhost:8080/v1 as the base URL of a client.
    """
    from moec.compiler.extras import require

    policy = context_full_of(context_full)
    if prefix is None and not (system is None and tools is None):
        raise UserError("--system and --tools tell what --prefix keeps", remedy="add --prefix-cache DIR --prefix NAME")
    for module in ("starlette", "uvicorn"):
        require(module, "serve", "moec serve")
    token = token if token is not None else os.environ.get("MOEC_TOKEN")
    if token is not None and (not token.isascii() or not token.isprintable() or token != token.strip() or not token):
        raise UserError("a token is of visible ASCII characters, with no space at its ends", place="--token")
    if token is None and not _is_loopback(host):
        raise UserError(f"{host} can be reached from other machines", place="--host", remedy="set a --token")

    import uvicorn

    from moec.assistant.assistant import Assistant
    from moec.assistant.load import load_session
    from moec.assistant.server.app import Server, Settings
    from moec.assistant.server.connections import Connection
    from moec.compiler.artifact import Artifact

    opened = Artifact.open(artifact).with_threads(threads).within(memory_mb, cache_aware)
    warn_of_preference(opened)
    assistant = Assistant.of(opened, tokenizer=tokenizer, chat_template=chat_template)
    assistant.prefixes = prefixes_in(prefix_cache, opened, prefix)
    session = load_session(opened)
    if prefix is not None:
        try:
            given_tools = None if tools is None else tools_in(tools)
            count, known = assistant.keep_beginning(session, prefix, system=system, tools=given_tools)
        except BaseException:
            session.close()
            raise
        print(f"prefix {prefix}: {count} tokens, {known} of them known", file=sys.stderr)
    created = int((opened.folder / "manifest.json").stat().st_mtime)
    kept = conversations if conversations is not None else 1 if getattr(opened.options(), "memory_mb", None) else 4
    settings = Settings(
        name or opened.manifest.name, token, queue, max_body_mb << 20, created, kept, host, context_full=policy
    )
    server = Server(assistant, session, settings)
    config = uvicorn.Config(
        server.app,
        host=host,
        port=port,
        http=Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
    )
    listening = uvicorn.Server(config)
    try:
        asyncio.run(_run(listening, f"{settings.model}, {assistant.sampling.words()}"))
    except KeyboardInterrupt:  # the usual way to end it
        pass
    finally:
        server.engine.stop()
        session.close()
    if not listening.started:
        raise UserError(f"cannot listen at {host}:{port}", remedy="choose another --port or --host")


async def _announced(server: Any, what: str) -> None:
    """Say where a server listens once it does."""
    while not server.started and not server.should_exit:
        await asyncio.sleep(0.02)
    for listening in getattr(server, "servers", []):
        for bound in listening.sockets:
            address, port = bound.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            print(f"{what} at http://{shown}:{port}", file=sys.stderr, flush=True)


async def _run(server: Any, what: str) -> None:
    saying = asyncio.ensure_future(_announced(server, what))
    try:
        await server.serve()
    finally:
        saying.cancel()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
