"""What each instruction of the delegate computes, over `mlx.core`: one function each. A missing one is an error.

The delegate's interpreter is the reference: negative axes, reshapes with -1 and clamped slices behave as in it. `m` is
the machine: `m.x("field")` is the tensor of a field, `m.i("field")` its integer, `m.f("field")` what the file has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moec.targets.metal import cpu_products

if TYPE_CHECKING:
    from moec.targets.metal.replay import Machine

Handler = Callable[["Machine"], Any]

# ExecuTorch scalar types -> MLX type names
SCALAR_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    11: "bool_",
    15: "bfloat16",
    27: "uint16",
    28: "uint32",
}


def _binary(name: str) -> Handler:
    return lambda m: getattr(m.mx, name)(m.x("a"), m.x("b"))


def _unary(name: str) -> Handler:
    return lambda m: getattr(m.mx, name)(m.x("x"))


def _reduction(name: str) -> Handler:
    def run(m: Machine) -> Any:
        axes = m.f("axes")
        return getattr(m.mx, name)(m.x("x"), axis=axes or None, keepdims=m.f("keepdims"))

    return run


def _integer(operation: Callable[[int, int], int]) -> Handler:
    return lambda m: operation(m.i("a"), m.i("b"))


def _accumulating(*fields: str) -> Callable[[Callable[..., Any]], Handler]:
    """A product of these operands. MLX's CPU kernels sum in the operands' own type where the GPU's sum in float32: with
    `m.accumulates`, 16-bit operands are widened and the result is rounded once, as on the GPU."""

    def wrap(run: Callable[..., Any]) -> Handler:
        def handler(m: Machine) -> Any:
            operands = [m.optional(f) for f in fields]
            halves = {x.dtype for x in operands if x is not None and x.dtype in m.half_types}
            if not m.accumulates or not halves:
                return run(m, *operands)
            floats = {x.dtype for x in operands if x is not None and m.mx.issubdtype(x.dtype, m.mx.floating)}
            y = run(m, *(None if x is None else m.widened(f, x) for f, x in zip(fields, operands, strict=True)))
            return y.astype(halves.pop()) if len(floats) == 1 else y

        return handler

    return wrap


def _large(m: Machine, x: Any) -> bool:
    """Whether a product of x is for `cpu_products`: on the CPU, in float32, many rows."""
    rows = x.size // max(1, x.shape[-1])
    return bool(m.accumulates and x.dtype == m.mx.float32 and rows >= cpu_products.ROWS_FROM)


def _affine(m: Machine, scales: Any, biases: Any) -> bool:
    return bool(m.f("mode") == "affine" and biases is not None and scales.dtype == m.mx.float32)


@_accumulating("mat1", "mat2", "bias")
def _addmm(m: Machine, mat1: Any, mat2: Any, bias: Any) -> Any:
    if bias is None:
        large = _large(m, mat1) and mat2.ndim == 2 and mat2.dtype == m.mx.float32
        return cpu_products.matmul(m.mx, mat1, mat2) if large else m.mx.matmul(mat1, mat2)
    return m.mx.addmm(bias, mat1, mat2, alpha=m.f("alpha"), beta=m.f("beta"))


def _take(m: Machine) -> Any:
    x, index, axis = m.x("x"), m.f("index"), m.f("axis")
    value = m.value(index)
    if not m.is_tensor(index):
        value = m.axis(value, x.shape[axis], "Take")  # an index from the end counts like an axis
    else:
        m.check_indices(value, x.shape[axis])
    return m.mx.take(x, value, axis=axis)


@_accumulating("x", "weight")
def _rms_norm(m: Machine, x: Any, weight: Any) -> Any:
    return m.mx.fast.rms_norm(x, weight, m.f("eps"))


def _layer_norm(m: Machine) -> Any:
    return m.mx.fast.layer_norm(m.x("x"), m.optional("weight"), m.optional("bias"), m.f("eps"))


def _rope(m: Machine) -> Any:
    freqs = m.optional("freqs")
    return m.mx.fast.rope(
        m.x("x"),
        m.f("dims"),
        traditional=m.f("traditional"),
        base=None if freqs is not None else m.f("base"),
        scale=m.f("scale"),
        offset=m.value(m.f("offset")),
        freqs=freqs,
    )


@_accumulating("q", "k", "v")
def _sdpa(m: Machine, q: Any, k: Any, v: Any) -> Any:
    mask = m.optional("mask")
    if mask is not None and mask.dtype != m.mx.bool_:
        mask = mask.astype(q.dtype)
    if m.f("causal"):
        if mask is not None:
            raise ValueError("attention with both a mask and a causal flag")
        mask = "causal"
    return m.mx.fast.scaled_dot_product_attention(q, k, v, scale=m.f("scale"), mask=mask)


def _sym_size(m: Machine) -> int:
    a = m.x("a")
    return int(a.shape[m.axis(m.f("dim"), a.ndim, "SymSize")])


def _arange(m: Machine) -> Any:
    dtype = m.f("scalar_type")
    return m.mx.arange(m.i("start"), m.i("stop"), m.i("step"), dtype=None if dtype is None else m.dtype(dtype))


def _gelu(m: Machine) -> Any:
    x = m.x("x")
    if m.f("approximate") == "tanh":
        inner = 0.7978845608 * (x + 0.044715 * (x * (x * x)))
        return 0.5 * (x * (1.0 + m.mx.tanh(inner)))
    return 0.5 * (x * (1.0 + m.mx.erf(0.7071067812 * x)))


def _squeeze(m: Machine) -> Any:
    x = m.x("x")
    dims = m.f("dims")
    if not dims:
        return m.mx.squeeze(x)
    ones = [d for d in dims if -x.ndim <= d < x.ndim and x.shape[d] == 1]
    return m.mx.squeeze(x, axis=ones) if ones else x


def _split(m: Machine) -> list[Any]:
    x, axis = m.x("x"), m.f("axis")
    sizes = [m.value(s) for s in m.f("sizes")]
    length = x.shape[axis]
    if len(sizes) == 1:
        step = sizes[0]
        sizes = [min(step, length - begin) for begin in range(0, length, step)]
    if sum(sizes) != length:
        raise ValueError(f"Split of {length} into {sizes}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return list(m.mx.split(x, ends, axis=axis))


def _pad(m: Machine) -> Any:
    flat = [m.value(v) for v in m.f("pad_width")]
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    return m.mx.pad(m.x("x"), pairs, mode=m.f("mode"), constant_values=m.f("constant_value"))


def _bounds(m: Machine, length: int) -> tuple[int, int]:
    """Start and stop of a slice, counted from the end when negative, clamped to the axis."""
    start, stop = m.i("start"), m.i("stop")
    start, stop = (v + length if v < 0 else v for v in (start, stop))
    return max(0, min(start, length)), max(0, min(stop, length))


def _slice(m: Machine) -> Any:
    x = m.x("x")
    axis = m.axis(m.i("axis"), x.ndim, "Slice")
    start, stop = _bounds(m, x.shape[axis])
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop, m.f("step"))
    return x[tuple(index)]


def _slice_update(m: Machine) -> Any:
    dst, update = m.x("dst"), m.x("update")
    axis = m.axis(m.i("axis"), dst.ndim, "SliceUpdate")
    start, stop = _bounds(m, dst.shape[axis])
    if m.f("step") != 1:
        raise ValueError("SliceUpdate with a step")
    if update.shape[axis] != stop - start:
        raise ValueError(f"SliceUpdate writes {update.shape[axis]} elements into {start}..{stop}")
    begin = m.mx.array([start])
    return m.mx.slice_update(dst, update.astype(dst.dtype), begin, axes=[axis])


def _index_copy(m: Machine) -> Any:
    dst, axis = m.x("dst"), m.f("axis")
    index = m.x("indices")
    m.check_indices(index, dst.shape[axis])
    where = [slice(None)] * dst.ndim
    where[axis] = index
    copy = m.mx.array(dst)
    copy[tuple(where)] = m.x("update").astype(dst.dtype)
    return copy


def _dequantize(m: Machine) -> Any:
    dtype = m.f("dtype")
    y = m.mx.dequantize(
        m.x("w"), m.x("scales"), m.optional("biases"), group_size=m.f("group_size"), bits=m.f("bits"), mode=m.f("mode")
    )
    return y if dtype is None else y.astype(m.dtype(dtype))


def _scheme(m: Machine) -> dict[str, Any]:
    return {name: m.f(name) for name in ("transpose", "group_size", "bits")}


@_accumulating("x", "w", "scales", "biases")
def _quantized_matmul(m: Machine, x: Any, w: Any, scales: Any, biases: Any) -> Any:
    if _large(m, x) and _affine(m, scales, biases):
        return cpu_products.quantized_matmul(m.mx, x, w, scales, biases, **_scheme(m))
    return m.mx.quantized_matmul(x, w, scales, biases, mode=m.f("mode"), **_scheme(m))


def _sorted(m: Machine) -> bool:
    flag = m.f("sorted_indices_flag")
    return bool(m.f("sorted_indices") if flag is None else m.value(flag))


def _gather_indices(m: Machine, x: Any, w: Any) -> dict[str, Any]:
    left, right = m.optional("lhs_indices"), m.optional("rhs_indices")
    if right is not None:
        m.check_indices(right, w.shape[0])
    if left is not None:
        m.check_indices(left, x.shape[0])
    return {"lhs_indices": left, "rhs_indices": right, "sorted_indices": _sorted(m)}


@_accumulating("a", "b")
def _gather_mm(m: Machine, a: Any, b: Any) -> Any:
    return m.mx.gather_mm(a, b, **_gather_indices(m, a, b))


@_accumulating("x", "w", "scales", "biases")
def _gather_qmm(m: Machine, x: Any, w: Any, scales: Any, biases: Any) -> Any:
    gathers = _gather_indices(m, x, w)
    one_to_one = gathers["lhs_indices"] is None and gathers["rhs_indices"] is not None and x.ndim == 3
    if gathers["sorted_indices"] and one_to_one and x.shape[1] == 1 and _large(m, x) and _affine(m, scales, biases):
        index = gathers["rhs_indices"]
        return cpu_products.gather_qmm(m.mx, x, w, scales, biases, index, **_scheme(m))
    return m.mx.gather_qmm(x, w, scales, biases, mode=m.f("mode"), **_scheme(m), **gathers)


def _full(m: Machine) -> Any:
    return m.mx.full([m.value(s) for s in m.f("shape")], m.value(m.f("v")), dtype=m.dtype(m.f("scalar_type")))


def _full_like(m: Machine) -> Any:
    x, dtype = m.x("x"), m.f("scalar_type")
    return m.mx.full(x.shape, m.value(m.f("v")), dtype=x.dtype if dtype is None else m.dtype(dtype))


def _clip(m: Machine) -> Any:
    return m.mx.clip(m.x("x"), m.optional("a_min"), m.optional("a_max"))


def _if(m: Machine) -> None:
    m.run_chain(m.f("then_chain_idx") if m.i("cond") else m.f("else_chain_idx"))


HANDLERS: dict[str, Handler] = {
    "Noop": lambda m: None,
    "IdCopy": lambda m: m.x("x"),
    "Addmm": _addmm,
    "ItemInt": lambda m: int(m.x("x").item()),
    "ExpandDims": lambda m: m.mx.expand_dims(m.x("x"), m.f("axis")),
    "Tile": lambda m: m.mx.tile(m.x("x"), [m.value(r) for r in m.f("reps")]),
    "TakeAlongAxis": lambda m: m.mx.take_along_axis(m.x("x"), m.x("indices"), axis=m.f("axis")),
    "Take": _take,
    "RMSNorm": _rms_norm,
    "LayerNorm": _layer_norm,
    "Rope": _rope,
    "Sdpa": _sdpa,
    "Add": _binary("add"),
    "Subtract": _binary("subtract"),
    "Multiply": _binary("multiply"),
    "Divide": _binary("divide"),
    "FloorDivide": _binary("floor_divide"),
    "Maximum": _binary("maximum"),
    "Minimum": _binary("minimum"),
    "Power": _binary("power"),
    "LogAddExp": _binary("logaddexp"),
    "Less": _binary("less"),
    "LessEqual": _binary("less_equal"),
    "Greater": _binary("greater"),
    "GreaterEqual": _binary("greater_equal"),
    "Equal": _binary("equal"),
    "NotEqual": _binary("not_equal"),
    "LogicalAnd": _binary("logical_and"),
    "LogicalOr": _binary("logical_or"),
    "LogicalNot": _unary("logical_not"),
    "AddInt": _integer(lambda a, b: a + b),
    "SubtractInt": _integer(lambda a, b: a - b),
    "MultiplyInt": _integer(lambda a, b: a * b),
    "FloorDivideInt": _integer(lambda a, b: a // b),
    "ModInt": _integer(lambda a, b: a % b),
    "SymSize": _sym_size,
    "Gelu": _gelu,
    "ARange": _arange,
    "Silu": lambda m: m.x("x") * m.mx.sigmoid(m.x("x")),
    "Sigmoid": _unary("sigmoid"),
    "Tanh": _unary("tanh"),
    "Exp": _unary("exp"),
    "Log": _unary("log"),
    "Log1p": _unary("log1p"),
    "Sqrt": _unary("sqrt"),
    "Rsqrt": _unary("rsqrt"),
    "Square": _unary("square"),
    "Abs": _unary("abs"),
    "Neg": _unary("negative"),
    "Sin": _unary("sin"),
    "Cos": _unary("cos"),
    "Round": lambda m: m.mx.round(m.x("x"), decimals=m.f("decimals")),
    "Reciprocal": _unary("reciprocal"),
    "Squeeze": _squeeze,
    "Split": _split,
    "Softmax": lambda m: m.mx.softmax(m.x("x"), axis=m.f("axis"), precise=m.f("precise")),
    "BroadcastTo": lambda m: m.mx.broadcast_to(
        m.x("x"),
        [s if s != -1 else m.x("x").shape[i - len(m.f("shape"))] for i, s in enumerate(map(m.value, m.f("shape")))],
    ),
    "Pad": _pad,
    "Where": lambda m: m.mx.where(m.x("condition"), m.x("x"), m.x("y")),
    "Reshape": lambda m: m.mx.reshape(m.x("x"), [m.value(s) for s in m.f("shape")]),
    "Transpose": lambda m: m.mx.transpose(m.x("x"), m.f("perm")),
    "Contiguous": lambda m: m.mx.contiguous(m.x("x")),
    "Slice": _slice,
    "SliceUpdate": _slice_update,
    "IndexCopy": _index_copy,
    "AsType": lambda m: m.x("x").astype(m.dtype(m.f("scalar_type"))),
    "Concatenate": lambda m: m.mx.concatenate([m.value(t) for t in m.f("tensors")], axis=m.f("axis")),
    "Stack": lambda m: m.mx.stack([m.value(t) for t in m.f("tensors")], axis=m.f("axis")),
    "Full": _full,
    "FullLike": _full_like,
    "Clip": _clip,
    "Cumsum": lambda m: m.mx.cumsum(m.x("x"), axis=m.f("axis"), reverse=m.f("reverse"), inclusive=m.f("inclusive")),
    "Repeat": lambda m: m.mx.repeat(m.x("x"), m.i("repeats"), axis=m.f("axis")),
    "Argmax": lambda m: m.mx.argmax(m.x("x"), axis=m.f("axis"), keepdims=m.f("keepdims")),
    "Sort": lambda m: m.mx.sort(m.x("x"), axis=m.f("axis")),
    "Argsort": lambda m: m.mx.argsort(m.x("x"), axis=m.f("axis")),
    "Partition": lambda m: m.mx.partition(m.x("x"), m.i("kth"), axis=m.f("axis")),
    "ArgPartition": lambda m: m.mx.argpartition(m.x("x"), m.i("kth"), axis=m.f("axis")),
    "Sum": _reduction("sum"),
    "Mean": _reduction("mean"),
    "Max": _reduction("max"),
    "Min": _reduction("min"),
    "Any": _reduction("any"),
    "All": _reduction("all"),
    "Dequantize": _dequantize,
    "QuantizedMatmul": _quantized_matmul,
    "GatherMm": _gather_mm,
    "GatherQmm": _gather_qmm,
    "If": _if,
}
