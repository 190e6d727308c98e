"""What each process of the tests of many processes runs: `python -m torch.distributed.run ... -m this JOBS.json`.

A job is the arguments of one run. Next to its --out, OUT.pt is written: the weights after the last stage in float32.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moec.compiler.spec import Spec
from moec.sources.decoder.config import DecoderConfig
from moec.training import run, stages
from moec.training.checkpoints import initial_weights
from moec.training.data.shards import Corpus
from moec.training.model import TrainingDecoder
from moec.training.parallel import joined, load_share, spread


class BrokenOff(Exception):
    """The job asked for it: behind `stop_at` steps, when their state was saved."""


def perform(job: dict[str, Any]) -> None:
    """One run; its float32 weights, which the checkpoint rounds, are kept aside."""
    out, write = Path(job["out"]), stages.write_checkpoint
    stop = job.get("stop_at")

    def writing(folder: Path, config: Any, weights: Any, **options: Any) -> None:
        whole = {name: value.clone() for name, value in weights.items()}  # once: asking is a collective
        torch.save(whole, out.with_suffix(".pt"))
        write(folder, config, whole, **options)

    stages.write_checkpoint = writing  # type: ignore[assignment]
    save = stages.StateStore.save

    def saving(store: stages.StateStore, position: Any, tensors: Any = None) -> None:
        save(store, position, tensors)
        if position.step == stop:
            raise BrokenOff

    stages.StateStore.save = saving  # type: ignore[method-assign]
    try:
        run.train(
            Spec.model_validate(job["spec"]),
            data=Corpus.open(job["data"]),
            out=out,
            threads=1,
            **job.get("options", {}),
        )
    except BrokenOff:
        pass
    finally:
        stages.write_checkpoint, stages.StateStore.save = write, save  # type: ignore[method-assign]


def measure(job: dict[str, Any]) -> None:
    """How much memory a process took, in bytes, to hold its share of a model's initial weights: OUT.RANK.json."""
    spec = Spec.model_validate(job["spec"])
    config = spec.model
    assert isinstance(config, DecoderConfig)
    assert config.moe is not None
    before = _peak()
    with joined(None, config.moe.experts, "cpu") as world:
        model = spread(TrainingDecoder(config), world)
        load_share(model, initial_weights(config, 0), world)
        Path(f"{job['out']}.{world.rank}.json").write_text(json.dumps(_peak() - before))


def _peak() -> int:
    """Bytes; of this program alone, which `getrusage` is not: it remembers the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")  # once for all jobs
    for job in json.loads(Path(sys.argv[1]).read_text()):
        (measure if job.get("measure") else perform)(job)
    if dist.is_initialized():
        dist.destroy_process_group()
