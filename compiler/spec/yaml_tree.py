"""Strict YAML: plain data with the line and column of every key and value, and a fault for every trap.

PyYAML follows YAML 1.1, editors YAML 1.2. Where both read the same, or only one reading can be meant (`1e-5`, text to
PyYAML), that reading is taken; where they differ (`yes`, `012`, `1:30`, `1_000`) the author is asked to say which.
Aliases and merge keys work within bounds; tags do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 256 * 1024  # a spec is about forty lines; PyYAML reads this much in a second
MAX_NODES = 20_000  # after aliases are expanded
MAX_DEPTH = 40


@dataclass(frozen=True, order=True)
class Mark:
    """A place in a file; both count from 1, columns in characters."""

    line: int
    column: int


@dataclass(frozen=True)
class YamlFault:
    mark: Mark
    path: tuple[str | int, ...]
    message: str


@dataclass
class Tree:
    """A value with its place; `keys` and `values` are by key of a mapping or by index of a list."""

    mark: Mark
    data: Any
    keys: dict[str | int, Mark] = field(default_factory=dict)
    values: dict[str | int, Tree] = field(default_factory=dict)


class YamlError(Exception):
    """The text is no YAML that we accept: one fault, since nothing after it can be trusted."""

    def __init__(self, mark: Mark, message: str) -> None:
        super().__init__(message)
        self.mark = mark
        self.message = message


class _Loader(yaml.SafeLoader):
    """Composes nodes only, remembering which of them had a tag written out, and bounds the depth."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.tagged: set[int] = set()
        self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(_mark(event.start_mark), f"nested more than {MAX_DEPTH} levels deep")
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and tag not in (None, "!"):
            self.tagged.add(id(node))
        return node


def _mark(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1) if mark is not None else Mark(1, 1)


def read_tree(text: str) -> tuple[Tree, list[YamlFault]]:
    """The tree of one YAML document and all faults in it; YamlError when the text is no YAML at all."""
    root, tagged = _compose(text)
    builder = _Builder(tagged)
    return builder.build(root, (), 0), builder.faults


def _compose(text: str) -> tuple[Node, set[int]]:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlError(Mark(1, 1), f"the file is larger than {MAX_BYTES // 1024} KiB")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem or error.context or "not YAML").split())
        raise YamlError(_mark(error.problem_mark or error.context_mark), problem) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position] if isinstance(error.position, int) else ""
        mark = Mark(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)
        raise YamlError(mark, "a character that YAML does not allow") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # bad escapes raise the latter two
        raise YamlError(Mark(1, 1), " ".join(str(error).split())) from None
    if root is None:
        raise YamlError(Mark(1, 1), "the file is empty")
    return root, loader.tagged


