"""The Android module: what its Kotlin declares is what its native side defines, and both are compiled and run on a Java
virtual machine where a JDK and a Kotlin compiler are installed, linked with this machine's runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moec.runtime.native import executorch_folder, runtime_library
from tests.targets.samples.said import SPEC, said_by_python, talking_artifact
from tests.tiny import TinyModels

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "samples" / "android"
KOTLIN = MODULE / "src" / "main" / "kotlin" / "dev" / "moec"
NATIVE = MODULE / "src" / "main" / "cpp"
CHECKS = Path(__file__).parent / "samples"
PROMPT = "Once upon a 🙂 time"
# of a type of Kotlin: Java's and JNI's
TYPES = {
    "Int": ("int", "jint"),
    "Long": ("long", "jlong"),
    "Double": ("double", "jdouble"),
    "Unit": ("void", "void"),
    "Boolean": ("boolean", "jboolean"),
    "ByteArray": ("byte[]", "jbyteArray"),
    "IntArray": ("int[]", "jintArray"),
    "LongArray": ("long[]", "jlongArray"),
    "DoubleArray": ("double[]", "jdoubleArray"),
    "Array<ByteArray>": ("byte[][]", "jobjectArray"),
    "Constraint": ("Constraint", "jobject"),
}
needs_jdk = pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK: javac, java and jni.h")


def declared() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Of each external function of Native.kt its result, and its parameters with their types."""
    found = {}
    for name, given, result in re.findall(
        r"external fun (\w+)\(([^)]*)\)(?:: ([\w<>]+))?", (KOTLIN / "Native.kt").read_text("utf-8")
    ):
        parameters = [one.split(":") for one in given.split(",") if one.strip()]
        found[name] = (result or "Unit", [(left.strip(), right.strip().rstrip("?")) for left, right in parameters])
    return found


def test_the_native_side_has_the_functions_that_kotlin_declares() -> None:
    source = (NATIVE / "moec_jni.cpp").read_text("utf-8")
    defined = {}
    for given in re.findall(r"^MOEC_NATIVE\(([^)]*)\)", source, re.MULTILINE):
        result, name, *parameters = [" ".join(one.split()) for one in given.split(",")]
        defined[name] = (result, [one.split()[0] for one in parameters])
    wanted = {
        name: (TYPES[result][1], [TYPES[kind][1] for _, kind in parameters])
        for name, (result, parameters) in declared().items()
    }
    assert len(wanted) > 15
    assert defined == wanted


def test_what_the_native_side_looks_up_is_kept() -> None:
    """R8 renames what only native code names, unless the rules of the module say otherwise."""
    source = (NATIVE / "moec_jni.cpp").read_text("utf-8")
    rules = (MODULE / "consumer-rules.pro").read_text("utf-8")
    for name in re.findall(r'FindClass\("(dev/moec/\w+)"\)', source):
        assert f"class {name.replace('/', '.')} {{ <init>(byte[]); }}" in rules
    for method in re.findall(r'GetMethodID\(type, "(\w+)", "\(', source):
        assert re.search(rf" {method}\(", rules), method
    assert "class dev.moec.Native { native <methods>; }" in rules


def test_flags_and_ends_are_those_of_the_header() -> None:
    header = (ROOT / "runtime" / "include" / "moec.h").read_text("utf-8")
    for name, value in re.findall(r"const val (\w+) = (\d+)", (KOTLIN / "Native.kt").read_text("utf-8")):
        assert re.search(rf"\bMOEC_APP_{name} = {value},", header), name
    ends = re.search(r"enum class End \{([^}]*)\}", (KOTLIN / "Conversation.kt").read_text("utf-8"))
    assert ends
    for value, name in enumerate(ends[1].replace(" ", "").split(",")):
        assert re.search(rf"\bMOEC_APP_{name} = {value},", header), name


