"""awq: channels scaled where that is exact (AWQ, arXiv 2306.00978), then `weighted`.

Inputs that are large on calibration text get a larger share of the codes' range: their columns are multiplied by a
factor, and what gives these inputs (the gain of a norm, the rows of v or up) is divided by it. See
`analysis/calibration/balance.py`.
"""

from __future__ import annotations

from moec.compiler.quantizer import Moments
from moec.compiler.quantizers.weighted import Weighted


class Awq(Weighted):
    observes = Moments  # the factors are chosen by the error of the products, for which moments are needed
    balances = True


QUANTIZER = Awq()
