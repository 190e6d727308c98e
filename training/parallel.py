"""Training in one process or many: shared sums, experts split over processes, all other weights sharded.

Launched by `python -m torch.distributed.run`, W processes see W shares of every batch. Experts are split over
`expert_parallel` processes and rows travel to them and back (all-to-all); all other weights are sharded by FSDP2. With
fewer expert-parallel processes than processes, groups of them hold equal copies of the experts.

R rows, E experts of a layer, P processes of an expert-parallel group, D d_model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from moec.compiler.errors import UserError
from moec.training.checkpoints import load_weights
from moec.training.dispatch import reordered
from moec.training.model import TrainingDecoder
from moec.training.moe import Experts

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes of a run. `mesh` is [copies of the experts, processes that split them], None for one process."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def expert_copies(self) -> int:
        return 1 if self.mesh is None else self.mesh["copies"].size()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in all of them."""
        if self.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        return flag if self.size == 1 else bool(self.total(torch.tensor(int(flag))))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def same(self, value: Any) -> Any:
        """The main process's value, in all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def average_experts(self, grads: list[Tensor]) -> None:
        """Gradients of experts hold the rows of all processes of a group: sum over copies, divide as FSDP does."""
        if self.mesh is None:
            return
        for grad in grads:
            if self.expert_copies > 1:
                dist.all_reduce(grad, group=self.mesh.get_group("copies"))
            grad.div_(self.size)


@contextmanager
def joined(expert_parallel: int | None, experts: int, device: str | None) -> Iterator[World]:
    """The world that the launcher's environment describes; one process without a launcher.

    UserError if the processes cannot share `experts` experts evenly.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if size == 1:
        yield World(device=where)
        return
    split = min(expert_parallel or size, size) if experts else 1
    if size % split or (experts and experts % split):
        raise UserError(
            f"{size} processes cannot split {experts} experts over groups of {split}",
            remedy="set training.expert_parallel to a divisor of both",
        )
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    owns = not dist.is_initialized()
    if owns:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(where.type, (size // split, split), mesh_dim_names=("copies", "experts"))
        yield World(dist.get_rank(), size, where, mesh)
    finally:
        if owns:
            dist.destroy_process_group()


def spread(model: TrainingDecoder, world: World) -> TrainingDecoder:
    """Keep this process's share of a model without values yet: the parameters of `model` are replaced.

    Memory that was never written is not held, so that no process ever holds a whole model: `load_share` comes after.
    """
    if world.mesh is None:
        return model.to(world.device)
    group = world.mesh["experts"]
    for block in model.blocks:
        for name, parameter in list(block.experts.named_parameters()):
            share = _expert_share(parameter.detach(), world)
            setattr(block.experts, name, nn.Parameter(torch.empty_like(share, device=world.device)))
        if group.size() > 1:
            block.exchange = AllToAll(group)
    ignored = {p for block in model.blocks for p in block.experts.parameters()}
    flat = init_device_mesh(world.device.type, (world.size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=flat, ignored_params=ignored)
    fully_shard(model, mesh=flat, ignored_params=ignored)
    return model.to(world.device)  # the buffers; parameters are there already


@torch.no_grad()
def load_share(model: TrainingDecoder, weights: Iterable[tuple[str, Tensor]], world: World) -> None:
    """Copy this process's share of every weight, each given whole and one after the other, into a spread model."""
    if world.mesh is None:
        load_weights(model, weights)
        return
    experts = _expert_names(model)
    shares = ((name, _expert_share(value, world) if name in experts else value) for name, value in weights)
    load_weights(model, shares)


def _expert_share(whole: Tensor, world: World) -> Tensor:
    """The experts [E / P, ...] of this process: they are split in order."""
    assert world.mesh is not None
    group = world.mesh["experts"]
    return whole.chunk(group.size(), dim=0)[group.get_local_rank()]


def _expert_names(model: TrainingDecoder) -> set[str]:
    modules = (name for name, module in model.named_modules() if isinstance(module, Experts))
    return {f"{name}.{parameter}" for name in modules for parameter in ("gate_up_proj", "down_proj")}


def reshard(model: TrainingDecoder) -> None:
    """Put shares back where a forward pass without a backward left whole parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shared_state(model: TrainingDecoder, world: World, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, named after parameters (up to a `/`), with shares of experts as parts of whole sharded tensors."""
    if world.mesh is None:
        return tensors
    experts = _expert_names(model)

    def whole(name: str, value: Tensor) -> Tensor:
        if name.split("/")[0] not in experts:
            return value
        return DTensor.from_local(value.detach(), world.mesh, [Replicate(), Shard(0)], run_check=False)

    return {name: whole(name, value) for name, value in tensors.items()}


class WholeWeights(Mapping[str, Tensor]):
    """The weights of a spread model by name, each put together from the processes when it is asked for.

    Asking is a collective: all processes ask for the same names in the same order.
    """

    def __init__(self, model: TrainingDecoder, shares: dict[str, Tensor], world: World) -> None:
        self._shares = shared_state(model, world, shares)

    def __getitem__(self, name: str) -> Tensor:
        share = self._shares[name]
        return share.full_tensor() if isinstance(share, DTensor) else share

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)


class AllToAll:
    """Rows, sorted by expert, to the processes that hold their experts, and their outputs back."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group, self._size = mesh.get_group(), mesh.size()

    def __call__(self, experts: Callable[[Tensor, Tensor], Tensor], rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        sent_PE = counts_E.view(self._size, -1)  # experts are split in order
        got_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(got_PE, sent_PE, group=self._group)
        out_sizes, in_sizes = sent_PE.sum(1).tolist(), got_PE.sum(1).tolist()
        arrived_RD = _Exchange.apply(rows_RD, out_sizes, in_sizes, self._group)
        # by sender and then expert; the experts want all rows of one of them together
        expert_R = torch.arange(got_PE.shape[1], device=rows_RD.device).repeat(self._size)
        order_R = torch.repeat_interleave(expert_R, got_PE.flatten()).argsort(stable=True)
        back_R = order_R.argsort()
        computed_RD = experts(reordered(arrived_RD, order_R, back_R), got_PE.sum(0))
        return _Exchange.apply(reordered(computed_RD, back_R, order_R), in_sizes, out_sizes, self._group)


class _Exchange(torch.autograd.Function):
    """all-to-all of rows; its gradient is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out_sizes: list[int], in_sizes: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = (out_sizes, in_sizes), group
        got = rows.new_empty(sum(in_sizes), rows.shape[1])
        dist.all_to_all_single(got, rows.contiguous(), in_sizes, out_sizes, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        out_sizes, in_sizes = ctx.sizes
        back = grads[0].new_empty(sum(out_sizes), grads[0].shape[1])
        dist.all_to_all_single(back, grads[0].contiguous(), out_sizes, in_sizes, group=ctx.group)
        return back, None, None, None
