"""`moec chat`: a conversation with an artifact on a terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.asking import (
    ChatTemplateFile,
    ContextFullOption,
    Draft,
    Grammar,
    JsonSchema,
    KeepFirst,
    PrefixFolder,
    PrefixName,
    Regex,
    Threads,
    context_full_of,
    format_of,
    prefixes_in,
    show,
    told_of_dropping,
)
from moec.cli.memory import CacheAware, MemoryMb, warn_of_preference
from moec.cli.sampling import (
    LogitBias,
    MinP,
    PresencePenalty,
    RepeatPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    sampling_of,
)
from moec.cli.trust import Trust
from moec.compiler.errors import UserError

if TYPE_CHECKING:
    from moec.assistant.answer import Answer, Limits
    from moec.assistant.conversation import Conversation
    from moec.assistant.structured import Format

HELP = """\
/help            this list                  /system TEXT   another system prompt; without TEXT none
/clear           forget every turn          /undo          forget the last question and its answer
/retry           ask the last question anew /history       the conversation so far
/save FILE       write it as JSON           /load FILE     continue one that was saved
/stats           tokens and rates of the last answer       /quit          leave, as Ctrl-D does
A line that ends in \\ goes on in the next. Ctrl-C stops an answer; what was said until then stays."""


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that `moec compile` wrote.")],
    system: Annotated[str | None, typer.Option(help="The system prompt; default: the template's own.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop an answer after this many tokens; default: when the context is full, "
            "or after as many as it holds.",
        ),
    ] = None,
    load_file: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Continue a conversation that /save wrote.")
    ] = None,
    drop_oldest: Annotated[
        bool,
        typer.Option("--drop-oldest", help="Drop the oldest turns for a question without room; default: an error."),
    ] = False,
    context_full: ContextFullOption = "error",
    keep_first: KeepFirst = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    presence_penalty: PresencePenalty = None,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    threads: Threads = None,
    memory_mb: MemoryMb = None,
    cache_aware: CacheAware = None,
    draft: Draft = None,
    prefix_cache: PrefixFolder = None,
    prefix: PrefixName = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; default: the artifact's.")] = None,
    chat_template: ChatTemplateFile = None,
    trust: Trust = False,
) -> None:
    """Talk with a model, turn by turn; /help says what else can be typed. Without a terminal each line is a question.

    Example: [bold]moec chat build/s --system "Answer in one sentence." --temperature 0.7[/bold]
    """
    from moec.assistant.answer import Limits
    from moec.assistant.assistant import Assistant
    from moec.assistant.conversation import Conversation
    from moec.assistant.load import load_draft, load_session
    from moec.compiler.artifact import Artifact

    sampling = sampling_of(
        artifact,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        logit_bias=logit_bias,
        seed=seed,
    )
    policy = context_full_of(context_full, keep_first)
    limits = Limits(sampling, max_new_tokens, stop or (), context_full=policy, keep_first=keep_first)
    format = format_of(json_schema, regex, grammar)
    opened = Artifact.open(artifact).with_threads(threads).within(memory_mb, cache_aware)
    warn_of_preference(opened)
    assistant = Assistant.of(opened, tokenizer=tokenizer, chat_template=chat_template)
    # a template that is missing or faulty fails now, not at the first question
    assistant.chat_prompt([{"role": "user", "content": "?"}])
    assistant.prefixes = prefixes_in(prefix_cache, opened, prefix)
    session = load_session(opened)
    helper = None
    try:
        if draft is not None:
            helper = load_draft(draft, opened, session, trust=trust)
            limits = replace(limits, draft=helper)
        drops = drop_oldest or limits.drops
        conversation = Conversation(assistant, session, system=system, drop_oldest=drops, prefix=prefix)
        if load_file is not None:
            conversation.load(load_file)
        terminal = sys.stdin.isatty()
        if terminal:
            print(f"{opened.manifest.name}: {sampling.words()}; /help lists commands", file=sys.stderr)
        talk = _Talk(conversation, limits, format)
        with _line_editing() if terminal else contextlib.nullcontext():
            for line in _lines("> " if terminal else ""):
                if not talk.take(line):
                    break
    finally:
        session.close()
        if helper is not None:
            helper.close()


class _Talk:
    """A conversation, and the commands typed in it, line by line."""

    def __init__(self, conversation: Conversation, limits: Limits, format: Format | None) -> None:
        self._conversation, self._limits, self._format = conversation, limits, format
        self._last: Answer | None = None
        self._commands = {
            "/help": lambda _: _say(HELP),
            "/system": conversation.set_system,
            "/clear": lambda _: conversation.clear(),
            "/undo": lambda _: self._undo(),
            "/retry": lambda _: self._retry(),
            "/history": lambda _: self._history(),
            "/save": self._save,
            "/load": self._load,
            "/stats": lambda _: self._stats(),
        }

    def take(self, line: str) -> bool:
        """Answer a question or execute a command; False ends the conversation. A UserError is printed, no more.

        Ctrl-C ends what is done, and the conversation is as it was, or holds what was said until then.
        """
        try:
            if not line.startswith("/"):
                self._ask(line)
                return True
            name, _, rest = line.partition(" ")
            if name in ("/quit", "/exit"):
                return False
            if name not in self._commands:
                raise UserError(f"no command {name}", remedy="/help lists them")
            self._commands[name](rest.strip())
        except UserError as error:
            _say(str(error))
        except KeyboardInterrupt:
            _say("\nstopped; /quit or Ctrl-D leaves")
        return True

    def _ask(self, text: str) -> None:
        if not text.strip():
            return
        before = list(self._conversation.messages)
        try:
            with _Stoppable() as stoppable:
                # Ctrl-C while a template is rendered, a text encoded or a format compiled leaves no answer to end
                stoppable.answer = answer = self._conversation.ask(text, self._limits, self._format)
                if self._conversation.dropped:
                    _say(f"the context is full: the oldest {self._conversation.dropped} messages were dropped")
                _print(answer)
                self._conversation.keep(answer)
        except BaseException:
            self._conversation.messages = before
            raise
        self._last = answer
        if told := told_of_dropping(answer.stats):
            _say(told)
        if answer.stats.stopped not in ("stop token", "stop string", "complete"):
            _say(f"stopped by {answer.stats.stopped}")
        answer.check_finished()

    def _undo(self) -> None:
        if self._conversation.undo() is None:
            raise UserError("there is no question")

    def _retry(self) -> None:
        before = list(self._conversation.messages)
        question = self._conversation.undo()
        if question is None:
            raise UserError("there is no question")
        try:
            self._ask(question)
        except BaseException:
            self._conversation.messages = before
            raise

    def _history(self) -> None:
        for message in self._conversation.messages:
            show(f"{message['role']}: {message['content']}\n")

    def _save(self, name: str) -> None:
        from moec.cli.output import write_text

        if not name:
            raise UserError("/save needs a file", remedy="write /save FILE")
        write_text(Path(name).expanduser(), self._conversation.save())
        _say(f"{name}: {len(self._conversation.messages)} messages")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load needs a file", remedy="write /load FILE")
        self._conversation.load(Path(name).expanduser())
        _say(f"{name}: {len(self._conversation.messages)} messages")

    def _stats(self) -> None:
        if self._last is None:
            raise UserError("nothing was answered yet")
        stats = self._last.stats
        _say(
            f"prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them kept from before, "
            f"{stats.prefill_rate:.1f} tok/s; answer {stats.new_tokens} tokens, {stats.decode_rate:.1f} tok/s"
        )


class _Stoppable:
    """While it is entered Ctrl-C ends `answer` and nothing else; before there is one it is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.answer: Answer | None = None

    def __enter__(self) -> _Stoppable:
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        if self.answer is None:
            raise KeyboardInterrupt
        self.answer.cancel()


