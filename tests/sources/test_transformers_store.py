"""Checkpoints of other people, tensor by tensor: sharded files, experts stored one by one, tied and renamed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.compiler.errors import CheckpointError
from moec.compiler.spec import load_spec
from moec.sources.random_checkpoint import save_random
from moec.sources.transformers_model import TransformersStore
from moec.sources.transformers_source import TransformersModel

transformers = pytest.importorskip(
    "transformers", reason="needs the transformers extra: pip install 'moec[transformers]'"
)
FAMILIES = sorted((Path(__file__).parents[2] / "specs" / "families").glob("*.yaml"))


def _saved(file: Path, folder: Path, **changes: object) -> tuple[Path, torch.nn.Module]:
    source = load_spec(file).model
    assert isinstance(source, TransformersModel)
    save_random(source.transformers, folder / "whole", seed=1, changes=changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32)
    model.save_pretrained(folder / "sharded", max_shard_size="60KB")
    return folder / "sharded", model


@pytest.mark.parametrize("file", FAMILIES, ids=lambda f: f.stem)
def test_every_tensor_is_read_alone(file: Path, tmp_path: Path) -> None:
    folder, model = _saved(file, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 2
    store = TransformersStore(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(store.reader(name, tuple(tensor.shape))(), tensor), name
    stored = set(store._entries)
    if file.stem in ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3"):
        assert any(".experts.3." in name for name in stored), "the checkpoint stores experts one by one"
        assert any(name.endswith("experts.gate_up_proj") for name in model.state_dict())


def test_tied_tables(tmp_path: Path) -> None:
    folder, model = _saved(FAMILIES[-1], tmp_path, tie_word_embeddings=True)
    store = TransformersStore(folder)
    assert "lm_head.weight" not in store._entries
    table = model.get_input_embeddings().weight
    assert torch.equal(store.reader("lm_head.weight", tuple(table.shape))(), table)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """Which of them counts, nobody can say; it was the first by name."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "norm.weight": torch.full((16,), 5.0)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight and norm\.weight, which are both"):
        TransformersStore(tmp_path).check(tmp_path)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    folder, _ = _saved(FAMILIES[-1], tmp_path)
    store = TransformersStore(folder)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.nothing"):
        store.reader("model.nothing", (1,))()
    with pytest.raises(CheckpointError, match="has shape"):
        store.reader("model.norm.weight", (3,))()


READ_ALL = """
import resource, sys
import torch
from pathlib import Path
from moec.sources.transformers_model import TransformersStore
from moec.sources.conversions import Conversions
store = TransformersStore(Path(sys.argv[1]))
store.reader("model.norm.weight", (1024,))()
store.reader("lm_head.weight", (1024, 1024))()
shapes = {"gate_up_proj": (16, 2048, 1024), "down_proj": (16, 1024, 1024)}
store.reader("model.layers.0.mlp.experts.down_proj", shapes["down_proj"])()
def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(next(l for l in text.splitlines() if l.startswith("RssAnon")).split()[1]) / 1024
base = anonymous()
peak, total = 0.0, 0
for layer in range(12):
    for name, shape in shapes.items():
        value = store.reader(f"model.layers.{layer}.mlp.experts.{name}", shape)()
        assert abs(float(value[3, 0, 0]) - (layer + 3 / 16)) < 1e-2
        peak = max(peak, anonymous() - base)
        total += value.numel() * 2
print(total / 2**20, peak)
"""


@pytest.mark.slow
def test_a_large_checkpoint_is_streamed(tmp_path: Path) -> None:
    """1.2 GB in 12 shards of per-expert tensors: what is in memory at once is one stacked tensor."""
    config = transformers.MixtralConfig(
        hidden_size=1024, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
        num_local_experts=16, vocab_size=1024, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    index = {}
    for layer in range(12):
        tensors = {
            f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight": torch.full(
                (1024, 1024), layer + e / 16, dtype=torch.bfloat16
            )
            for e in range(16)
            for w in ("w1", "w2", "w3")
        }
        if layer == 0:
            tensors |= {"model.norm.weight": torch.ones(1024), "lm_head.weight": torch.zeros(1024, 1024)}
        file = f"model-{layer + 1:05}-of-00012.safetensors"
        save_file(tensors, tmp_path / file)
        index |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    total, peak = map(float, done.stdout.split()[-2:])
    assert total > 1100
    # gate_up_proj of a layer: 64 MB of pieces, 64 MB joined, 128 MB in float32, and what the allocator keeps of another
    assert peak < 420, f"{peak:.0f} MB beside the mapped files, of {total:.0f} MB"
    print(f"{total:.0f} MB of experts read, at most {peak:.0f} MB in memory")