def test_every_option_can_be_set() -> None:
    """Every member of moec_app_options is set by the native side, and every function of the header is called by it."""
    header = (ROOT / "runtime" / "include" / "moec.h").read_text("utf-8")
    source = (NATIVE / "moec_jni.cpp").read_text("utf-8")
    body = re.search(r"typedef struct moec_app_options \{(.*?)\} moec_app_options;", header, re.DOTALL)
    assert body
    lines = re.sub(r"//[^\n]*", "", body[1])
    members = {name for line in lines.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line.strip())}
    assert {"top_k", "temperature", "min_p", "stops", "constraint", "speculate"} <= members
    assert [name for name in sorted(members) if name != "reserved" and f"options.{name} = " not in source] == []
    functions = set(re.findall(r"MOEC_APP_API [\w ]+\*? ?(moec_app_\w+)\(", header))
    # of the list: what Kotlin has in another form (run: a loop around next; chat: with no tools)
    assert functions - set(re.findall(r"moec_app_\w+", source)) == {
        "moec_app_run",
        "moec_app_chat",
        "moec_app_stop_tokens",
    }


def test_the_module_is_whole() -> None:
    ElementTree.parse(MODULE / "src" / "main" / "AndroidManifest.xml")
    build = (MODULE / "build.gradle.kts").read_text("utf-8")
    for path in re.findall(r'(?:file|consumerProguardFiles)\("((?!\.\.)[^"]*)"\)', build):
        assert (MODULE / path).is_file(), path
    assert re.search(r'namespace = "([^"]*)"', build)[1] == "dev.moec"  # type: ignore[index]
    guide = (ROOT / "docs" / "android.md").read_text("utf-8")
    for line in (
        'include(":moec")',
        'project(":moec").projectDir = ',
        'implementation(project(":moec"))',
        "moec.executorch=",
    ):
        assert line in guide
        assert line in build
    for plugin in re.findall(r'(?:\bid\(|\bplugin = )"([^"]*)"', build):  # the root project has them
        assert re.search(rf'id\("{re.escape(plugin)}"\) version "[^"]*" apply false', guide), plugin
    source = (NATIVE / "CMakeLists.txt").read_text("utf-8")
    checkout = re.search(r"\$\{CMAKE_CURRENT_SOURCE_DIR\}/([./]*) ABSOLUTE", source)
    assert checkout
    assert (NATIVE / checkout[1]).resolve() == ROOT


