"""`moec eval`: lm-evaluation-harness on a checkpoint, on one rounded as its artifact will be, or on an artifact.

The harness tokenizes through the model's own `tokenizer.json` and sees one interface; behind it are the training
model (in batches) or an artifact's session (with its KV cache). Everything runs offline: tasks are YAML files with JSON
lines beside them, as `moec data build` writes them, and the tasks that come with moec.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from moec.compiler.artifact import MANIFEST
from moec.compiler.errors import MissingExtra, UserError
from moec.compiler.progress import Progress
from moec.training.data.tasks import FOLDER as TASKS
from moec.training.evaluate_tasks import EvaluationError, check_tasks, harness_tasks, sandboxed_templates

if TYPE_CHECKING:
    from moec.training.evaluate_models import Model

_CONFIG = "config.json"


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include: Sequence[str | Path] = (),
    data: Mapping[str, Path] | None = None,
    limit: int | None = None,
    simulate: bool = False,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run `tasks` on a checkpoint or artifact folder; the harness's results by task, plain values.

    include: folders with tasks: corpora, or folders of YAML files, which run no code unless it is trusted. Tasks that
    come with the harness, such as arc_easy, find their data in `data`, by task, or in the datasets library's cache.
    limit: questions of each task. simulate: compute a checkpoint with the rounding of the artifact made of it (weights,
    activations, KV cache). Returns {"model", "form", "results": {task: {metric: value, metric_stderr: value}},
    "questions": {task: count}, "harness"}.
    """
    progress = progress or Progress(quiet=True)
    if limit is not None and limit < 1:
        raise EvaluationError(f"a limit of {limit} questions", remedy="use 1 or above")
    harness = _harness()
    folders = [_task_folder(Path(folder)) for folder in include]
    for folder in folders:
        check_tasks(folder)
    wrong = sorted(set(data or {}) - set(tasks))
    if wrong or not tasks:
        what = f"--data is for {wrong[0]!r}, which is not among the tasks" if wrong else "no task was asked for"
        raise EvaluationError(what, remedy="name it in --tasks")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory())
        opened, words, form = stack.enter_context(_opened(Path(model), simulate, tokenizer))
        from moec.training.evaluate_models import HarnessModel

        shipped = Path(scratch, "shipped")
        _shipped_tasks(shipped)
        merged = Path(scratch, "tasks")
        _merge(merged, [shipped, *folders])
        own = {*list_tasks(include)}
        foreign = [name for name in tasks if name not in own]
        cached = harness_tasks(foreign, data or {}, merged) if foreign else False
        named = (*include, *((data or {}).values()), *(foreign if cached else ()))
        stack.enter_context(_quiet(keep_cache=cached))
        stack.enter_context(sandboxed_templates())
        with _task_faults(named):
            manager = harness.tasks.TaskManager(include_path=str(merged), include_defaults=False)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise EvaluationError(f"no task {unknown[0]!r}", remedy=f"there are {', '.join(manager.all_tasks)}")
        stage = progress.stage(f"evaluate {', '.join(tasks)} on {Path(model).name}")
        with contextlib.chdir(merged), _task_faults(named), stage:
            raw = harness.simple_evaluate(
                model=HarnessModel(opened, words),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
            )
    return {
        "model": str(model),
        "form": form,
        "harness": harness.__version__,
        "questions": {name: counts["effective"] for name, counts in raw["n-samples"].items()},
        "results": {name: _plain(values) for name, values in raw["results"].items()},
    }


@contextlib.contextmanager
def _task_faults(include: Sequence[str | Path]) -> Iterator[None]:
    """What a task file of the user asks for and cannot have; a fault without such files is ours.

    The harness and the library that reads its data say it by exceptions of every kind.
    """
    from jinja2 import TemplateError

    try:
        yield
    except UserError:
        raise
    except (
        TemplateError,
        ConnectionError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
    ) as error:
        if not include:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = ", ".join(map(str, include))
        remedy = "its data must be files beside its YAML, given by --data, or in the datasets cache"
        raise EvaluationError(f"a task cannot be used: {reason}", place=place, remedy=remedy) from error


