"""The shipped specs of families that are not ours, as MLIR, executed by IREE and compared with the eager program.

Between them they use what MobileMoE does not: biases, clamped and interleaved experts, limits on groups of experts,
windows, wide heads. The limit is that of codes in `test_mlir_end_to_end.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler import build
from moec.compiler.spec import Spec, load_spec
from moec.sources.transformers_source import TransformersModel
from moec.targets.mlir.functional import exported, signature_of
from tests.interpreter import Interpreter

pytest.importorskip("transformers", reason="needs the transformers extra: pip install 'moec[transformers]'")
pytest.importorskip("torch_mlir", reason="needs the mlir extra: pip install 'moec[mlir]'")
pytest.importorskip("iree.compiler", reason="needs the iree extra: pip install 'moec[iree]'")
pytest.importorskip("iree.runtime", reason="needs the iree extra: pip install 'moec[iree]'")
pytestmark = pytest.mark.usefixtures("trusted")  # programs that were compiled here
slow = pytest.mark.slow

RECURRENT = {"lfm2-moe", "qwen3-next", "qwen3-5-moe", "granite-4-h", "nemotron-h"}  # refused: test_state_families.py
FAMILIES = sorted((Path(__file__).parents[2] / "specs" / "families").glob("*.yaml"))
FAMILIES = [file for file in FAMILIES if file.stem not in RECURRENT]
CALLS = [list(range(3, 14)), [90], [17], [5, 5, 9]]


def with_checkpoint(file: Path, folder: Path) -> Spec:
    """The shipped spec with random weights beside its config; activations and cache float."""
    from moec.sources.random_checkpoint import save_random

    spec = load_spec(file)
    assert isinstance(spec.model, TransformersModel)
    save_random(spec.model.transformers, folder, seed=7)
    raw = spec.model_dump(mode="json")
    raw["model"]["transformers"] = str(folder)
    raw["quantization"] |= {"activations": "fp32", "kv_cache": "fp32"}
    raw["targets"] = {"mlir": {"engine": "iree", "max_tokens": 16, "linalg": False}}
    return Spec.model_validate(raw)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a - b).max(-1) / np.abs(b).max(-1)).max())


@slow
@pytest.mark.parametrize("file", FAMILIES, ids=lambda file: file.stem)
def test_a_family(file: Path, tmp_path: Path) -> None:
    spec = with_checkpoint(file, tmp_path / "model")
    store = build.open_checkpoint(spec, None)
    program, passes = build.program_and_passes(spec, store, "mlir")
    program = build.run_all(program, passes)
    interpreter, wanted, start = Interpreter(program), [], 0
    for ids in CALLS:
        wanted.append(interpreter(torch.tensor([ids]), torch.tensor([start]))[0].numpy())
        start += len(ids)

    signature = signature_of(program)
    function = exported(program, signature, expand=True).module()
    weights = [program.weights[n].load() for n in signature.weights]
    caches, start = [program.weights[n].load() for n in signature.caches], 0
    for ids, rows in zip(CALLS, wanted, strict=True):
        with torch.no_grad():
            logits, *rest = function(*weights, *caches, torch.tensor([ids]), torch.tensor([start]))
        caches, start = rest[: len(caches)], start + len(ids)
        assert worst(logits[0].numpy(), rows) < 1e-4

    session = build.load(build.compile(spec, out=tmp_path / "artifact"))
    for ids, rows in zip(CALLS, wanted, strict=True):
        got = session.prefill(ids, logits="all")
        assert worst(got, rows) < 1e-4
        assert (got.argmax(-1) == rows.argmax(-1)).all()
    session.close()
