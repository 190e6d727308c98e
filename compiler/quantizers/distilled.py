"""distilled: the codes of `awq_gptq`, whose scales are fitted to the predictions of the float model.

The least mean divergence KL(float || quantized) on the calibration text, by Adam through the whole model: what a scale
costs is measured where it matters, behind all other layers and their rounding. Codes stay. See
`analysis/calibration/distill.py`.
"""

from __future__ import annotations

from moec.compiler.quantizers.awq_gptq import AwqGptq


class Distilled(AwqGptq):
    refines = "awq_gptq"


QUANTIZER = Distilled()
