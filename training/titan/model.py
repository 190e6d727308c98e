"""The trained decoder as torchtitan takes a model: a configuration that builds it, its parallel form, its loss.

R rows, E experts of a layer, D d_model, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call
from torchtitan.components.loss import BaseLoss
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.protocols import BaseModel

from moec.compiler.errors import UserError
from moec.compiler.spec.training import TrainingStage
from moec.sources.decoder.config import DecoderConfig
from moec.sources.decoder.rope import rope_tables
from moec.training.checkpoints import load_weights
from moec.training.experts import Compute
from moec.training.loss import Lesson
from moec.training.model import Forward, TrainingDecoder
from moec.training.moe import Experts
from moec.training.parallel import AllToAll
from moec.training.rounding import Rounding
from moec.training.stage import added, autocast, z_positions


class TitanDecoder(TrainingDecoder, BaseModel):
    """`TrainingDecoder` for one stage: in the stage's precision, and counting the sums of a step.

    sums: of the training batches since it was last set to None, in this process.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """weights: every weight by name, whole, read once; None where a state is loaded instead."""

        decoder: DecoderConfig
        stage: TrainingStage
        rounding: Rounding | None
        compute: Compute
        weights: Iterable[tuple[str, Tensor]] | None

        def update_from_config(self, *, config: Any, **_: Any) -> None:
            """Nothing: the trainer's configuration and this one come from the same spec."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """(parameters, operations of forward and backward per token): 6 for each weight that a token meets, 12
            for each product of attention (Kaplan et al. 2020, Chowdhery et al. 2022)."""
            total = sum(p.numel() for p in model.parameters())
            experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
            moe, heads = self.decoder.moe, self.decoder.heads * self.decoder.head_dim
            met = total - experts + (experts * moe.top_k // moe.experts if moe else 0)
            return total, 6 * met + 12 * self.decoder.layers * heads * seq_len

        def to_dict(self) -> dict[str, Any]:
            return {"decoder": self.decoder.model_dump(mode="json"), "stage": self.stage.model_dump(mode="json")}

    def __init__(self, config: Config) -> None:
        super().__init__(config.decoder, config.rounding, config.compute)
        self.stage, self._weights = config.stage, config.weights
        self.sums: Forward | None = None
        self.set_capacity(config.stage.dispatch.capacity_factor)

    def verify_module_protocol(self) -> None:
        """Nothing: moec's modules are initialised here and spread by `parallelize`, not each by itself."""

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Fill the memory that torchtitan made: with the weights, and the tables that no checkpoint holds."""
        del buffer_device
        if self._weights is not None:
            load_weights(self, self._weights)
            self._weights = None
        cos_SQ, sin_SQ = rope_tables(self.config.rope, self.config.context, self.config.head_dim)
        self.rope_cos.copy_(cos_SQ)
        self.rope_sin.copy_(sin_SQ)

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[Tensor, ...]:
        """As `TrainingDecoder`; with targets, in training, `sums` grows by what it returns."""
        with autocast(self.stage, tokens_BT.device):
            out = super().forward(tokens_BT, documents_BT, targets_BT, mask_BT, lesson)
        if self.training and targets_BT is not None:
            self.sums = added(self.sums, Forward(*out))
        return out


class StageLoss(BaseLoss):
    """nll / weight + z_loss * z / positions: the share of this process; the sum over processes is the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """z_loss: its weight. positions: what it is a mean over, in all processes (`z_positions`)."""

        z_loss: float
        positions: int

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        del compile_config  # the loss is computed in the model, where the logits never exist as a whole
        self._config = config

    def __call__(
        self, pred: tuple[Tensor, ...], labels: Tensor, global_valid_tokens: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred: the fields of `Forward`. global_valid_tokens: int64 [], labels of all processes that count."""
        del labels
        assert global_valid_tokens is not None
        out = Forward(*pred)
        loss = out.nll / global_valid_tokens.clamp(min=1)
        return loss + self._config.z_loss * out.z / self._config.positions, {}


def loss_of(model: TrainingDecoder, stage: TrainingStage) -> StageLoss.Config:
    return StageLoss.Config(z_loss=stage.z_loss, positions=z_positions(model, stage))


def parallelize(model: TitanDecoder, *, parallel_dims: ParallelDims, **_: Any) -> TitanDecoder:
    """The whole model, on the meta device, as this process's share of it.

    FSDP2 shards every weight over torchtitan's mesh `fsdp`, and what its experts are is left of `ep` over `efsdp`:
    experts are split by `ep`, and the processes that hold the same ones shard them along the next dimension.
    """
    if parallel_dims.world_size == 1:
        return model
    mesh, placed = parallel_dims.get_mesh("fsdp"), None
    if parallel_dims.ep_enabled:
        _split_experts(model, parallel_dims.get_mesh("ep"))
        placed = _placement(model, mesh, parallel_dims.get_mesh("efsdp"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placed)
    fully_shard(model, mesh=mesh)
    disable_fsdp_gradient_division(model)  # `StageLoss` is a share of a sum
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that scales, not even by 1
    return model


def _split_experts(model: TitanDecoder, mesh: DeviceMesh) -> None:
    """Experts become tensors sharded over `mesh`, and rows travel to them."""
    for block in model.blocks:
        for name, parameter in list(block.experts.named_parameters()):
            share = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            setattr(block.experts, name, nn.Parameter(share))
        block.exchange = _Exchange(mesh)


class _Exchange:
    """`AllToAll` to experts whose parameters are sharded tensors: they compute with the part that is here."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._exchange = AllToAll(mesh)

    def __call__(self, experts: Experts, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        def here(rows: Tensor, counts: Tensor) -> Tensor:
            parts = {name: p.to_local() for name, p in experts.named_parameters() if isinstance(p, DTensor)}
            return functional_call(experts, parts, (rows, counts))

        return self._exchange(here, rows_RD, counts_E)


def _placement(
    model: TitanDecoder, mesh: DeviceMesh, copies: DeviceMesh
) -> Callable[[nn.Parameter], ShardPlacementResult]:
    """Experts along dimension 1 over `copies` (0 is split already), everything else along 0 over `mesh`.

    UserError if the experts cannot be cut evenly. Per-parameter meshes are an interface between FSDP2 and torchtitan,
    whose own experts are placed by it.
    """
    experts = {p for block in model.blocks for p in block.experts.parameters()}
    for parameter in experts:
        if parameter.shape[1] % copies.size():
            raise UserError(
                f"{copies.size()} processes cannot share {parameter.shape[1]} rows of an expert evenly",
                remedy="raise training.expert_parallel, or use --backend torch",
            )
    split = ShardPlacementResult(placement=Shard(1), mesh_info=FSDPMeshInfo(mesh=copies, shard_mesh_dim=0))
    whole = ShardPlacementResult(placement=Shard(0), mesh_info=FSDPMeshInfo(mesh=mesh, shard_mesh_dim=0))
    return lambda parameter: split if parameter in experts else whole
