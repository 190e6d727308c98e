"""The house rules that a machine can check: direction of imports, file sizes, folders, registries, a light import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "compiler",
    "sources",
    "checkpoints",
    "passes",
    "targets",
    "runtime",
    "analysis",
    "assistant",
    "training",
    "cli",
)
MAX_LINES = 600


def sources(*patterns: str) -> Iterator[Path]:
    for room in ROOMS:
        for pattern in patterns:
            yield from sorted((ROOT / room).rglob(pattern))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    yield from imports_below(ast.parse(file.read_text("utf-8"), str(file)), file)


def imports_below(tree: ast.AST, file: Path, *, run: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import below `tree`; `run` leaves out those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif run and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.orelse:
                yield from imports_below(inner, file, run=run)
        else:
            yield from imports_below(node, file, run=run)


def table() -> dict[str, set[str] | None]:
    """Rooms of CONTRIBUTING's table and the rooms that each may import; None for every room."""
    found: dict[str, set[str] | None] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `") or len(cells) != 3:
            continue
        allowed = re.findall(r"`([\w/.]+)`", cells[2])
        for room in re.findall(r"`([\w/.]+)`", cells[0]):
            if room.split("/")[0] in ROOMS and cells[2].strip(" |"):
                found[room] = None if cells[2] == "every room" else set(allowed)
            elif room.split("/")[0] in ROOMS and room.count("/") == 1 and room.endswith("/"):
                found[room] = set()  # a whole room that imports itself alone
    return found


def room_of(path: str, rooms: Iterable[str]) -> str:
    """The room of the table that a file lies in: the longest that fits; `analysis/__init__.py` is in none of them."""
    return max((room for room in rooms if path == room or path.startswith(room)), key=len, default=path)


def modules() -> dict[str, str]:
    """Dotted name -> path of every module of the rooms."""
    found = {}
    for file in sources("*.py"):
        path = file.relative_to(ROOT)
        found[".".join(("moec", *path.with_suffix("").parts)).removesuffix(".__init__")] = path.as_posix()
    return found


def test_the_table_has_every_room_and_no_circle() -> None:
    rooms = table()
    assert {room.split("/")[0] for room in rooms} == set(ROOMS)
    unknown = {name for allowed in rooms.values() for name in allowed or ()} - set(rooms)
    assert not unknown, f"the table allows imports from {unknown}, which are no rooms of it"
    order = {room: (set(rooms) if allowed is None else allowed) - {room} for room, allowed in rooms.items()}
    TopologicalSorter(order).prepare()  # CycleError names the circle


def test_imports_follow_the_table() -> None:
    rooms, known = table(), modules()
    wrong = []
    for path in known.values():
        allowed = rooms.get(room := room_of(path, rooms), set())
        for line, name in imported(ROOT / path):
            target = known.get(name) or known.get(name.rpartition(".")[0])
            if target is None or allowed is None:
                continue
            other = room_of(target, rooms)
            if other != room and other not in allowed:
                wrong.append(f"{path}:{line}: {name} is of {other}, which {room} may not import")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        names = [name for _, name in imports_below(ast.parse((ROOT / path).read_text("utf-8")), ROOT / path, run=True)]
        graph[module] = {t for n in names if (t := n if n in known else n.rpartition(".")[0]) in known} - {module}
    TopologicalSorter(graph).prepare()


def test_nothing_outside_imports_a_room_by_its_bare_name() -> None:
    files = [*sources("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    wrong = [f"{f.relative_to(ROOT)}:{n}" for f in files for n, name in imported(f) if name.split(".")[0] in ROOMS]
    assert not wrong, "\n".join(wrong)


def test_files_have_one_subject() -> None:
    kinds = ("*.py", "*.cpp", "*.h", "*.cc", "*.inl")
    files = [
        *sources(*kinds),
        *(f for room in ("tests", "bench", "samples") for k in kinds for f in (ROOT / room).rglob(k)),
    ]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text("utf-8").splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_modules_say_what_they_are() -> None:
    silent = [
        str(f.relative_to(ROOT))
        for f in sources("*.py")
        if f.read_text("utf-8").strip() and not ast.get_docstring(ast.parse(f.read_text("utf-8")))
    ]
    assert not silent, f"no docstring: {silent}"


def test_only_a_model_source_tells_models_apart() -> None:
    """Everything else calls the source of `spec.model`; a class of sections is an answer for one source alone."""
    asks = re.compile(r"isinstance\(\s*(\w+\.)*spec\.model\s*,")
    files = [f for f in sources("*.py") if (p := f.relative_to(ROOT)).parts[0] != "sources" and p.name != "source.py"]
    wrong = [str(f.relative_to(ROOT)) for f in files if asks.search(f.read_text("utf-8"))]
    assert not wrong, wrong


def test_the_core_names_no_target_and_no_model() -> None:
    """Neither in code nor in words: what a target or a model says of itself, it registers."""
    targets = {file.parent.name for file in (ROOT / "targets").glob("*/target.py")}
    models = {"DecoderConfig", "mobilemoe", "mobilellm", "transformers_config"}
    named = re.compile(rf"\b({'|'.join(sorted(targets | models))})\b")
    files = [f for f in sources("*.py") if f.relative_to(ROOT).parts[0] in ("compiler", "passes")]
    wrong = [f"{f.relative_to(ROOT)}: {found[0]}" for f in files if (found := named.search(f.read_text("utf-8")))]
    assert not wrong, wrong


def test_no_unfinished_work() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    files = [*sources("*.py", "*.cpp", "*.h", "*.cc", "*.yaml"), ROOT / "Makefile"]
    found = [str(f.relative_to(ROOT)) for f in files if marks.search(f.read_text("utf-8"))]
    assert not found


def committed() -> list[Path]:
    """The files git tracks, links left out; skips where this is no checkout of ours."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what is committed is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [f for f in files if f.is_file() and not f.is_symlink()]


#: Files of other projects that ours name; the last three are generated from executorch for its MLX delegate.
NOT_OURS = {"llama.cpp", "ggml.h", "_generated_inspector.py", "mlx_graph_schema.py", "fields.py"}


def named_files(line: str) -> list[str]:
    """Source files and pages that a line names, with as much of their path as is written; no patterns (`*.py`)."""
    found = re.findall(r"(?<![\w./<>{}*$-])((?:\w[\w-]*/)*\w[\w-]*\.(?:py|h|cpp|inl|cmake|md))\b(?![\w(/])", line)
    return [name for name in found if "NAME" not in name]


def test_files_that_the_code_names_exist() -> None:
    """A docstring or comment that names a file of ours by its last parts must be mended when the file moves."""
    assert named_files("see sources/a.py, `b.h` and <x>_source.py, *_check.cpp, NAME.py") == ["sources/a.py", "b.h"]
    ours = [f.relative_to(ROOT).parts for f in committed()]
    known = {"/".join(parts[i:]) for parts in ours for i in range(len(parts))} | NOT_OURS
    folders = {folder for parts in ours for folder in parts[:-1]}
    stale = [
        f"{file.relative_to(ROOT)}:{number}: {name}"
        for file in sources("*.py", "*.h", "*.cpp", "*.inl", "*.cmake")
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        for name in named_files(line)
        if name not in known and ("/" not in name or name.split("/")[0] in folders)
    ]
    assert not stale, "\n".join(stale)


def test_no_path_of_one_machine_is_committed() -> None:
    """A folder at a machine's root is nobody else's. `/data/local/tmp` is the same on every Android device."""
    path = re.compile(rb"(?<![\w.~$})-])/(?:work|root|home|Users|tmp)/\w")
    wrong = []
    for file in committed():
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if path.search(line.replace(b"/data/local/tmp", b"")):
                wrong.append(f"{file.relative_to(ROOT)}:{number}")
    assert not wrong, "\n".join(wrong)


def test_nothing_large_or_generated_is_committed() -> None:
    """The largest file is the prompts of the expert profile, 158 kB; weights, artifacts and builds are larger.

    So is the lock, which has a line for each of 4,000 wheels.
    """
    files = [f for f in committed() if f != ROOT / "requirements.lock"]
    large = {str(f.relative_to(ROOT)): f.stat().st_size for f in files if f.stat().st_size > 200_000}
    assert not large
    generated = re.compile(r"\.(pte|onnx|gguf|safetensors|so|o|a|pyc|log|bin)$")
    kept = "written_before"  # small artifacts of older versions, which this one cannot make again
    assert not [str(f.relative_to(ROOT)) for f in committed() if generated.search(f.name) and kept not in f.parts]


def test_contributing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tops = {f.relative_to(ROOT).parts[0] for f in committed() if len(f.relative_to(ROOT).parts) > 1} - {".ci", "src"}
    inner = {f"{f.parent.parent.name}/{f.parent.name}" for room in ROOMS for f in (ROOT / room).glob("*/*.py")}
    missing = sorted(room for room in tops | inner if f"`{room}/" not in text)
    assert not missing, f"CONTRIBUTING.md does not say what lives in {missing}"