class _Builder:
    def __init__(self, tagged: set[int]) -> None:
        self._tagged = tagged
        self._open: list[int] = []
        self._count = 0
        self.faults: list[YamlFault] = []

    def _fault(self, mark: Mark, path: tuple[str | int, ...], message: str) -> None:
        self.faults.append(YamlFault(mark, path, message))

    def build(self, node: Node, path: tuple[str | int, ...], depth: int) -> Tree:
        mark = _mark(node.start_mark)
        self._count += 1
        if self._count > MAX_NODES:
            raise YamlError(mark, f"more than {MAX_NODES} values after its aliases are expanded")
        if depth > MAX_DEPTH:
            raise YamlError(mark, f"nested more than {MAX_DEPTH} levels deep")
        if id(node) in self._open:
            raise YamlError(mark, "an anchor that contains itself")
        if id(node) in self._tagged:
            self._fault(mark, path, "tags have no meaning in a spec; remove it")
        if isinstance(node, ScalarNode):
            return self._scalar(node, mark, path)
        self._open.append(id(node))
        tree = self._sequence(node, path, depth) if isinstance(node, SequenceNode) else self._mapping(node, path, depth)
        self._open.pop()
        return tree

    def _scalar(self, node: ScalarNode, mark: Mark, path: tuple[str | int, ...]) -> Tree:
        if node.style is not None:  # quoted or a block: always text
            return Tree(mark, node.value)
        value, trap = plain_value(node.value)
        if trap:
            self._fault(mark, path, trap)
        return Tree(mark, value)

    def _sequence(self, node: SequenceNode, path: tuple[str | int, ...], depth: int) -> Tree:
        items: dict[str | int, Tree] = {i: self.build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)}
        marks = {i: tree.mark for i, tree in items.items()}
        return Tree(_mark(node.start_mark), [tree.data for tree in items.values()], marks, items)

    def _mapping(self, node: Node, path: tuple[str | int, ...], depth: int) -> Tree:
        tree = Tree(_mark(node.start_mark), {})
        merged: list[Node] = []
        for key_node, value_node in node.value:
            key_mark = _mark(key_node.start_mark)
            if not isinstance(key_node, ScalarNode):
                self._fault(key_mark, path, "a key must be plain text")
                continue
            key = key_node.value
            if key == "<<" and key_node.style is None:
                merged.append(value_node)
                continue
            if key in tree.keys:
                self._fault(key_mark, (*path, key), f"duplicate key; it is first given in line {tree.keys[key].line}")
                continue
            tree.keys[key] = key_mark
            tree.values[key] = self.build(value_node, (*path, key), depth + 1)
        for value_node in merged:
            self._merge(tree, value_node, path, depth)
        tree.data = {key: value.data for key, value in tree.values.items()}
        return tree

    def _merge(self, tree: Tree, node: Node, path: tuple[str | int, ...], depth: int) -> None:
        """`<<: *base` adds the keys of `base` that the mapping does not give itself; earlier bases win."""
        for base in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(base, MappingNode):
                self._fault(_mark(base.start_mark), path, "<< takes a mapping or a list of mappings")
                continue
            source = self.build(base, path, depth + 1)
            for key, value in source.values.items():
                if key not in tree.keys:
                    tree.keys[key], tree.values[key] = source.keys[key], value


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"], float("inf")),
    **dict.fromkeys(["-.inf", "-.Inf", "-.INF"], float("-inf")),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
}
_OTHER_BOOLEAN = {
    **{word: "true" for base in ("yes", "on") for word in (base, base.title(), base.upper())},
    **{word: "false" for base in ("no", "off") for word in (base, base.title(), base.upper())},
}
MAX_DIGITS = 30  # beyond any count or width, and far below what int() refuses


def plain_value(text: str) -> tuple[Any, str | None]:
    """What an unquoted scalar means, and the complaint if YAML 1.1 and 1.2 (or readers) differ about it."""
    if text in _SPECIAL:
        return _SPECIAL[text], None
    if text in _OTHER_BOOLEAN:
        meant = _OTHER_BOOLEAN[text]
        return meant == "true", f"{text} is a boolean to some YAML readers only; write {meant}, or '{text}' for text"
    if len(text) > MAX_DIGITS and re.fullmatch(r"[-+]?[0-9_.]+", text):
        return text, f"a number of more than {MAX_DIGITS} digits"
    if _INT.fullmatch(text):
        return int(text), None
    return next(_numbers(text), (text, None))


def _numbers(text: str) -> Iterator[tuple[Any, str | None]]:
    """The numbers that are not plain decimal integers; nothing when `text` is text."""
    digits = text.lstrip("+-")
    sign = -1 if text.startswith("-") else 1
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        meant = int(digits, 10)
        yield sign * meant, f"{text} is octal to some YAML readers; write {sign * meant}, or 0o... for octal"
    elif re.fullmatch(r"[-+]?0(o[0-7]+|x[0-9a-fA-F]+)", text) and len(text) <= MAX_DIGITS:
        yield sign * int(digits, 0), None
    elif re.fullmatch(r"[-+]?0b[01_]+", text):
        yield text, f"{text} is a number to some YAML readers only; write it in decimal"
    elif re.fullmatch(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?", text):
        yield text, f"{text} is a base-60 number to some YAML readers; write '{text}' for text"
    elif re.fullmatch(r"[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?", text):
        yield text, f"{text} is a number to some YAML readers only; write {text.replace('_', '')}"
    elif _FLOAT.fullmatch(text):
        yield float(text), None
