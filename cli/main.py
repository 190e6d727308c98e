"""The command `moec`: one module per command, which imports what is slow to import only when the command runs.

Exit status: 0 done, 1 a check failed, 2 the user's fault (one line on stderr), 70 our bug (traceback), 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import importlib
import inspect
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from moec.cli.status import BUG, INTERRUPTED, TERMINATED, USER_ERROR
from moec.compiler.cores import cores_are_shared, wait_without_spinning
from moec.compiler.errors import UserError
from moec.compiler.units import printable

app = typer.Typer(
    name="moec",
    help="Compile Mixture-of-Experts language models into INT4 artifacts that run on phones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _register_commands() -> None:
    """Every module `*_cmd.py` of this folder brings its commands: a new command is a new file."""
    for file in sorted(Path(__file__).parent.glob("*_cmd.py")):
        importlib.import_module(f"moec.cli.{file.stem}").register(app)


def _join_lines(commands: typer.Typer) -> None:
    """Make each paragraph of a command's help one line: typer would keep the line ends of its docstring."""
    for command in commands.registered_commands:
        text = inspect.cleandoc((command.callback and command.callback.__doc__) or "")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _join_lines(group.typer_instance)


_register_commands()
_join_lines(app)


def _version(asked: bool) -> None:
    if asked:
        from moec import __version__

        print(f"moec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.unraisablehook = _send_again
    # Graphs are millions of objects that stay: at Python's threshold of 700 a tenth of a compile looks through them.
    gc.set_threshold(50_000, 20, 20)
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status, with every fault already printed to stderr."""
    _hush()
    _open_streams()
    wait_without_spinning(os.environ, shared=cores_are_shared())
    try:
        # in a context of its own: what one command was told to trust is not trusted by the next
        status = contextvars.copy_context().run(_invoke, arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        _say(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except MemoryError:
        return _out_of_memory()
    except BrokenPipeError:  # the reader of our output has gone, as with `moec ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno is None:
            return _bug()
        place = f"{error.filename}: " if error.filename is not None else ""
        _say(f"{place}{error.strerror or error}")
        return USER_ERROR
    except Exception as error:
        stopped = _status_of_signal(error)
        if stopped is None:
            return _out_of_memory() if _is_out_of_memory(error) else _bug()
        _say("interrupted")
        return stopped


@cache
def command() -> Any:
    """The tree of commands and options; building it takes a fifth of a second, which one process spends once."""
    return typer.main.get_command(app)


def _invoke(arguments: list[str] | None) -> int:
    try:
        result: Any = command().main(args=arguments, prog_name="moec", standalone_mode=False)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer turns it into the status of a failed check
            raise stop.__context__ from None
        raise
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.Exit as stop:
        return stop.exit_code
    except _USAGE as error:
        context = getattr(error, "ctx", None)
        name = context.command_path if context is not None else "moec"
        _say(" ".join(error.format_message().split()).rstrip(".") + f"; see `{name} --help`")  # type: ignore[attr-defined]
        return USER_ERROR
    if result == INTERRUPTED:  # typer's own reading of Ctrl-C, in some versions
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


# typer carries its own copy of click in some versions and uses the package in others; both have this base class
_USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _hush() -> None:
    """Libraries warn about themselves, which no user of a command can act on. `python -W default` shows it."""
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    for name in ("torch", "torch.utils._pytree", "torchao", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # logs what it then raises, which is caught and said in one line; levels are set anew when torch is imported
    logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda _: False)


class _Terminated(SystemExit):
    """SIGTERM came: an exception, so that temporary folders are removed on the way out."""


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated(TERMINATED)


def _send_again(lost: Any) -> None:
    """A signal's exception that arose in a destructor or a weak reference's callback, where Python drops it.

    The signal is sent once more after a moment: now it would be dropped again.
    """
    status = _status_of(lost.exc_value)  # not of what was being handled meanwhile: that is on its way
    if status is None:
        sys.__unraisablehook__(lost)
        return
    # a status is 128 + the signal's number, as shells say; sent to the main thread, it ends a wait there, too
    again = threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, status - 128))
    again.daemon = True
    again.start()


def _status_of(error: BaseException | None) -> int | None:
    """The exit status of a signal's exception; None for any other."""
    if isinstance(error, _Terminated):
        return TERMINATED
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else None


def _status_of_signal(error: BaseException) -> int | None:
    """The exit status if a library caught the exception of a signal and raised its own, as torch.export does."""
    seen: BaseException | None = error
    while seen is not None:
        if (status := _status_of(seen)) is not None:
            return status
        seen = seen.__cause__ or seen.__context__
    return None


def _open_streams() -> None:
    """A stream that was closed before we began (`>&-`) is None: it is replaced by /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for the rest of the process)


def _say(text: str) -> None:
    live = sys.stderr.isatty()
    try:
        print(("\r\x1b[2K" if live else "") + printable(text), file=sys.stderr, flush=True)
    except OSError:
        # stderr may be closed: the exit status still says it; Python's own for text that stays unwritten would be 120
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _is_out_of_memory(error: BaseException) -> bool:
    """torch and native libraries word it differently; exceptions that were caught on the way are looked at as well."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or re.search(
            r"can't allocate memory|not enough memory|out of memory|std::bad_alloc|Cannot allocate memory", str(seen)
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _out_of_memory() -> int:
    _say("out of memory; close other programs, or use a smaller model, context or batch")
    return USER_ERROR


def _bug() -> int:
    traceback.print_exc()
    _say("this is a bug of moec, not of your input; please report the lines above")
    return BUG


if __name__ == "__main__":
    main()
