"""moec.h as a clang module, which is how Swift and Objective-C import it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

INCLUDE = Path(__file__).parents[2] / "runtime" / "include"
CLANG = shutil.which("clang") or shutil.which("clang-14")
USES = """
@import CMoec;
static int32_t each(void *user, const char *piece, int64_t bytes) { (void)user; (void)piece; return bytes < 0; }
int main(void) {
  moec_app_options options = {.size = sizeof options};
  moec_app_segment part = {.size = sizeof part};
  int64_t model = moec_app_open("model", 0);
  if (model < 0 || moec_app_defaults(model, &options) != 0) return MOEC_APP_FAILED;
  options.segments = MOEC_APP_SEGMENTS | MOEC_APP_TOOLS;
  return moec_app_run(model, each, 0) + moec_app_next_segment(model, &part);
}
"""


# clang modules are clang's alone: g++, which builds the rest, cannot read a module map
@pytest.mark.skipif(CLANG is None, reason="needs clang, whose modules Swift imports")
def test_it_is_a_module(tmp_path: Path) -> None:
    (tmp_path / "uses.m").write_text(USES)
    command = [str(CLANG), "-fmodules", f"-fmodules-cache-path={tmp_path}", "-fsyntax-only", "-std=c11", "-pedantic"]
    command += [f"-fmodule-map-file={INCLUDE / 'module.modulemap'}", f"-I{INCLUDE}", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([*command, str(tmp_path / "uses.m")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "uses.m").write_text(USES.replace("moec_app_run(model", "moec_app_run(&options"))
    wrong = subprocess.run(
        [*command, str(tmp_path / "uses.m")], capture_output=True, text=True, timeout=60, check=False
    )
    assert wrong.returncode != 0  # the types are those of the header
