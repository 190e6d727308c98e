"""The manifest of a model that only tests have."""

from __future__ import annotations

from moec.compiler.artifact import FORMAT, Digests, Manifest, ModelRecord
from tests.assistant.speaking import EOS, VOCABULARY


def manifest(context: int = 400) -> Manifest:
    return Manifest(
        format=FORMAT,
        moec="0",
        name="speaking",
        target="xnnpack",
        spec={},
        quantization=None,
        model=ModelRecord(
            name="speaking",
            vocab_size=VOCABULARY,
            context=context,
            max_tokens=64,
            bos_id=None,
            eos_ids=(EOS,),
            moe_layers=(),
        ),
        digests=Digests(spec="", checkpoint="", graph=""),
        passes=(),
        files=(),
        sizes_by_role={},
        details={},
        versions={},
    )
