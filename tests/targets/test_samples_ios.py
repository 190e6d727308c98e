"""The Swift class around moec.h. No Swift compiler is at hand: its syntax is parsed, and what it takes from C is
compared with the headers, which pycparser reads. A slip in Swift's types would go unnoticed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pycparser import CParser, c_ast

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "samples" / "ios" / "Sources"
CLASSES = [SOURCES / "MoecApp" / "MoecModel.swift", SOURCES / "MoecSchema" / "JSONSchema.swift"]
_TYPES = "typedef long int64_t; typedef int int32_t; typedef unsigned uint32_t; typedef unsigned long uint64_t;"
_TYPES += "typedef unsigned char uint8_t; typedef unsigned long size_t; typedef long intptr_t;"


@cache
def declared() -> tuple[dict[str, int], dict[str, list[str]], set[str]]:
    """Of moec.h, and of what Swift calls of moec_llguidance.h: functions with the number of their parameters,
    structures with their members, constants."""
    include = ROOT / "runtime" / "include"
    text = (include / "moec.h").read_text()
    glue = (include / "moec_llguidance.h").read_text()
    made = re.findall(r"^static inline ([^{]*)\{", glue, flags=re.MULTILINE)
    text += "struct LlgTokenizer; struct LlgMatcher;" + "".join(f"{head.strip()};\n" for head in made)
    freed = (ROOT / "tests" / "runtime" / "native" / "llguidance" / "llguidance.h").read_text()
    text += "".join(re.findall(r"^void llg_free_\w+\([^;]*;", freed, flags=re.MULTILINE))
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*|^#[^\n]*", "", text, flags=re.MULTILINE).replace("MOEC_APP_API", "")
    functions, structures, constants = {}, {}, set()
    for node in CParser().parse(_TYPES + text).ext:
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            given = [p for p in node.type.args.params if getattr(p, "name", None) is not None]
            functions[node.name] = len(given)
        elif isinstance(node, c_ast.Typedef) and isinstance(node.type.type, c_ast.Struct):
            structures[node.name] = [member.name for member in node.type.type.decls]
        elif isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Enum):
            constants.update(constant.name for constant in node.type.values.enumerators)
    return functions, structures, constants


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Calls of C's functions and structures, with their arguments."""
    for found in re.finditer(r"\b(moec_\w+|llg_\w+)\(", text):
        depth, begin, arguments = 0, found.end(), []
        for at in range(found.end(), len(text)):
            depth += (text[at] in "([{") - (text[at] in ")]}")
            if depth < 0 or (depth == 0 and text[at] == ","):
                arguments.append(text[begin:at].strip())
                begin = at + 1
            if depth < 0:
                break
        yield found[1], [argument for argument in arguments if argument]


def faults(text: str) -> list[str]:
    """What a Swift source takes from C in another way than the headers declare it."""
    functions, structures, constants = declared()
    found = []
    for name, arguments in calls(text):
        if name in structures:
            labels = [argument.split(":")[0] for argument in arguments]
            if labels and labels != structures[name]:
                found.append(f"{name}({', '.join(labels)})")
        elif functions.get(name) != len(arguments):
            found.append(f"{name} with {len(arguments)} arguments")
    for body in re.split(r"\b(?:func|init)\b", text):
        for variable, structure in re.findall(r"\bvar (\w+) = (moec_app_\w+)\(\)", body):
            used = set(re.findall(rf"\b{variable}\.(\w+)", body))
            found += [f"{structure}.{name}" for name in sorted(used) if name not in structures[structure]]
            if structures[structure][0] == "size" and f"{variable}.size = sizeOf({structure}.self)" not in body:
                found.append(f"{structure} without its size")
    return found + [name for name in set(re.findall(r"\bMOEC_APP_\w+", text)) if name not in constants]


def test_the_headers_are_read() -> None:
    functions, structures, constants = declared()
    assert (functions["moec_app_tokenize"], functions["moec_app_error"], functions["llg_free_matcher"]) == (6, 0, 1)
    assert functions["moec_llguidance_matcher"] == 5
    assert structures["moec_app_call"] == ["name", "arguments"]
    assert {"MOEC_APP_TOOLS", "MOEC_APP_CALL"} <= constants


@pytest.mark.parametrize("file", CLASSES, ids=lambda file: file.stem)
def test_it_calls_what_the_headers_declare(file: Path) -> None:
    text = re.sub(r"//[^\n]*", "", file.read_text())
    assert faults(text) == []
    assert len({name for name, _ in calls(text)}) >= 5


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("moec_app_close(session)", "moec_app_close()", "moec_app_close with 0 arguments"),
        ("moec_app_rewind(session, 0)", "moec_app_rewound(session, 0)", "moec_app_rewound with 2 arguments"),
        ("options.top_k =", "options.topk =", "moec_app_options.topk"),
        ("MOEC_APP_TOOLS", "MOEC_APP_TOOL", "MOEC_APP_TOOL"),
        ("moec_app_call(name:", "moec_app_call(names:", "moec_app_call(names, arguments)"),
        ("turn.size = sizeOf(moec_app_turn.self)", "", "moec_app_turn without its size"),
    ],
)
def test_slips_are_found(before: str, after: str, fault: str) -> None:
    text = CLASSES[0].read_text()
    assert before in text
    assert fault in faults(text.replace(before, after))


def test_what_is_opened_is_closed() -> None:
    """Every id that the class is given is closed where it ends."""
    text = CLASSES[0].read_text()
    for opened in ("artifact", "session", "splitter", "generation"):
        assert f"_ = moec_app_close({opened})" in text
    assert text.count("deinit") == 2


def test_the_modules_are_the_headers() -> None:
    """The package's folders of C hold the headers themselves, not copies."""
    for folder, names in (("CMoec", ["moec.h"]), ("CMoecSchema", ["moec.h", "moec_llguidance.h"])):
        for name in names:
            assert (SOURCES / folder / name).resolve() == ROOT / "runtime" / "include" / name
        for header in re.findall(r'header "([^"]*)"', (SOURCES / folder / "module.modulemap").read_text()):
            assert (SOURCES / folder / header).is_file()
    package = (SOURCES.parent / "Package.swift").read_text()
    for path in re.findall(r'path: "([^"]*)"', package):
        assert (SOURCES.parent / path).is_dir()


# no extra brings the grammar, which only this test would use; what Swift takes from C is checked without it
@pytest.mark.skipif(
    importlib.util.find_spec("tree_sitter_swift") is None, reason="needs tree-sitter's grammar of Swift"
)
@pytest.mark.parametrize("file", [*CLASSES, SOURCES.parent / "Package.swift"], ids=lambda file: file.stem)
def test_its_syntax_is_swifts(file: Path) -> None:
    import tree_sitter
    import tree_sitter_swift

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    assert not parser.parse(file.read_bytes()).root_node.has_error
    assert parser.parse(file.read_bytes() + b"(").root_node.has_error
