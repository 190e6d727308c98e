"""What each process of the tests of many processes runs: `python -m torch.distributed.run ... -m this JOBS.json`.

A job is the arguments of one run. Next to its --out, OUT.pt is written: the weights after the last stage in float32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moec.compiler.spec import Spec
from moec.training import run
from moec.training.data.shards import Corpus


def perform(job: dict[str, Any]) -> None:
    """One run; its float32 weights, which the checkpoint rounds, are kept aside."""
    out, write = Path(job["out"]), run.write_checkpoint
    stop = job.get("stop_at")

    def writing(folder: Path, config: Any, weights: Any, **options: Any) -> None:
        torch.save({name: value.detach().clone() for name, value in weights.items()}, out.with_suffix(".pt"))
        write(folder, config, weights, **options)

    run.write_checkpoint = writing  # type: ignore[assignment]
    step = run.Trainer.step

    def stepping(trainer: run.Trainer) -> dict[str, Any]:
        if trainer.done == stop:
            raise InterruptedError
        return step(trainer)

    run.Trainer.step = stepping  # type: ignore[method-assign]
    try:
        run.train(
            Spec.model_validate(job["spec"]),
            data=Corpus.open(job["data"]),
            out=out,
            threads=1,
            **job.get("options", {}),
        )
    except InterruptedError:
        pass
    finally:
        run.write_checkpoint, run.Trainer.step = write, step  # type: ignore[method-assign]


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")  # once for all jobs
    for job in json.loads(Path(sys.argv[1]).read_text()):
        perform(job)
    if dist.is_initialized():
        dist.destroy_process_group()
