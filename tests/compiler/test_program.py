"""Program and Editor: what every pass relies on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from moec.compiler.program import LazyWeight, Program, Role, Stage
from tests.harness import CONTEXT, VOCABULARY, check_equal, export_toy

aten = torch.ops.aten


class Toy(nn.Module):
    """An embedding, a cache that every call writes, two linears; `forward(tokens [1, T], start_pos [1])`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("k_cache", torch.zeros(1, CONTEXT, width))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        x = self.embed(tokens)
        positions = start_pos + torch.arange(x.shape[1], device=x.device)
        self.k_cache.copy_(self.k_cache.index_copy(1, positions, x))
        seen = self.k_cache.sum(1, keepdim=True)
        return self.down(torch.relu(self.up(x + seen)))


@pytest.fixture
def program() -> Program:
    return export_toy(Toy, {"embed.weight": Role.EMBEDDING, "up.weight": Role.FFN, "down.weight": Role.FFN})


def relu_of(program: Program) -> torch.fx.Node:
    (node,) = (n for n in program.graph.nodes if n.target is aten.relu.default)
    return node


def test_equal_exports_print_equally(program: Program) -> None:
    """No address, counter or symbol number of this process: the digest of a spec is the same everywhere."""
    again = export_toy(Toy, {"embed.weight": Role.EMBEDDING, "up.weight": Role.FFN, "down.weight": Role.FFN})
    assert again.text() == program.text()
    assert again.digest() == program.digest()
    assert "0x" not in program.text()


@pytest.mark.parametrize("change", ["width", "role", "operator"])
def test_the_digest_tells_programs_apart(program: Program, change: str) -> None:
    if change == "width":
        other = export_toy(lambda: Toy(width=16))
    else:
        edit = program.edit()
        if change == "role":
            edit.roles["up.weight"] = Role.OTHER
        else:
            (relu,) = (n for n in edit.graph.nodes if n.target is aten.relu.default)
            relu.target = aten.sigmoid.default
        other = edit.done()
    assert other.digest() != program.digest()


def test_an_edit_leaves_the_original_alone(program: Program) -> None:
    before = program.text()
    edit = program.edit()
    (relu,) = (n for n in edit.graph.nodes if n.target is aten.relu.default)
    with edit.graph.inserting_before(relu):
        relu.replace_all_uses_with(edit.call(aten.sigmoid.default, relu.args[0], like=relu))
    edit.roles["up.weight"] = Role.OTHER
    after = edit.done(stage=Stage.FUSED)
    assert program.text() == before
    assert "relu" in before
    assert "relu" not in after.text()
    assert (program.stage, after.stage) == (Stage.CANONICAL, Stage.FUSED)
    assert program.roles["up.weight"] is Role.FFN


def test_an_edit_that_changes_nothing_is_the_same_program(program: Program) -> None:
    again = program.edit().done()
    assert again.text() == program.text()
    check_equal(program, again, atol=0, rtol=0)  # the same operators in the same order


def test_edits_share_weights_and_load_none(program: Program) -> None:
    def refuse() -> Tensor:
        raise AssertionError("an edit read a weight")

    unread = {n: LazyWeight(w.shape, w.dtype, refuse) for n, w in program.weights.items()}
    lazy = Program(program.exported, unread, program.roles, program.info, program.stage)
    after = lazy.edit().done()
    assert all(after.weights[name] is weight for name, weight in unread.items())


def test_an_added_weight_stands_with_its_like_and_is_read(program: Program) -> None:
    """Parameters, then buffers, then inputs, as torch.export orders them; the new weight takes part in the numbers."""
    edit = program.edit()
    scale = LazyWeight((8,), torch.float32, lambda: torch.full((8,), 2.0))
    (relu,) = (n for n in edit.graph.nodes if n.target is aten.relu.default)
    (down,) = relu.users
    weight = edit.add_weight("scale", scale, Role.OTHER)
    with edit.graph.inserting_after(down):
        scaled = edit.call(aten.mul.Tensor, down, weight)
    down.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    doubled = edit.done()
    kinds = [s.kind for s in doubled.exported.graph_signature.input_specs]
    assert kinds == sorted(kinds, key=[InputKind.PARAMETER, InputKind.BUFFER, InputKind.USER_INPUT].index)
    assert doubled.roles["scale"] is Role.OTHER

    half = edit_last(doubled)
    check_equal(program, half, atol=0, rtol=0)  # times two and times a half are exact


def edit_last(program: Program) -> Program:
    """The result times one half."""
    edit = program.edit()
    (last,) = (n for n in edit.graph.nodes if n.target is aten.mul.Tensor)
    with edit.graph.inserting_after(last):
        halved = edit.call(aten.mul.Tensor, last, 0.5)
    last.replace_all_uses_with(halved, delete_user_cb=lambda user: user is not halved)
    return edit.done()


def test_a_name_is_given_once(program: Program) -> None:
    with pytest.raises(AssertionError, match=r"up\.weight exists"):
        program.edit().add_weight("up.weight", LazyWeight((1,), torch.float32, lambda: torch.zeros(1)), Role.OTHER)


def test_what_nothing_reads_is_dropped_and_what_writes_stays(program: Program) -> None:
    edit = program.edit()
    (relu,) = (n for n in edit.graph.nodes if n.target is aten.relu.default)
    (up,) = relu.all_input_nodes
    (down,) = relu.users
    down.replace_all_uses_with(up.all_input_nodes[0])  # the result no longer passes through the linears
    after = edit.done()
    assert set(program.weights) - set(after.weights) == {"up.weight", "down.weight"}
    assert set(after.roles) == set(after.weights)
    assert "k_cache" in after.weights, "the cache is written for the next call, though no result needs it"


def test_weights_are_found_by_their_placeholder(program: Program) -> None:
    found = {program.weight_of(n) for n in program.graph.nodes} - {None}
    assert found == set(program.weights)
    assert program.weight_of(relu_of(program)) is None
    edit = program.edit()
    for name in program.weights:
        node = edit.placeholder_of(name)
        assert node is not None
        assert edit.weight_of(node) == name
    assert edit.placeholder_of("nobody") is None


def test_mutations_are_known_and_can_be_dropped(program: Program) -> None:
    edit = program.edit()
    output = next(reversed(edit.graph.nodes))
    written = [v for v in output.args[0] if edit.mutations_of(v) == ["k_cache"]]
    assert len(written) == 1
    edit.drop_mutation(written[0])
    assert edit.mutations_of(written[0]) == []
    assert not edit.done().exported.graph_signature.buffers_to_mutate
