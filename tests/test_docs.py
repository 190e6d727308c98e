"""What the documentation tells people to type exists: commands with their options, make targets, files."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moec.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for pattern in ("*.md", "docs/*.md", "*/README.md", "*/*/README.md") for page in ROOT.glob(pattern))
FENCED = re.compile(r"^ *```\w*[^\n]*\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def typed(page: Path) -> Iterator[str]:
    """The command lines of a page, from its blocks and from its text, without comments."""
    text = page.read_text("utf-8")
    for block in FENCED.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from (" ".join(found.split()) for found in INLINE.findall(FENCED.sub("", text)))


def calls(line: str, program: str) -> Iterator[list[str]]:
    """The words behind `program` wherever a command of it begins in `line`."""
    line = re.sub(r"^\s*(\$ )?", "", line.partition("  #")[0])
    for part in re.split(r"\|\s|&&|;\s|\bdo\s", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a quotation that goes on elsewhere
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*|time", words[0]):
            words = words[1:]
        if words and words[0].rpartition("/")[2] == program:
            yield words[1:]


def fault(words: list[str]) -> str | None:
    """What of `moec WORDS` does not exist."""
    command = cli.command()
    path = "moec"
    for word in words:
        below = getattr(command, "commands", {})
        if below and not word.startswith(("-", "[", "<")):
            # `synthesize|inspect|spec`: each of them; SPEC, ...: a place for one
            names = word.split("|")
            if word.isupper() or word.startswith("."):
                return None
            unknown = [name for name in names if name not in below]
            if unknown:
                return f"{path} has no command {unknown[0]}"
            command, path = below[names[0]], f"{path} {names[0]}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        option = re.match(r"--[a-z][\w-]*", word.lstrip("["))
        if option and option.group() not in known | {"--help"}:
            return f"{path} has no option {option.group()}"
    return None


def test_what_is_wrong_is_found() -> None:
    assert fault(["compile", "SPEC", "--target", "xnnpack"]) is None
    assert fault(["compile", "SPEC", "--targets", "xnnpack"]) == "moec compile has no option --targets"
    assert fault(["checkpoint", "make"]) == "moec checkpoint has no command make"
    assert fault(["compiel", "SPEC"]) == "moec has no command compiel"
    assert list(calls("$ A=1 .venv/bin/moec run X | moec inspect Y  # both", "moec")) == [
        ["run", "X"],
        ["inspect", "Y"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    wrong = [
        f"{line.strip()}: {found}"
        for line in typed(page)
        for words in calls(line, "moec")
        if (found := fault(words)) is not None
    ]
    assert not wrong, "\n".join(wrong)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    named = {words[0].rstrip(",") for line in typed(page) for words in calls(line, "make") if words}
    # `bench-*` stands for some of them
    assert not [name for name in named if not fnmatch.filter(targets(), name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in linked if not (page.parent / target).exists()]
    rooms = "analysis|assistant|bench|checkpoints|cli|compiler|docs|passes|runtime|samples|sources|specs|targets|tests"
    named = re.compile(rf"({rooms}|tools|training)/[\w./-]+\.(py|md|yaml|json|cpp|h|inl|txt|cmake)")
    written = re.findall(r"^ *```\w+ (\S+)$", text, re.M)  # by whoever follows the page
    for name in INLINE.findall(FENCED.sub("", text)):
        if named.fullmatch(name) and name not in written and not (ROOT / name).exists():
            missing.append(name)
    assert not missing


def test_make_help_lists_every_target_and_variable() -> None:
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^  ([a-z][\w-]*)", said, re.M))
    assert listed == targets()
    variables = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert variables <= set(re.findall(r"[A-Z_]{3,}", said))


def test_python_m_moec() -> None:
    code = [sys.executable, "-m", "moec", "--version"]
    assert subprocess.run(code, capture_output=True, text=True, check=True).stdout.startswith("moec ")


def test_every_measurement_is_introduced() -> None:
    """A make target of each script of bench/, in the Makefile and on the page about them."""
    page, makefile = (ROOT / "bench" / "README.md").read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    scripts = [f.stem for f in (ROOT / "bench").glob("*.py") if "__main__" in f.read_text("utf-8")]
    assert len(scripts) > 5
    assert not [name for name in scripts if f"bench/{name}.py" not in makefile]
    assert not [name for name in scripts if f"make {name.replace('_', '-')}" not in page]
