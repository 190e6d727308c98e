"""The operators of legalized graphs in PyTorch: eager against the definition, fakes, and the `.out` forms."""

from __future__ import annotations

import pytest
import torch

from moec.runtime.moe_config import Kind, WeightFormat
from moec.targets.xnnpack import cpu_ops, packing

F32 = WeightFormat()


def _packed(weight: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    return packing.pack(weight, None, F32, 1, n, k)


def test_linear_packed_is_a_linear() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 3, 40), torch.randn(17, 40), torch.randn(17)
    y = cpu_ops.linear_packed(x, _packed(w), b, 17, 40, F32.encode())
    assert y.shape == (2, 3, 17)
    # 40 fp32 products in another order
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b), rtol=1e-5, atol=1e-5)


def test_embedding_packed_reads_rows() -> None:
    w = torch.randn(11, 24)
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(cpu_ops.embedding_packed(ids, _packed(w), 11, 24, F32.encode()), w[ids])


@pytest.mark.parametrize("name", sorted(cpu_ops.OUT_FORMS))
def test_out_form_takes_the_functional_arguments_and_out(name: str) -> None:
    functional = getattr(torch.ops.moec, name).default._schema
    out = cpu_ops.OUT_FORMS[name]._schema
    assert [str(a.type) for a in out.arguments[:-1]] == [str(a.type) for a in functional.arguments]
    assert out.arguments[-1].name == "out"
    assert out.arguments[-1].kwarg_only


def test_out_form_computes() -> None:
    x, w = torch.randn(5, 8), torch.rand(8)
    out = torch.empty(0)
    result = cpu_ops.OUT_FORMS["rms_norm"](x, w, 1e-5, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, torch.ops.moec.rms_norm(x, w, 1e-5))


def test_fakes_give_shapes_and_refuse() -> None:
    fmt = WeightFormat(Kind.INT4, 32, int8_activations=True).encode()
    with torch._subclasses.FakeTensorMode():
        x, blob = torch.empty(1, 4, 64), torch.empty(999, dtype=torch.uint8)
        assert cpu_ops.linear_packed(x, blob, None, 48, 64, fmt).shape == (1, 4, 48)
        assert cpu_ops.embedding_packed(torch.empty(1, 4, dtype=torch.int64), blob, 48, 64, fmt).shape == (1, 4, 64)
        with pytest.raises(ValueError, match="x has 64 features, the weight 32"):
            cpu_ops.linear_packed(x, blob, None, 48, 32, fmt)
        with pytest.raises(ValueError, match="x must be float32"):
            cpu_ops.linear_packed(x.half(), blob, None, 48, 64, fmt)
        half = torch.empty(8, 64, dtype=torch.float16)
        with pytest.raises(ValueError, match="router_weight must be float32"):
            cpu_ops.fused_moe_packed(x, x, half, None, None, blob, None, blob, None, None, None, None, [], [])


def test_eager_refuses_a_blob_of_another_size() -> None:
    with pytest.raises(Exception, match="bytes given"):
        cpu_ops.linear_packed(torch.zeros(1, 8), torch.zeros(100, dtype=torch.uint8), None, 4, 8, F32.encode())
