"""awq_gptq: channels scaled as in `awq`, then codes with error feedback as in `gptq`."""

from __future__ import annotations

from moec.compiler.quantizers.gptq import Gptq


class AwqGptq(Gptq):
    balances = True


QUANTIZER = AwqGptq()
