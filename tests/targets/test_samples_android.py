"""The native side of the Android sample, compiled with the wheel's ExecuTorch and called from a Java machine.

There is no Android toolchain and no Kotlin here: a class of the same name, in Java, declares the functions that
MoecModel.kt declares and calls them as it does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moec.runtime.native import executorch_folder, kernels_library
from tests.runtime import runtime_model as m
from tests.targets.test_samples_cpp import PROMPT, continued

SAMPLE = Path(__file__).parents[2] / "samples" / "android"
RUNNER = Path(__file__).parents[2] / "runtime" / "runner"
JAVA = """
package dev.moec;
public class MoecModel {
  private static native long open(String path);
  private static native void close(long handle);
  private static native long vocabSize(long handle);
  private static native long context(long handle);
  private static native long maxTokens(long handle);
  private static native float[] forward(long handle, long[] ids, long start);

  public static void main(String[] args) {
    System.load(args[0]);
    long handle = open(args[1]);
    System.out.println(vocabSize(handle) + " " + context(handle) + " " + maxTokens(handle));
    try {
      forward(handle, new long[] {97}, 0);
    } catch (IllegalStateException e) {
      System.out.println(e.getMessage());
    }
    int chunk = (int) maxTokens(handle);
    long[] ids = new long[args.length - 3];
    for (int i = 0; i < ids.length; i++) ids[i] = Long.parseLong(args[i + 3]);
    long position = 0;
    for (int n = Integer.parseInt(args[2]); n > 0; n--) {
      float[] logits = null;
      for (int begin = 0; begin < ids.length; begin += chunk) {
        long[] part = java.util.Arrays.copyOfRange(ids, begin, Math.min(begin + chunk, ids.length));
        logits = forward(handle, part, position);
        position += part.length;
      }
      int best = 0;
      for (int i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
      System.out.println(best);
      ids = new long[] {best};
    }
    close(handle);
    open("nothing");
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


def test_a_java_machine_generates_what_eager_does(tmp_path: Path) -> None:
    jdk = Path(shutil.which("javac") or "").resolve().parents[1]
    wheel, kernels = executorch_folder(), kernels_library()
    headers = (jdk / "include", jdk / "include" / "linux", wheel / "include",
               wheel / "include/executorch/runtime/core/portable_type/c10")  # fmt: skip
    libraries = ("executorch", "executorch_threadpool", "executorch_kernels_optimized", "executorch_backend_xnnpack")
    library = tmp_path / "libmoec_jni.so"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fPIC", "-shared"]
    command += ["-DC10_USING_CUSTOM_GENERATED_MACROS", *(f"-isystem{folder}" for folder in headers)]
    names = re.findall(r"set\(names (.*?)\)", (RUNNER / "sources.cmake").read_text("utf-8"))[0].split()
    command += [f"-I{RUNNER}", f"-I{RUNNER.parent / 'kernels'}", *(str(RUNNER / f"{name}.cpp") for name in names)]
    command += [str(SAMPLE / "cpp" / "moec_jni.cpp"), "-o", str(library), "-Wl,--no-undefined,--no-as-needed"]
    command += [str(kernels), f"-L{wheel / 'lib'}", *(f"-l{name}" for name in libraries)]
    command += [f"-Wl,-rpath,{wheel / 'lib'}:{Path(kernels).parent}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning:" not in done.stderr

    source = tmp_path / "dev" / "moec" / "MoecModel.java"
    source.parent.mkdir(parents=True)
    source.write_text(JAVA, "utf-8")
    subprocess.run(["javac", "-d", str(tmp_path), str(source)], check=True, timeout=120)
    eager = m.write_pte(tmp_path / "model.pte")
    arguments = [str(library), str(tmp_path / "model.pte"), "6", *map(str, PROMPT)]
    java = subprocess.run(
        ["java", "-cp", str(tmp_path), "dev.moec.MoecModel", *arguments], capture_output=True, text=True, timeout=120
    )
    said, refused, *ids = java.stdout.splitlines()
    assert said == f"97 {m.S} {m.MAX_TOKENS}"
    assert refused == "token 97 is not in 0 .. 96"
    assert [int(token) for token in ids] == continued(eager, PROMPT, 6)
    assert "IllegalStateException: cannot load the model: No such file or directory" in java.stderr
