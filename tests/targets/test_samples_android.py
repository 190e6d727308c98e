"""The native side of the Android sample, compiled against the built runtime and called from a Java virtual machine.

There is no Android toolchain and no Kotlin here: a class of the same name, in Java, declares the functions that
MoecModel.kt declares and calls them as it does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import moec
from moec.compiler.artifact import Artifact
from moec.runtime.native import runtime_library
from tests.tiny import TinyModels, tiny_text

SAMPLE = Path(__file__).parents[2] / "samples" / "android"
INCLUDE = Path(__file__).parents[2] / "runtime" / "include"
JAVA = """
package dev.moec;
import java.nio.charset.StandardCharsets;
public class MoecModel {
  private static native long open(byte[] folder, long memory);
  private static native void close(long id);
  private static native long session(long artifact);
  private static native int[] tokenize(long artifact, byte[] text);
  private static native int[] chat(long artifact, byte[] tools, byte[][] texts, int[] calls);
  private static native long generate(
      long artifact, long session, int[] prompt, long limit, double temperature, long seed, byte[][] stops,
      int segments);
  private static native long splitter(long artifact, int[] prompt, int segments);
  private static native void split(long splitter, byte[] piece);
  private static native byte[][] segment(long splitter);
  private static native byte[] next(long generation);
  private static native void cancel(long generation);
  private static native void save(long session, byte[] path);
  private static native void restore(long session, byte[] path);

  private static byte[] bytes(String text) { return text.getBytes(StandardCharsets.UTF_8); }

  private static String all(long generation) {
    StringBuilder text = new StringBuilder();
    for (byte[] piece; (piece = next(generation)) != null;) text.append(new String(piece, StandardCharsets.UTF_8));
    close(generation);
    return text.toString();
  }

  private static void refused(Runnable call) {
    try {
      call.run();
    } catch (IllegalStateException e) {
      System.err.println(e.getMessage());
    }
  }

  // Thinking begins within the prompt and ends within the answer, whose pieces are these.
  private static String parts(long model, String... pieces) {
    long splitter = splitter(model, tokenize(model, bytes("x <think>")), 8);
    StringBuilder found = new StringBuilder();
    for (int i = 0; i <= pieces.length; ++i) {
      split(splitter, i == pieces.length ? null : bytes(pieces[i]));
      for (byte[][] part; (part = segment(splitter)) != null;)
        found.append(part[0][0]).append(new String(part[1], StandardCharsets.UTF_8)).append(part.length);
    }
    close(splitter);
    return found.toString();
  }

  public static void main(String[] args) {
    System.load(args[0]);
    long model = open(bytes(args[1]), 0), session = session(model), other = session(model);
    int[] prompt = tokenize(model, bytes(args[3]));
    byte[] path = bytes(args[2]);
    String first = all(generate(model, session, prompt, 40, 0.9, 7, new byte[0][], 0));
    save(session, path);
    restore(other, path);
    String again = all(generate(model, other, prompt, 40, 0.9, 7, new byte[0][], 0));
    String stop = first.substring(15, 18);
    String cut = all(generate(model, session, prompt, 40, 0.9, 7, new byte[][] {bytes(stop)}, 0));
    long cancelled = generate(model, session, prompt, -1, -1, 0, new byte[0][], 0);
    cancel(cancelled);
    String none = all(cancelled);
    boolean stopped = cut.equals(first.substring(0, first.indexOf(stop)));
    byte[] out = bytes(first + "|" + again.equals(first) + "|" + stopped + "|" + none.isEmpty()
        + "|" + parts(model, "a \U0001f642 </th", "ink>\\n b"));
    System.out.write(out, 0, out.length);
    System.out.flush();
    refused(() -> chat(model, null, new byte[][] {bytes("user"), bytes("Hi")}, new int[] {0}));
    byte[][] called = {bytes("user"), bytes("Hi"), bytes("assistant"), bytes(""), bytes("f"), bytes("{}"),
        bytes("tool"), bytes("y")};
    refused(() -> chat(model, null, called, new int[] {0, 1, 0}));
    refused(() -> chat(model, bytes("[] x"), called, new int[] {0, 1, 0}));
    refused(() -> generate(model, session, new int[0], 1, 0, 0, new byte[0][], 0));
    close(other);
    close(session);
    close(model);
    refused(() -> session(model));
    refused(() -> split(77, null));
    refused(() -> open(bytes("not \U0001f642 here"), 0));
    open(bytes("nothing"), 0);
  }
}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK: javac, java and jni.h"),
]


def test_both_sides_declare_the_same_functions() -> None:
    kotlin = re.findall(r"external fun (\w+)\(", (SAMPLE / "kotlin" / "MoecModel.kt").read_text("utf-8"))
    native = re.findall(r"Java_dev_moec_MoecModel_(\w+)\(", (SAMPLE / "cpp" / "moec_jni.cpp").read_text("utf-8"))
    assert sorted(kotlin) == sorted(native) == sorted(re.findall(r"native .*? (\w+)\(", JAVA))


def test_a_java_machine_says_what_python_says(tiny: TinyModels, tmp_path: Path) -> None:
    jdk = Path(shutil.which("javac") or "").resolve().parents[1]
    runtime, library = Path(runtime_library()), tmp_path / "libmoec_jni.so"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared", f"-I{INCLUDE}"]
    command += [f"-isystem{folder}" for folder in (jdk / "include", jdk / "include" / "linux")]
    command += [str(SAMPLE / "cpp" / "moec_jni.cpp"), "-o", str(library), "-Wl,--no-undefined", str(runtime)]
    done = subprocess.run(
        [*command, f"-Wl,-rpath,{runtime.parent}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning:" not in done.stderr

    source = tmp_path / "dev" / "moec" / "MoecModel.java"
    source.parent.mkdir(parents=True)
    source.write_text(JAVA, "utf-8")
    subprocess.run(["javac", "-d", str(tmp_path), str(source)], check=True, timeout=120)
    artifact = Artifact.open(tiny(tiny_text(context=512)) / "artifact")
    prompt = "Once upon a 🙂 time"
    arguments = [str(library), str(artifact.folder), str(tmp_path / "kept"), prompt]
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-Dsun.jnu.encoding=UTF-8",
        "-cp",
        str(tmp_path),
        "dev.moec.MoecModel",
        *arguments,
    ]
    java = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, "LC_ALL": "C.UTF-8"})
    with moec.load(artifact) as session:  # type: ignore[attr-defined]
        wanted = "".join(session.generate(prompt, max_new_tokens=40, temperature=0.9, seed=7))
    assert java.stdout.decode() == f"{wanted}|true|true|true|1a 🙂 20 b2", java.stderr[-3000:]
    told = java.stderr.decode()
    for words in (
        "no chat template",
        "turns[1]: calls and what tools answer need the tools",
        "tools: is not JSON, at byte 3",
        "no tokens",
        "is no open artifact",
        "77 is no open splitter",
        "not ? here/",
        "nothing/manifest.json: No such file",
    ):
        assert words in told
