"""One MoE layer in every implementation that `bench_kernel.py` times, over the same INT4 weights.

T tokens, D model width, F expert width, E experts, S shared width. Each contender is a class over one `Layer`; its
`bind(x, threads)` gives a function of no arguments: what is timed. Weights are codes and scales, groups of 32 inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moec.compiler.ops.attributes import Experts, Routing
from moec.compiler.quant import pack_int4
from moec.runtime import kernel_api
from moec.runtime.moe_config import Kind, MoeConfig, WeightFormat
from moec.targets.xnnpack import packing

GROUP = 32
SIGMOID = Routing(score="sigmoid", normalize="sum", scale=2.5)
SOFTMAX = Routing(score="softmax", after_topk=True)
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    d: int = 768
    f: int = 384
    experts: int = 60
    top_k: int = 4
    shared: int = 1536

    def macs(self, tokens: int, *, shared: bool) -> int:
        """Multiply-accumulates of the expert matrices and the router."""
        per = self.top_k * 3 * self.d * self.f + (3 * self.d * self.shared if shared else 0) + self.experts * self.d
        return tokens * per

    def weight_bytes(self, experts_hit: float, *, shared: bool) -> float:
        """Bytes of packed weights that a call has to read once: 4.5 bits each, the router in fp32."""
        weights = experts_hit * 3 * self.d * self.f + (3 * self.d * self.shared if shared else 0)
        return weights * 4.5 / 8 + self.experts * self.d * 4


@dataclass
class Layer:
    """Codes in [-8, 7] int8 and float16 scales of one layer, F.linear convention, gate rows first."""

    shape: Shape
    router: NDArray[np.float32]  # [E, D]
    w13: NDArray[np.int8]  # [E, 2F, D]
    w13_scales: NDArray[np.float16]
    w2: NDArray[np.int8]  # [E, D, F]
    w2_scales: NDArray[np.float16]
    shared_w13: NDArray[np.int8]  # [2S, D]
    shared_w13_scales: NDArray[np.float16]
    shared_w2: NDArray[np.int8]  # [D, S]
    shared_w2_scales: NDArray[np.float16]

    @classmethod
    def random(cls, shape: Shape, seed: int) -> Layer:
        rng = np.random.default_rng(seed)

        def weight(*dims: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
            codes = rng.integers(-8, 8, size=dims, dtype=np.int8)
            scales = rng.uniform(0.1, 0.3, size=(*dims[:-1], dims[-1] // GROUP)) * dims[-1] ** -0.5
            return codes, scales.astype(np.float16)

        router = rng.standard_normal((shape.experts, shape.d), dtype=np.float32) * np.float32(shape.d**-0.5)
        w13, s13 = weight(shape.experts, 2 * shape.f, shape.d)
        w2, s2 = weight(shape.experts, shape.d, shape.f)
        shared13, shared_s13 = weight(2 * shape.shared, shape.d)
        shared2, shared_s2 = weight(shape.d, shape.shared)
        return cls(shape, router, w13, s13, w2, s2, shared13, shared_s13, shared2, shared_s2)


def dequantize(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> torch.Tensor:
    grouped = codes.reshape(*scales.shape, GROUP).astype(np.float32) * scales.astype(np.float32)[..., None]
    return torch.from_numpy(grouped.reshape(codes.shape))


# ----------------------------------------------------------------------------------------------------------------- moec


class Moec:
    """Our kernel. `axis_out`: codes of the same count grouped along the output, as the released QAT checkpoints are."""

    def __init__(self, layer: Layer, *, axis_out: bool = False, shared: bool = True, how: Routing = SIGMOID) -> None:
        s = layer.shape
        routed = WeightFormat(Kind.INT4, GROUP, axis_out=axis_out, int8_activations=True)
        shared_format = WeightFormat(Kind.INT4, GROUP, int8_activations=True)

        def pack(codes: NDArray, scales: NDArray, fmt: WeightFormat, count: int, n: int, k: int) -> NDArray[np.uint8]:
            q, group_scales = torch.from_numpy(codes), torch.from_numpy(scales)
            if fmt.axis_out:  # other numbers, the same work: [.., N, K] groups along K become [.., K, N] groups along N
                q, group_scales = q.reshape(count, k, n), group_scales.reshape(count, k, n // GROUP)
            return packing.pack(pack_int4(q), group_scales, fmt, count, n, k).numpy()

        tensors = kernel_api.MoeTensors(
            router_weight=layer.router,
            w13=pack(layer.w13, layer.w13_scales, routed, s.experts, 2 * s.f, s.d),
            w2=pack(layer.w2, layer.w2_scales, routed, s.experts, s.d, s.f),
        )
        if shared:
            tensors.shared_w13 = pack(layer.shared_w13, layer.shared_w13_scales, shared_format, 1, 2 * s.shared, s.d)
            tensors.shared_w2 = pack(layer.shared_w2, layer.shared_w2_scales, shared_format, 1, s.d, s.shared)
        none = WeightFormat()
        config = MoeConfig(
            experts=s.experts,
            d_model=s.d,
            expert_width=s.f,
            top_k=s.top_k,
            how=how,
            what=Experts(),
            w13=routed,
            w2=routed,
            shared_width=s.shared if shared else 0,
            shared_w13=shared_format if shared else none,
            shared_w2=shared_format if shared else none,
        )
        self.block = kernel_api.PreparedMoe(config, tensors)

    def with_own_shared(self) -> Moec:
        """The same experts beside a copy of the shared expert: another place in memory for what every token reads."""
        tensors = copy.copy(self.block.tensors)
        assert tensors.shared_w13 is not None
        assert tensors.shared_w2 is not None
        tensors.shared_w13, tensors.shared_w2 = tensors.shared_w13.copy(), tensors.shared_w2.copy()
        other = copy.copy(self)
        other.block = kernel_api.PreparedMoe(self.block.config, tensors)
        return other

    def bind(self, x: NDArray[np.float32], threads: int) -> Run:
        y = np.empty_like(x)
        run = self.block.bind(x, y)
        return lambda: (run(), x, y)[0]  # holds the arrays that the foreign call writes to

    def experts_hit(self, x: NDArray[np.float32]) -> int:
        return len(np.unique(self.block(x)[1]))

    def output(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.block(x)[0]


# -------------------------------------------------------------------------------------------- ExecuTorch's own operator


def _torchao_blob(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """The packed layout that llama::quantized_moe_ffn reads ("universal", 8 columns x 16 inputs, in two halves of 8).

    A 64-byte header; then for each 8 outputs and each group of 32 inputs: two blocks of 64 bytes, 8 f32 scales, 8 int32
    sums. A block is [half, column, 8 inputs]; of each 32 values the first 16 are low nibbles, the others high; all
    offset by 8.
    """
    n, k = codes.shape
    values = codes.reshape(n // 8, 8, k // 16, 2, 8).transpose(0, 2, 3, 1, 4).reshape(n // 8, k // 16, 4, 2, 16) + 8
    nibbles = (values[..., 0, :] | values[..., 1, :] << 4).astype(np.uint8).reshape(n // 8, k // GROUP, 128)
    group_scales = scales.astype(np.float32).reshape(n // 8, 8, -1).transpose(0, 2, 1)
    sums = codes.reshape(n // 8, 8, -1, GROUP).sum(-1, dtype=np.int32).transpose(0, 2, 1)
    body = np.concatenate(
        [nibbles, np.ascontiguousarray(group_scales).view(np.uint8), np.ascontiguousarray(sums).view(np.uint8)], axis=-1
    )
    header = np.zeros(16, np.int32)
    header[:7] = [6712, 1, 4, 0, 0, 8, 16]
    return np.concatenate([header.view(np.uint8), body.reshape(-1)])


def _stack(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> torch.Tensor:
    return torch.from_numpy(np.stack([_torchao_blob(q, s) for q, s in zip(codes, scales, strict=True)]))


class Upstream:
    """llama::quantized_moe_ffn of the installed ExecuTorch wheel: routed experts only, always serial."""

    def __init__(self, layer: Layer) -> None:
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        self.layer = layer
        self.w13 = _stack(layer.w13, layer.w13_scales)
        self.w2 = _stack(layer.w2, layer.w2_scales)
        self.router, self.bias = torch.from_numpy(layer.router), torch.zeros(layer.shape.experts)

    def bind(self, x: NDArray[np.float32], threads: int) -> Run:
        s, rows = self.layer.shape, torch.from_numpy(x)
        op = torch.ops.llama.quantized_moe_ffn
        return lambda: op(
            rows,
            self.router,
            self.bias,
            self.w13,
            self.w2,
            s.top_k,
            s.experts,
            s.f,
            s.d,
            GROUP,
            4,
            "sigmoid",
            SIGMOID.scale,
        )

    def output(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        result = self.bind(x, 1)()
        assert isinstance(result, torch.Tensor)
        return result.numpy()


# ----------------------------------------------------------------------------------------------------------- torch fp32


class TorchLoop:
    """fp32 weights, a loop over the experts that were hit, and the shared expert: how one writes it in PyTorch."""

    def __init__(self, layer: Layer, *, shared: bool) -> None:
        self.top_k, self.shared = layer.shape.top_k, shared
        self.router = torch.from_numpy(layer.router)
        self.w13, self.w2 = dequantize(layer.w13, layer.w13_scales), dequantize(layer.w2, layer.w2_scales)
        self.shared_w13 = dequantize(layer.shared_w13, layer.shared_w13_scales)
        self.shared_w2 = dequantize(layer.shared_w2, layer.shared_w2_scales)

    @staticmethod
    def _mlp(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        gate, up = torch.nn.functional.linear(x, w13).chunk(2, -1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.sigmoid(x @ self.router.t())
        weights, indices = scores.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True) * SIGMOID.scale
        y = self._mlp(x, self.shared_w13, self.shared_w2) if self.shared else torch.zeros_like(x)
        for expert in indices.unique().tolist():
            token, rank = (indices == expert).nonzero(as_tuple=True)
            y.index_add_(0, token, self._mlp(x[token], self.w13[expert], self.w2[expert]) * weights[token, rank, None])
        return y

    def bind(self, x: NDArray[np.float32], threads: int) -> Run:
        torch.set_num_threads(threads)
        rows = torch.from_numpy(x)

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return self.forward(rows)

        return run

    def output(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self.forward(torch.from_numpy(x)).numpy()


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


class OnnxRuntime:
    """com.microsoft.QMoE, int4 blocks of 32, accuracy level 4 (int8 activations). Routed experts only; its input is the
    router's logits, which are computed outside and not timed."""

    def __init__(self, layer: Layer) -> None:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        s = layer.shape

        def interleave(a: NDArray) -> NDArray:  # its SwiGLU takes gate and up rows alternating
            return np.stack([a[:, : s.f], a[:, s.f :]], axis=2).reshape(a.shape)

        def nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
            u = (codes + 8).astype(np.uint8)
            return np.ascontiguousarray(u[..., 0::2] | u[..., 1::2] << 4)

        weights = {
            "w13": nibbles(interleave(layer.w13)),
            "w13_scales": interleave(layer.w13_scales).astype(np.float32),
            "w2": nibbles(layer.w2),
            "w2_scales": layer.w2_scales.astype(np.float32),
        }
        node = helper.make_node(
            "QMoE",
            ["x", "logits", "w13", "w13_scales", "", "w2", "w2_scales"],
            ["y"],
            domain="com.microsoft",
            k=s.top_k,
            expert_weight_bits=4,
            block_size=GROUP,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            [node],
            "qmoe",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", s.d]),
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", s.experts]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", s.d])],
            [numpy_helper.from_array(a, name) for name, a in weights.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        self.model, self.layer = model.SerializeToString(), layer
        self.sessions: dict[int, object] = {}

    def _session(self, threads: int) -> object:
        import onnxruntime

        if threads not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            self.sessions[threads] = onnxruntime.InferenceSession(
                self.model, options, providers=["CPUExecutionProvider"]
            )
        return self.sessions[threads]

    def bind(self, x: NDArray[np.float32], threads: int) -> Run:
        session = self._session(threads)
        binding = session.io_binding()  # type: ignore[attr-defined]
        logits = np.ascontiguousarray(x @ self.layer.router.T)
        y = np.empty_like(x)
        binding.bind_cpu_input("x", x)
        binding.bind_cpu_input("logits", logits)
        binding.bind_output("y", "cpu", 0, np.float32, x.shape, y.ctypes.data)

        def run() -> NDArray[np.float32]:
            session.run_with_iobinding(binding)  # type: ignore[attr-defined]
            return y

        run.kept = (x, logits)  # type: ignore[attr-defined]
        return run

    def output(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        result = self.bind(x, 1)()
        assert isinstance(result, np.ndarray)
        return result
