"""Where the tasks of `moec eval` come from: corpora, folders of YAML, and the harness's own with data on this machine.

A folder that somebody made is data: its YAML may name no function, no metric that would have to be loaded, and no other
file, unless code is trusted; its templates run in jinja's sandbox. Tasks that come with the harness are installed code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moec.compiler.errors import UserError
from moec.compiler.files import read_text
from moec.compiler.trust import require_trust

_MAX_BYTES = 4 << 20  # of a task's YAML
_MAX_NODES = 200_000
_PLAIN = "tag:yaml.org,2002:"


class EvaluationError(UserError):
    """A task is unknown or damaged, or the model cannot serve it."""


def check_tasks(folder: Path) -> None:
    """TrustError for a folder whose tasks would run code; EvaluationError for YAML that cannot be read."""
    for file in sorted(folder.glob("*.yaml")):
        text = read_text(file, limit=_MAX_BYTES, fault=EvaluationError)
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise EvaluationError(f"not YAML: {reason}", place=str(file)) from None
        if root is None:
            continue
        for node in _nodes(root, file):
            if not node.tag.startswith(_PLAIN) or node.tag.startswith(f"{_PLAIN}python"):
                require_trust(f"this task runs code: {node.tag} {_shown(node)}", place=str(file))
        _check_keys(root, file)


def _nodes(root: yaml.Node, file: Path) -> Iterator[yaml.Node]:
    waiting, seen = [root], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > _MAX_NODES:
            raise EvaluationError(f"more than {_MAX_NODES} values", place=str(file))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _shown(node: yaml.Node) -> str:
    return str(node.value)[:80] if isinstance(node, yaml.ScalarNode) else ""


def _check_keys(root: yaml.Node, file: Path) -> None:
    """`include`, `class` and metrics, each of which can bring in code that stands elsewhere."""
    if not isinstance(root, yaml.MappingNode):
        return
    for key, value in root.value:
        name = str(key.value)
        if name == "include":
            for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                other = str(item.value)
                if Path(other).name != other or not other.endswith(".yaml") or not (file.parent / other).is_file():
                    require_trust(f"this task includes {other[:80]!r}, which is not checked", place=str(file))
        elif name == "class":
            require_trust("this task is a class, whose code runs", place=str(file))
        elif name == "metric_list":
            for item in value.value if isinstance(value, yaml.SequenceNode) else []:
                _check_metric(item, file)


def _check_metric(item: yaml.Node, file: Path) -> None:
    from lm_eval.api import registry

    if not isinstance(item, yaml.MappingNode):
        return
    given = {str(key.value): str(value.value) for key, value in item.value if isinstance(value, yaml.ScalarNode)}
    name = given.get("metric", "")
    if "hf_evaluate" in given or name not in registry.METRIC_REGISTRY:
        require_trust(f"metric {name[:80]!r} is loaded as code", place=str(file))


@contextlib.contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Templates of tasks in jinja's sandbox: those of a corpus may come from an enemy, and the rest do not notice."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    made = ImmutableSandboxedEnvironment(
        loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
    )
    made.filters |= before.filters
    utils.env = made
    try:
        yield
    finally:
        utils.env = before


@functools.cache
def _harness_index() -> Mapping[str, Any]:
    """The harness's own tasks. It reads 14,000 files for it: once, and only for a name not among the user's tasks."""
    from lm_eval.tasks import TaskManager

    found: Mapping[str, Any] = TaskManager().task_index
    return found


def harness_tasks(names: Sequence[str], data: Mapping[str, Path], out: Path) -> bool:
    """Write tasks of the harness into `out`, each including the harness's own file, with its data where it lies here.

    data: a folder of files for a task (train, validation, test as .jsonl, .parquet or .csv, or a copied data set).
    Whether any of them needs a data set of the user's cache. EvaluationError for a name that the harness lacks.
    """
    index = _harness_index()
    cached = False
    for name in names:
        entry = index.get(name)
        if entry is None or entry.yaml_path is None:
            remedy = "name tasks of the harness, of `shipped_text`, or of a corpus given by --include"
            raise EvaluationError(f"no task {name!r}", remedy=remedy)
        if entry.kind.name != "TASK":
            members = sorted(n for n, e in index.items() if name in e.tags)
            raise EvaluationError(f"{name!r} is a group of tasks", remedy=f"name its tasks: {', '.join(members[:8])}")
        task: dict[str, Any] = {"include": str(entry.yaml_path), "task": name}
        folder = data.get(name)
        if folder is None:
            cached = True
        elif not folder.is_dir():
            raise EvaluationError("no such folder", place=str(folder), remedy="give --data NAME=FOLDER")
        else:
            task["dataset_path"] = str(folder.resolve())
            if not (folder / "README.md").is_file():  # which names the configurations of a copied data set
                task["dataset_name"] = None
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task), "utf-8")
    return cached
