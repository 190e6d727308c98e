"""Whatever the text: a Spec, or a SpecError whose every line has a place; never a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.compiler.errors import SpecError
from moec.compiler.spec import parse_spec

TINY = (Path(__file__).parents[2] / "specs" / "models" / "mobilemoe-tiny.yaml").read_text()
LINE = re.compile(r"f\.yaml:\d+:\d+: .+")


def survives(text: str) -> None:
    try:
        parse_spec(text, file="f.yaml")
    except SpecError as error:
        bad = [line for line in str(error).split("\n") if not LINE.fullmatch(line)]
    else:
        bad = []
    assert not bad


# one value a line: booleans, numbers and syntax that readers of YAML stumble over, then words that a spec knows
TRAPS = r"""
~
-1
0
1e999
1e-5
.nan
yes
012
1:2
0x
9999999999999999999999999999999999999999
'
"\x"
[
{
*a
&a b
!!binary a
!x y
|
>
? a
- a
<<: 1
@
%
`
[[],{}]
{a: {b: c}}
2024-01-01
=
{5: 6}
{? [a] : b}
[[a]]
a: b: c
none
int4
xnnpack
{xnnpack: 5}
"""
VALUES = [*TRAPS.strip().split("\n"), "", "\t", "\u2028", "\ud7ff"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_fuzz_lines(data: st.DataObject) -> None:
    lines = TINY.splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                key = lines[index].split(":")[0]
                lines[index] = f"{key}: {data.draw(st.sampled_from(VALUES))}"
            case 1:
                del lines[index]
                lines = lines or [""]
            case 2:
                lines.insert(index, data.draw(st.sampled_from(lines)))
            case 3:
                lines[index] = data.draw(st.integers(0, 6)) * " " + lines[index].strip()
    survives("\n".join(lines))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(0, len(TINY)))
def test_fuzz_text(piece: str, place: int) -> None:
    survives(TINY[:place] + piece + TINY[place:])
    survives(piece)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["int4", "none", "qat"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["name", "model", "checkpoint", "quantization", "targets", "device", "training"]), _JSON
    )
)
def test_fuzz_values(tree: dict[str, object]) -> None:
    survives(json.dumps(tree))
