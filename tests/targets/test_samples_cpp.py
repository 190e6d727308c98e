"""The C++ sample of docs/android.md compiles against the wheel and generates what the eager model does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moec
from moec.assistant.native_text import FILE as TEXT
from moec.assistant.native_text import tables
from moec.assistant.role_form import FILE as ROLES
from moec.assistant.role_form import role_form
from moec.compiler.tokenizer import load_tokenizer
from moec.runtime.native import executorch_folder, kernels_library, runtime_library
from tests.assistant.conversations import template
from tests.runtime import app
from tests.runtime import runtime_model as m
from tests.tiny import TinyModels, tiny_text

SAMPLE = Path(__file__).parents[2] / "samples" / "cpp"


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)  # installed by pip, beside python


def built(build: Path, *options: str) -> Path:
    for command in (
        [
            *(tool("cmake"), "-S", str(SAMPLE), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            *options,
        ],
        [tool("cmake"), "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "warning:" not in done.stdout
    return build / "moec_sample"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runtime as it is built already."""
    return built(tmp_path_factory.mktemp("sample"), f"-DMOEC_RUNTIME={runtime_library()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, m.OneLayer]:
    path = tmp_path_factory.mktemp("model") / "model.pte"
    return path, m.write_pte(path)


def run(sample: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(sample), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


# 19 tokens: two chunks of at most 16
PROMPT = [5, 6, 7, 90, 11, 3, 4, 8, 9, 10, *range(12, 21)]


def continued(eager: m.OneLayer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the eager model, the prompt in the chunks that a sample makes."""
    ids, chunk, position = [], torch.tensor([prompt]), 0
    with torch.no_grad():
        for _ in range(count):
            logits = None
            for piece in chunk.split(m.MAX_TOKENS, dim=1):
                logits = eager(piece, torch.tensor([position]))
                position += piece.shape[1]
            assert logits is not None
            ids.append(int(logits[0, -1].argmax()))
            chunk = torch.tensor([[ids[-1]]])
    return ids


def test_it_generates_what_eager_does(sample: Path, model: tuple[Path, m.OneLayer]) -> None:
    path, eager = model
    done = run(sample, path, 6, *PROMPT)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == continued(eager, PROMPT, 6)


@pytest.mark.slow
def test_it_compiles_the_runtime(model: tuple[Path, m.OneLayer], tmp_path: Path) -> None:
    """As an application does: from sources, against the wheel."""
    options = (f"-DCMAKE_PREFIX_PATH={executorch_folder()}", f"-DMOEC_KERNELS={kernels_library()}")
    path, eager = model
    done = run(built(tmp_path, *options), path, 6, *PROMPT)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == continued(eager, PROMPT, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage"),
        (("x", "3", "1"), "cannot load"),
        (("MODEL", "3", "97"), "token 97 is not in 0 .. 96"),
        (("MODEL", "3", "-1"), "token -1 is not in 0 .. 96"),
        (("MODEL", "3", "a"), "a is not a token id"),
        (("MODEL", "3", *["1"] * 300), "300 tokens do not fit"),
    ],
)
def test_faults_are_told(sample: Path, model: tuple[Path, m.OneLayer], arguments: tuple[str, ...], said: str) -> None:
    done = run(sample, *(str(model[0]) if a == "MODEL" else a for a in arguments))
    assert done.returncode in (1, 2)
    assert said in done.stderr


def test_a_conversation_is_that_of_python(sample: Path, tiny: TinyModels, tmp_path: Path) -> None:
    artifact, folder = tiny(tiny_text()) / "artifact", tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    (folder / ROLES).write_text(role_form(template("chatml")).json(), "utf-8")
    (folder / TEXT).write_bytes(tables(folder, load_tokenizer(folder / "tokenizer.json")))
    chat = [str(sample.parent / "moec_chat"), str(folder)]
    done = subprocess.run([*chat, "Be brief."], input="Name a city.\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    opened = app.open_artifact(folder)
    prompt = app.chat(opened, [("system", "Be brief."), ("user", "Name a city.")])
    app.call("close", opened)
    with moec.load(artifact) as session:
        answer = session.generate(prompt)
        assert done.stdout == "".join(answer) + "\n"
    assert f"{answer.stats.new_tokens} new in" in done.stderr
    without = subprocess.run([*chat, "", str(folder / ROLES)], input="x", capture_output=True, text=True, timeout=60)
    assert (without.returncode, "tools: is no list" in without.stderr) == (1, True)
    hermes = template("hermes")
    (folder / "chat_template.jinja").write_text(hermes.text, "utf-8")
    (folder / ROLES).write_text(role_form(hermes).json(), "utf-8")
    (folder / TEXT).write_bytes(tables(folder, load_tokenizer(folder / "tokenizer.json")))
    tools = [{"type": "function", "function": {"name": "f", "description": "\u00e9", "parameters": {"n": 1.50}}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    with_tools = [*chat, "Be brief.", str(tmp_path / "tools.json")]
    done = subprocess.run(with_tools, input="Name a city.\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    opened = app.open_artifact(folder)
    turns = [app.turn("system", "Be brief."), app.turn("user", "Name a city.")]
    prompt = app.chat_with_tools(opened, json.dumps(tools), turns)
    app.call("close", opened)
    with moec.load(artifact) as session:  # which says no call
        assert done.stdout == "".join(session.generate(prompt)) + "\n"
    damaged = subprocess.run([chat[0], str(tmp_path)], input="x", capture_output=True, text=True, timeout=60)
    assert (damaged.returncode, "manifest.json" in damaged.stderr) == (1, True)