def test_skipping_tests_say_what_they_need() -> None:
    silent = []
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "importorskip" and "reason" not in {k.arg for k in node.keywords}:
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not silent, "\n".join(silent)


def test_no_init_in_folders_of_cpp() -> None:
    """A C++ folder with an __init__.py becomes a package whose Python files are shadowed by the build's copies."""
    folders = {f.parent for f in sources("*.cpp", "*.cc")}
    assert not [str(f) for f in folders if (f / "__init__.py").exists()]


def test_rooms_are_where_the_package_looks() -> None:
    package = ROOT / "src" / "moec"
    links = sorted(p for p in package.iterdir() if p.is_symlink())
    assert {"compiler", "passes", "targets", "specs"} <= {p.name for p in links}
    for link in links:
        assert link.resolve() == (ROOT / link.name).resolve()


def test_every_target_folder_brings_options() -> None:
    from moec.compiler.spec.targets import TargetOptions, options_class, target_packages

    folders = {f.name for f in (ROOT / "targets").iterdir() if any(f.glob("*.py"))}
    assert folders <= set(target_packages())
    for name in folders:
        assert issubclass(options_class(name), TargetOptions)
        assert options_class(name)() == options_class(name).model_validate({})  # every option has a default


def test_a_registry_refuses_a_second_entry() -> None:
    from moec.compiler.target import register, registered

    name = "test_house-twice"
    register(name, lambda: pytest.fail("made"))
    with pytest.raises(AssertionError, match="twice"):
        register(name, lambda: pytest.fail("made"))
    assert name in registered()


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_light() -> None:
    """`import moec`, reading a spec and `moec --help` must not pay for torch."""
    assert python("import moec, sys; print([m for m in ('torch', 'pydantic', 'typer') if m in sys.modules])") == "[]"
    spec = str(ROOT / "specs/models/mobilemoe-s.yaml")
    assert python(f"import moec, sys; moec.load_spec({spec!r}); print('torch' in sys.modules)") == "False"
    assert python("import moec.cli.main, sys; print('torch' in sys.modules)") == "False"


def test_public_names_exist() -> None:
    import moec

    assert set(moec.__all__) <= set(dir(moec))
    for name in moec.__all__:
        assert getattr(moec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moec.nothing  # type: ignore[attr-defined]


def test_one_version() -> None:
    import tomllib

    import moec

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == moec.__version__


def test_children_do_not_import_from_the_folder_that_the_user_stands_in() -> None:
    """`python -m` puts the current folder first on the path, and that may be somebody else's artifact."""
    asked = re.compile(r'sys\.executable, ("-\w+", )*"-m"')
    found = [
        f for f in committed() if f.suffix == ".py" and f.relative_to(ROOT).parts[0] not in ("tests", "bench", "src")
    ]
    assert any(asked.search(f.read_text("utf-8")) for f in found)
    for file in found:
        for match in asked.finditer(file.read_text("utf-8")):
            assert '"-P"' in match[0], f"{file}: {match[0]}"
