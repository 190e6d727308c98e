"""The Swift package: what it takes from C is compared with the headers, which pycparser reads; its syntax is parsed;
and where a Swift toolchain is installed, an application adds the package by its address, is built, and runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pycparser import CParser, c_ast

from moec.runtime.native import runtime_library
from tests.targets.samples.said import SPEC, said_by_python, talking_artifact
from tests.tiny import TinyModels

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "samples" / "ios" / "Sources"
APP = [SOURCES / "MoecApp" / f"{name}.swift" for name in ("C", "MoecModel", "Settings", "Conversation")]
CLASSES = [*APP, SOURCES / "MoecSchema" / "JSONSchema.swift"]
CHECKS = Path(__file__).parent / "samples"
PROMPT = "Once upon a 🙂 time"
EXECUTORCH = "https://github.com/pytorch/executorch.git"
_TYPES = "typedef long int64_t; typedef int int32_t; typedef unsigned uint32_t; typedef unsigned long uint64_t;"
_TYPES += "typedef unsigned char uint8_t; typedef unsigned long size_t; typedef long intptr_t;"


@pytest.fixture(scope="module")
def talking(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_artifact(tiny, tmp_path_factory.mktemp("talking") / "artifact")


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


def code(file: Path) -> str:
    """A source without its comments."""
    return re.sub(r"//[^\n]*", "", file.read_text())


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


def members_not_in(body: str, variable: str, structure: str) -> list[str]:
    """What a body uses of a variable and its structure does not have."""
    used = set(re.findall(rf"\b{variable}\.(\w+)", body))
    return [f"{structure}.{name}" for name in sorted(used) if name not in declared()[1][structure]]


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
            found += members_not_in(body, variable, structure)
            if structures[structure][0] == "size" and f"{variable}.size = sizeOf({structure}.self)" not in body:
                found.append(f"{structure} without its size")
        for variable in re.findall(r"\b(?:var|let) (\w+) = try defaults\(of:", body):
            found += members_not_in(body, variable, "moec_app_options")
    return found + [name for name in set(re.findall(r"\bMOEC_APP_\w+", text)) if name not in constants]


def test_the_headers_are_read() -> None:
    functions, structures, constants = declared()
    assert (functions["moec_app_tokenize"], functions["moec_app_error"], functions["llg_free_matcher"]) == (6, 0, 1)
    assert functions["moec_llguidance_matcher"] == 5
    assert structures["moec_app_call"] == ["name", "arguments"]
    assert {"MOEC_APP_TOOLS", "MOEC_APP_CALL"} <= constants


@pytest.mark.parametrize("file", CLASSES, ids=lambda file: file.stem)
def test_it_calls_what_the_headers_declare(file: Path) -> None:
    text = code(file)
    assert faults(text) == []
    assert {name for name, _ in calls(text)}


def test_every_option_can_be_set() -> None:
    """Every member of moec_app_options is set, every one of the statistics is told, every function of the header is
    called but those that Swift has in another form."""
    functions, structures, _ = declared()
    text = "".join(code(file) for file in APP)
    assert [m for m in structures["moec_app_options"] if m != "size" and f"options.{m} = " not in text] == []
    assert [m for m in structures["moec_app_stats"] if m != "size" and f"stats.{m}" not in text] == []
    used = {name for name, _ in calls("".join(code(file) for file in CLASSES))}
    left = {name for name in functions if name.startswith("moec_app_")} - used
    assert left == {"moec_app_run", "moec_app_chat", "moec_app_stop_tokens"}


def test_enumerations_are_those_of_the_header() -> None:
    header = (ROOT / "runtime" / "include" / "moec.h").read_text()
    text = code(SOURCES / "MoecApp" / "Settings.swift")
    ends = re.search(r"enum End[^{]*\{\s*case ([^}\n]*)", text)
    full = re.findall(r"case (\w+) = (\d)", text)
    assert ends
    assert full
    for name, value in [*((name.strip(), i) for i, name in enumerate(ends[1].split(","))), *full]:
        spelled = re.sub("([A-Z])", r"_\1", name).upper()
        assert f"MOEC_APP_{spelled} = {value}," in header


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("moec_app_close(session)", "moec_app_close()", "moec_app_close with 0 arguments"),
        ("moec_app_rewind(session, ", "moec_app_rewound(session, ", "moec_app_rewound with 2 arguments"),
        ("options.top_k =", "options.topk =", "moec_app_options.topk"),
        ("MOEC_APP_TOOLS", "MOEC_APP_TOOL", "MOEC_APP_TOOL"),
        ("moec_app_call(name:", "moec_app_call(names:", "moec_app_call(names, arguments)"),
        ("turn.size = sizeOf(moec_app_turn.self)", "", "moec_app_turn without its size"),
    ],
)
def test_slips_are_found(before: str, after: str, fault: str) -> None:
    text = "".join(code(file) for file in APP)
    assert before in text
    assert fault in faults(text.replace(before, after))


def test_what_is_opened_is_closed() -> None:
    """Every id that a class is given is closed where it ends."""
    text = "".join(code(file) for file in APP)
    for opened in ("artifact", "session", "splitter", "generation"):
        assert f"_ = moec_app_close({opened})" in text
    assert text.count("deinit") == 3


def test_the_modules_are_the_headers() -> None:
    """The package names the headers themselves, not copies, and every folder that it names is there."""
    package = (ROOT / "Package.swift").read_text()
    sources = re.search(r'let sources = "([^"]*)"', package)
    assert sources
    folders = [path.replace(r"\(sources)", sources[1]) for path in re.findall(r'path: "([^"]*)"', package)]
    assert "runtime/include" in folders
    assert all((ROOT / folder).is_dir() for folder in folders)
    assert {ROOT / folder for folder in folders} == {ROOT / "runtime" / "include", *SOURCES.iterdir()}
    for folder in (ROOT / "runtime" / "include", SOURCES / "CMoecSchema"):
        for header in re.findall(r'header "([^"]*)"', (folder / "module.modulemap").read_text()):
            assert (folder / header).is_file()
    for header in re.findall(r'#include "(\.[^"]*)"', (SOURCES / "CMoecSchema" / "schema.h").read_text()):
        assert (SOURCES / "CMoecSchema" / header).resolve().parent == ROOT / "runtime" / "include"
    assert "unsafeFlags" not in package, "a package with such flags cannot be added by its address"


# no extra brings the grammar, which only this test would use; what Swift takes from C is checked without it
@pytest.mark.skipif(
    importlib.util.find_spec("tree_sitter_swift") is None, reason="needs tree-sitter's grammar of Swift"
)
@pytest.mark.parametrize(
    "file",
    [*CLASSES, SOURCES / "MoecModel" / "MoecModel.swift", ROOT / "Package.swift"],
    ids=lambda file: "-".join(file.parts[-2:]),
)
def test_its_syntax_is_swifts(file: Path) -> None:
    import tree_sitter
    import tree_sitter_swift

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    assert not parser.parse(file.read_bytes()).root_node.has_error
    assert parser.parse(file.read_bytes() + b"(").root_node.has_error


def committed(folder: Path) -> None:
    """A git repository of what a folder holds."""
    for arguments in (
        *(["init", "-q", "-b", "main"], ["add", "-A"]),
        ["-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "test"],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, timeout=60)


class App:
    """An application that adds the package by the address of a repository; ExecuTorch's is a mirror with what the
    package uses of it declared, since there is no Apple machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = subprocess.run(
            [
                "git",
                "-C",
                str(ROOT),
                "ls-files",
                "-co",
                "--exclude-standard",
                "Package.swift",
                "samples/ios",
                "runtime",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        for name in files.stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / "moec" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / "moec" / name)
        committed(folder / "moec")
        mirror = folder / "executorch"
        for name in ("ExecuTorch", "backend_mlx"):
            (mirror / "Sources" / name).mkdir(parents=True)
            shutil.copy(CHECKS / "ExecuTorch.swift", mirror / "Sources" / name)
        products = '.library(name: "executorch", targets: ["ExecuTorch"])'
        products += ', .library(name: "backend_mlx", targets: ["backend_mlx"])'
        self._package(
            mirror, f'products: [{products}], targets: [.target(name: "ExecuTorch"), .target(name: "backend_mlx")]'
        )
        committed(mirror)
        branch = re.search(r'branch: "([^"]*)"', (ROOT / "Package.swift").read_text())
        assert branch
        subprocess.run(["git", "-C", str(mirror), "branch", "-q", branch[1]], check=True, timeout=60)
        names = ["MoecApp", "MoecModel", "MoecSchema"]
        products = ", ".join(f'.product(name: "{name}", package: "moec")' for name in names)
        targets = f'.executableTarget(name: "Check", dependencies: [{products.split("), ")[0]})]), '
        targets += f'.target(name: "Others", dependencies: [{products}])'
        added = f'.package(url: "file://{folder}/moec", branch: "main")'
        self._package(folder / "app", f"dependencies: [{added}], targets: [{targets}]")
        (folder / "app" / "Sources" / "Check").mkdir(parents=True)
        shutil.copy(CHECKS / "Check.swift", folder / "app" / "Sources" / "Check" / "main.swift")
        (folder / "app" / "Sources" / "Others").mkdir()
        imports = "\n".join(f"import {name}" for name in names)
        (folder / "app" / "Sources" / "Others" / "others.swift").write_text(imports)
        done = self.swift("package", "config", "set-mirror", "--original", EXECUTORCH, "--mirror", f"file://{mirror}")
        assert done.returncode == 0, done.stderr[-2000:]

    def _package(self, folder: Path, what: str) -> None:
        folder.mkdir(exist_ok=True)
        text = "// swift-tools-version:5.9\nimport PackageDescription\n"
        (folder / "Package.swift").write_text(f'{text}let package = Package(name: "{folder.name}", {what})\n')

    def swift(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = [
            "--config-path",
            str(self.folder / "config"),
            "--cache-path",
            str(self.folder / "cache"),
            "--disable-sandbox",
        ]
        return subprocess.run(
            ["swift", command, *own, *arguments],
            cwd=self.folder / "app",
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> App:
    return App(tmp_path_factory.mktemp("swift"))


needs_swift = pytest.mark.skipif(shutil.which("swift") is None, reason="needs a Swift toolchain: swift")


@needs_swift
@pytest.mark.slow
def test_every_target_of_the_package_compiles(application: App) -> None:
    llguidance = ROOT / "tests" / "runtime" / "native" / "llguidance"
    done = application.swift("build", "--target", "Others", "-Xcc", f"-I{llguidance}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "warning:" not in done.stdout, done.stdout


@needs_swift
@pytest.mark.slow
def test_swift_says_what_python_says(application: App, tiny: TinyModels, talking: Path, tmp_path: Path) -> None:
    runtime = runtime_library().parent
    linked = ["-Xlinker", f"-L{runtime}", "-Xlinker", "-rpath", "-Xlinker", str(runtime)]
    done = application.swift("build", *linked, "--product", "Check")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = application.swift("run", *linked, "--skip-build", "Check", str(talking), str(tmp_path / "kept"), PROMPT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = dict(line.split("\t", 1) for line in done.stderr.splitlines() if "\t" in line)
    wanted = said_by_python(tiny(SPEC) / "artifact", talking, PROMPT)
    same = dict.fromkeys(("stops", "kept", "rewound", "goes on", "parts"), "true")
    same |= {"given up": "cancelled 1", "stopped": "cancelled", "endless": "[true, true]", "told": "1", "fit": "4 true"}
    same |= {"prepared": "[true, true, true, true]", "forgotten": "[true, false]", "begun": "true"}
    same |= {"draft": "[true, true]"}
    same |= {"stopped early": str(["cancelled 0"] * 3).replace("'", '"'), "stopped prefix": "cancelled 0 length"}
    same |= {"stopped before": '["length", "length", "length"]'}
    same |= {"thrown": "Mine: Mine()", "constrained": "[true, true, true]", "stats": "length 3 true false"}
    same |= {"recommended": "[0.0, 0.0, 1.0, 0.0, 1.0]", "zero": "MoecError: a text holds a zero byte; leave it out"}
    same |= {"no file": "MoecError: https://example.com/a is no file; give the URL of one"}
    assert {name: found.get(name) for name in [*wanted, *same]} == {**wanted, **same}
    for name, words in (
        *(("nothing allowed", "the constraint: failed"), ("role", "must alternate"), ("top p", "top_p")),
        *(("not a number", "temperature"), ("too long", "context"), ("bias", "100000000")),
        ("name", "name: 1 to 64 of"),
        *(("definitions", "tools: is not JSON, at byte 3"), ("folder", "not 🙂 here/manifest.json: No such file")),
    ):
        assert found[name].startswith("MoecError: "), found[name]
        assert words in found[name]
    assert found["info"].endswith("512, 1, 1, 1]")
