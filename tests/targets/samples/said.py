"""What Python says where the samples in other languages are asked the same, and an artifact that knows tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import moec
from moec.assistant.native_text import FILE as TEXT
from moec.assistant.native_text import tables
from moec.assistant.role_form import FILE as ROLES
from moec.assistant.role_form import role_form
from moec.compiler.tokenizer import load_tokenizer
from tests.assistant.conversations import template
from tests.runtime import app
from tests.tiny import TinyModels, tiny_text

SPEC = tiny_text(context=512)


def talking_artifact(tiny: TinyModels, folder: Path) -> Path:
    """The artifact of SPEC with a chat template that knows tools, in `folder`."""
    shutil.copytree(tiny(SPEC) / "artifact", folder)
    hermes = template("hermes")
    (folder / "chat_template.jinja").write_text(hermes.text, "utf-8")
    (folder / ROLES).write_text(role_form(hermes).json(), "utf-8")
    (folder / TEXT).write_bytes(tables(folder, load_tokenizer(folder / "tokenizer.json")))
    return folder


def said_by_python(artifact: Path, talking: Path, prompt: str) -> dict[str, str]:
    """The lines of Check.kt and Check.swift that are answers. Conversations are rendered by the library, which other
    tests compare with the template."""
    every = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "repeat_penalty": 1.1}
    every |= {"presence_penalty": 0.2, "frequency_penalty": 0.1, "seed": 2**64 - 3}
    opened = app.open_artifact(talking)
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"n": 1.5}}}]
    turns = [app.turn("user", "Hi"), app.turn("assistant", "", [("f", '{"n": 2}')]), app.turn("tool", "two")]
    called = app.chat_with_tools(opened, json.dumps(tools), turns)
    asked = app.chat(opened, [("system", "Be brief."), ("user", "Name a 🙂 city.")])
    app.call("close", opened)
    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "all": (prompt, {"max_new_tokens": 40, "logit_bias": {5: 2.0, 7: -float("inf")}, **every}),
        "sampled": (prompt, {"max_new_tokens": 40, "temperature": 0.9, "seed": 7}),
        "answer": (asked, {"max_new_tokens": 30, "temperature": 0.9, "seed": 5}),
        "tools": (called, {"max_new_tokens": 8}),
    }
    with moec.load(artifact) as session:
        wanted = {name: "".join(session.generate(prompt, **given)) for name, (prompt, given) in runs.items()}
        scored = session.generate(prompt, max_new_tokens=3, temperature=0.9, seed=7, top_scores=2)
        assert "".join(scored)
    wanted["scores"] = str([[one.token, *(token for token, _ in one.top)] for one in scored.scores])
    wanted["likely"] = " ".join(f"{one.log_probability:.9f}" for one in scored.scores)
    return {name: text.replace("\n", "\\n") for name, text in wanted.items()}