def _print(answer: Answer) -> None:
    """Print an answer as it comes."""
    thinking = False
    try:
        for step in answer.steps():
            for piece in step.pieces:
                if piece.kind == "thinking":
                    show(piece.text, sys.stderr)
                    thinking = True
                elif piece.kind == "text":
                    if thinking:
                        print(file=sys.stderr, flush=True)
                    thinking = False
                    show(piece.text)
    finally:
        print(flush=True)


def _lines(prompt: str) -> Iterator[str]:
    """Lines of input, joined where one ends in a backslash; Ctrl-C discards a line, the end of the input ends them."""
    begun: list[str] = []
    while True:
        try:
            line = input(("... " if begun else prompt) if prompt else "")
        except EOFError:
            if prompt:
                print(file=sys.stderr)
            if begun:
                yield "\n".join(begun)
            return
        except UnicodeDecodeError:
            _say("what was typed is not UTF-8")
            continue
        except KeyboardInterrupt:
            if not prompt:
                raise
            begun = []
            _say("\n/quit or Ctrl-D leaves")
            continue
        if line.endswith("\\"):
            begun.append(line[:-1])
            continue
        yield "\n".join([*begun, line])
        begun = []


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Line editing, with the lines of earlier conversations as history, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    file = Path(base) / "moec" / "chat-history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)  # conversations are private


def _say(text: str) -> None:
    show(text + "\n", sys.stderr)