# the grammar comes with no extra: only these tests use it, and a compiler finds more where one is installed
@pytest.mark.parametrize(
    "file", [*sorted(KOTLIN.glob("*.kt")), MODULE / "build.gradle.kts"], ids=lambda file: file.name
)
def test_its_syntax_is_kotlins(file: Path) -> None:
    tree_sitter = pytest.importorskip(
        "tree_sitter", reason="needs tree-sitter's grammar of Kotlin: pip install tree-sitter"
    )
    grammar = pytest.importorskip(
        "tree_sitter_kotlin", reason="needs tree-sitter's grammar: pip install tree-sitter-kotlin"
    )
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    assert not parser.parse(file.read_bytes()).root_node.has_error
    assert parser.parse(file.read_bytes() + b"(").root_node.has_error


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libmoec_jni.so for this machine, in a folder of its own."""
    jdk = Path(shutil.which("javac") or "").resolve().parents[1]
    runtime, made = Path(runtime_library()), tmp_path_factory.mktemp("jni") / "libmoec_jni.so"
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-fPIC",
        "-shared",
        f"-I{ROOT / 'runtime' / 'include'}",
    ]
    command += [f"-isystem{folder}" for folder in (jdk / "include", jdk / "include" / "linux")]
    command += [str(NATIVE / "moec_jni.cpp"), "-o", str(made), "-Wl,--no-undefined", str(runtime)]
    done = subprocess.run(
        [*command, f"-Wl,-rpath,{runtime.parent}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning:" not in done.stderr
    return made


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module's Kotlin and Check.kt, compiled, with Kotlin's library in the same jar."""
    if (compiler := shutil.which("kotlinc")) is None:
        pytest.skip("needs a Kotlin compiler: kotlinc")
    version = subprocess.run([compiler, "-version"], capture_output=True, text=True, timeout=120, check=False)
    number = re.search(r"kotlinc-jvm (\d+)\.(\d+)", version.stderr)
    if number is None or (int(number[1]), int(number[2])) < (1, 9):
        pytest.skip(f"needs kotlinc 1.9 or newer: {(version.stderr or version.stdout).strip()[-100:]}")
    made = tmp_path_factory.mktemp("kotlin") / "check.jar"
    command = [compiler, "-Werror", "-include-runtime", "-d", str(made), str(KOTLIN), str(CHECKS / "Check.kt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.fixture(scope="module")
def talking(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_artifact(tiny, tmp_path_factory.mktemp("talking") / "artifact")


def java(*arguments: object) -> subprocess.CompletedProcess[str]:
    """With JNI's own checks, which find calls with an exception pending, say, and write to standard output."""
    command = ["java", "-Xcheck:jni", "-Dfile.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )


@pytest.fixture(scope="module")
def native_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Check.java and Native.java, whose functions are those that Native.kt declares, compiled."""
    folder = tmp_path_factory.mktemp("java")
    lines = ["package dev.moec;", "class Native {"]
    for name, (result, parameters) in declared().items():
        given = ", ".join(f"{TYPES[kind][0]} {parameter}" for parameter, kind in parameters)
        lines.append(f"  static native {TYPES[result][0]} {name}({given});")
    (folder / "Native.java").write_text("\n".join([*lines, "}"]), "utf-8")
    (folder / "MoecException.java").write_text(
        "package dev.moec;\nclass MoecException extends RuntimeException {\n"
        "  MoecException(byte[] utf8) { super(new String(utf8, java.nio.charset.StandardCharsets.UTF_8)); }\n}",
        "utf-8",
    )
    (folder / "Constraint.java").write_text(
        "package dev.moec;\ninterface Constraint { void allowed(int[] mask); boolean take(int token); }", "utf-8"
    )
    sources = [*folder.glob("*.java"), CHECKS / "Check.java"]
    subprocess.run(["javac", "-encoding", "UTF-8", "-d", str(folder), *map(str, sources)], check=True, timeout=120)
    return folder


@needs_jdk
@pytest.mark.slow
def test_native_functions_refuse_what_no_kotlin_passes(library: Path, talking: Path, native_check: Path) -> None:
    done = java("-cp", native_check, "dev.moec.Check", library, talking, PROMPT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING in native" not in done.stdout
    assert "not refused" not in done.stderr
    found = done.stderr.splitlines()
    null, misfit = "NullPointerException: an argument is null", "IllegalArgumentException: texts and calls do not fit"
    wanted = [
        *("true", "1a 🙂 20 b2", null, "MoecException: options", "IllegalArgumentException: a text holds a zero", null),
        *(
            "MoecException: the text is not UTF-8",
            null,
            null,
            misfit,
            misfit,
            misfit,
            null,
            misfit[:24],
            "MoecException: the p",
        ),
        *(null, "IllegalArgumentException: numbers", null, "IllegalArgumentException: as many", "MoecException: 99 is"),
        *(
            "MoecException: position -1",
            "MoecException: 77 is no",
            "MoecException: ",
            "MoecException: -5 is",
            "MoecException: ",
        ),
        *(
            "MoecException: folder: empty",
            "MoecException: the artifact has no folder",
            null,
            "MoecException: the artifact",
        ),
        *("MoecException: tools: is not JSON", "MoecException: "),
        "MoecException: not 🙂 here/manifest.json: No such file",
    ]
    assert len(found) == len(wanted), done.stderr
    for line, words in zip(found, wanted, strict=True):
        assert line.startswith(words), f"{line!r} begins with {words!r}"


@needs_jdk
@pytest.mark.slow
def test_kotlin_says_what_python_says(
    classes: Path, library: Path, tiny: TinyModels, talking: Path, tmp_path: Path
) -> None:
    done = java(
        f"-Djava.library.path={library.parent}", "-cp", classes, "check.CheckKt", talking, tmp_path / "kept", PROMPT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "WARNING in native" not in done.stdout
    found = dict(line.split("\t", 1) for line in done.stderr.splitlines())
    wanted = said_by_python(tiny(SPEC) / "artifact", talking, PROMPT)
    same = dict.fromkeys(("stops", "kept", "rewound", "threads", "goes on", "parts", "scored"), "true")
    same |= {"given up": "CANCELLED1", "stopped": "CANCELLED", "told": "1", "stats": "[LENGTH, 3, true, false]"}
    same |= {"stopped early": "[CANCELLED0, CANCELLED0, CANCELLED0]", "stopped prefix": "[CANCELLED, 0, LENGTH]"}
    same |= {"stopped before": "[LENGTH, LENGTH, LENGTH]"}
    same |= {"thrown": "IllegalStateException: mine", "constrained": "[COMPLETE, true, true]"}
    same |= {"fit": "[4, true]", "endless": "[true, true, true]", "begun": "true", "draft": "true"}
    same |= {"prepared": "[true, true, true, true]", "forgotten": "[true, false]"}
    same |= {"constraint": "UnsupportedOperationException: mine too"}
    same |= {
        "recommended": "[0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0]",
        "zero": "IllegalArgumentException: a text holds a zero byte; leave it out",
    }
    assert {name: found.get(name) for name in [*wanted, *same]} == {**wanted, **same}
    for name, words in (
        *(
            ("nothing allowed", "exclude all"),
            ("role", "must alternate"),
            ("top p", "top_p"),
            ("not a number", "temperature"),
            ("too long", "context"),
        ),
        *(("bias", "100000000"), ("definitions", "tools: is not JSON, at byte 3"), ("closed", "is no open session")),
        ("name", "name: 1 to 64 of"),
        *(("folder", "not 🙂 here/manifest.json: No such file"), ("closed model", "is no open artifact")),
    ):
        assert found[name].startswith("MoecException: "), found[name]
        assert words in found[name]
    assert found["info"].endswith("512, 1, true, true]")


# the names of an ExecuTorch that is installed for Android, for the shared libraries of this machine's wheel
INSTALLED = """
include({folder}/share/cmake/executorch-config.cmake)
foreach(pair executorch=runtime optimized_native_cpu_ops_lib=kernels_optimized xnnpack_backend=backend_xnnpack
             extension_threadpool=threadpool)
  string(REPLACE "=" ";" pair ${{pair}})
  list(GET pair 0 here)
  list(GET pair 1 there)
  add_library(${{here}} INTERFACE IMPORTED)
  target_link_libraries(${{here}} INTERFACE -Wl,--no-as-needed executorch::${{there}})
endforeach()
foreach(name extension_module_static extension_tensor extension_data_loader log)
  add_library(${{name}} INTERFACE IMPORTED)
endforeach()
"""


@needs_jdk
@pytest.mark.slow
def test_the_modules_own_project_makes_a_library_that_does_the_same(
    library: Path, talking: Path, native_check: Path, tmp_path: Path
) -> None:
    """CMakeLists.txt of the module as Gradle calls it, but for this machine, all in one library."""
    jdk = Path(shutil.which("javac") or "").resolve().parents[1]
    (tmp_path / "executorch-config.cmake").write_text(INSTALLED.format(folder=executorch_folder()))
    headers = f"-isystem {jdk / 'include'} -isystem {jdk / 'include' / 'linux'}"
    tools = Path(sys.executable).parent  # installed by pip, beside python
    for command in (
        [
            *("cmake", "-S", str(NATIVE), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *(
                f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
                f"-Dexecutorch_DIR={tmp_path}",
                f"-DCMAKE_CXX_FLAGS={headers}",
            ),
        ],
        ["cmake", "--build", str(tmp_path / "build"), "--target", "moec_jni"],
    ):
        done = subprocess.run(
            [str(tools / command[0]), *command[1:]], capture_output=True, text=True, timeout=3000, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = [
        java("-cp", native_check, "dev.moec.Check", made, talking, PROMPT)
        for made in (library, tmp_path / "build" / "libmoec_jni.so")
    ]
    assert [one.returncode for one in said] == [0, 0], said[1].stderr[-3000:]
    assert said[1].stderr == said[0].stderr