def list_tasks(include: Sequence[str | Path]) -> list[str]:
    """The names of all tasks that `evaluate` would find."""
    names = ["shipped_text"]
    for folder in include:
        names += sorted(file.stem for file in _task_folder(Path(folder)).glob("*.yaml"))
    return names


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}` without filters' names and what is no number."""
    found = {}
    for key, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "sample_len":
            found[key.removesuffix(",none")] = float(value)
    return found


def _harness() -> Any:
    """The library; it must not look anything up, and its data sets must not outlive the call."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError:
        raise MissingExtra("lm-evaluation-harness is not installed", remedy="pip install 'moec[eval]'") from None
    return lm_eval


@contextlib.contextmanager
def _quiet(*, keep_cache: bool = False) -> Iterator[None]:
    """Data sets in a folder of the call (or the user's cache), no bars or advice on the terminal, no survey."""
    import datasets
    from lm_eval import evaluator

    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    before = datasets.config.HF_DATASETS_CACHE
    # the harness asks git and torch about the machine for its log, which takes seconds and writes to the terminal
    surveys = {name: getattr(evaluator, name) for name in ("get_git_commit_hash", "add_env_info")}
    with TemporaryDirectory() as cache:
        if not keep_cache:
            datasets.config.HF_DATASETS_CACHE = Path(cache)
        datasets.disable_progress_bars()
        for name in surveys:
            setattr(evaluator, name, lambda *_: None)
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before
            datasets.enable_progress_bars()
            for name, survey in surveys.items():
                setattr(evaluator, name, survey)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


# --- models -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(folder: Path, simulate: bool, tokenizer: Path | None) -> Iterator[tuple[Model, Any, str]]:
    """The model, its tokenizer, and what it is: "artifact", "float" or "simulated"."""
    from moec.compiler.tokenizer import load_tokenizer
    from moec.training.evaluate_models import SessionModel, checkpoint_model

    words = load_tokenizer(tokenizer or folder / "tokenizer.json") if folder.is_dir() else None
    if (folder / MANIFEST).is_file():
        if simulate:
            raise EvaluationError("an artifact has its rounding already", place=str(folder), remedy="drop --simulate")
        from moec.compiler import build
        from moec.compiler.artifact import Artifact

        artifact = Artifact.open(folder)
        session = build.load(artifact.in_memory())
        try:
            yield SessionModel(session, artifact.manifest.model), words, "artifact"
        finally:
            session.close()
    elif (folder / _CONFIG).is_file():
        yield checkpoint_model(folder, simulate), words, "simulated" if simulate else "float"
    else:
        found = "neither an artifact nor a checkpoint" if folder.exists() else "no such folder"
        raise EvaluationError(found, place=str(folder), remedy="name a folder with manifest.json or config.json")


# --- tasks ------------------------------------------------------------------------------------------------------------


def _task_folder(folder: Path) -> Path:
    """A corpus's tasks, or the folder itself."""
    place = folder / TASKS if (folder / TASKS).is_dir() else folder
    if not any(place.glob("*.yaml")):
        raise EvaluationError("holds no tasks", place=str(folder), remedy="name a corpus or a folder of YAML tasks")
    return place


def _merge(out: Path, folders: Sequence[Path]) -> None:
    """Links to the files of all folders, so that the paths in every task are relative to one place."""
    out.mkdir()
    for folder in folders:
        for file in sorted(folder.iterdir()):
            link = out / file.name
            if link.exists():
                raise EvaluationError(f"two folders have a {file.name}", place=str(folder), remedy="name one of them")
            link.symlink_to(file.resolve())


def _shipped_tasks(out: Path) -> None:
    """`shipped_text`: the texts that verification uses, a small perplexity task that needs no corpus."""
    from moec.compiler.texts import prompts
    from moec.training.data.tasks import write_text_task

    out.mkdir()
    write_text_task(out, "shipped_text", list(prompts().values()))
