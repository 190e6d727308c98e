"""Random edits of a graph, which stays well formed: what a wrong match would have to survive.

An edit changes a number, swaps or replaces an operand, replaces an operator, inserts one, drops one, or lets the
result read an inner value too. Whatever it is, a rule that rewrites the mutant must keep what the mutant computes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.compiler.program import Editor, Program

aten = torch.ops.aten
Edit = Callable[[Editor, Node, random.Random], "tuple[Node, str] | None"]

ONE_OPERAND = [
    aten.silu.default, aten.relu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default, aten.neg.default,
    aten.abs.default, aten.square.default, aten.softplus.default, aten.exp.default,
]  # fmt: skip
TWO_OPERANDS = [
    aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default
]  # fmt: skip
COMPARISONS = [aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar]
OVER_A_DIMENSION = [aten.softmax.int, aten.log_softmax.int]
REDUCTIONS = [aten.sum.dim_IntList, aten.mean.dim, aten.amax.default]
FAMILIES = [ONE_OPERAND, TWO_OPERANDS, COMPARISONS, OVER_A_DIMENSION, REDUCTIONS]


def mutant(program: Program, seed: int, where: Callable[[Node], bool], edits: int = 1) -> tuple[Program, str] | None:
    """(`program` after random edits of nodes that `where` accepts, what was done); None when they are not well formed.

    The result has the type and the shape that it had.
    """
    rng = random.Random(seed)
    edit = program.edit()
    done: list[str] = []
    for _ in range(edits):
        nodes = [n for n in edit.graph.nodes if n.op == "call_function" and where(n)]
        try:
            changed = rng.choice(EDITS)(edit, rng.choice(nodes), rng)
            if changed is None:
                return None
            _recompute(edit, changed[0])
        except (AssertionError, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None
        done.append(changed[1])
    before, after = (_result(p) for p in (program, edit))
    if str(before.shape) != str(after.shape) or before.dtype != after.dtype:
        return None
    try:
        return edit.done(), "; ".join(done)
    except Exception:  # the verifier of exported programs does not take it
        return None


def _result(owner: Program | Editor) -> Tensor:
    output = next(reversed(owner.graph.nodes))
    return next(n for n in reversed(output.all_input_nodes) if isinstance(n.meta.get("val"), Tensor)).meta["val"]


def _recompute(edit: Editor, first: Node) -> None:
    """The fake values of `first` and of what depends on it."""
    stale = {first}
    started = False
    for node in edit.graph.nodes:
        started = started or node is first
        if not started or node.op != "call_function" or not (node is first or stale & set(node.all_input_nodes)):
            continue
        stale.add(node)
        if getattr(node.target, "namespace", "") == "higher_order":
            continue  # a fold gives the shapes of its step, whatever it is given
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with edit.fake_mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)


def _alike(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and str(x.shape) == str(y.shape)


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, number) of every number in nested arguments."""
    if isinstance(value, (bool, int, float)):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _numbers(inner, (*path, index))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {k: _replaced(v, path[1:], new) if k == path[0] else v for k, v in value.items()}
    return type(value)(_replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(value))


def _number(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    found = [*_numbers(tuple(node.args), ("args",)), *_numbers(dict(node.kwargs), ("kwargs",))]
    if not found:
        return None
    path, old = rng.choice(found)
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int):
        new = rng.choice([old + 1, old - 1, -old, 0, 1, 2 * old, 2])
    else:
        new = rng.choice([-old, 2 * old, 0.5 * old, 0.0, 1.0, old + 0.3, old - 0.3])
    if new == old:
        return None
    if path[0] == "args":
        node.args = _replaced(tuple(node.args), path[1:], new)
    else:
        node.kwargs = _replaced(dict(node.kwargs), path[1:], new)
    return node, f"{node.name}: {old} at {path} becomes {new}"


def _letters(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    """Two letters of an einsum change places in one of its terms."""
    if node.target is not aten.einsum.default:
        return None
    equation = str(node.args[0])
    at = rng.sample([i for i, c in enumerate(equation) if c.isalpha()], 2)
    letters = list(equation)
    letters[at[0]], letters[at[1]] = letters[at[1]], letters[at[0]]
    node.args = ("".join(letters), *node.args[1:])
    return node, f"{node.name}: {equation} becomes {node.args[0]}"


def _swap(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    places = [i for i, a in enumerate(node.args) if isinstance(a, Node)]
    if len(places) < 2:
        return None
    a, b = rng.sample(places, 2)
    args = list(node.args)
    args[a], args[b] = args[b], args[a]
    node.args = tuple(args)
    return node, f"{node.name}: operands {a} and {b} change places"


def _operand(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    """Another value of the same type and shape is read."""
    old = rng.choice(node.all_input_nodes)
    earlier = []
    for other in edit.graph.nodes:
        if other is node:
            break
        if other is not old and _alike(other, old):
            earlier.append(other)
    if not earlier:
        return None
    new = rng.choice(earlier)
    node.replace_input_with(old, new)
    return node, f"{node.name} reads {new.name} instead of {old.name}"


def _operator(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    family = next((f for f in FAMILIES if node.target in f), None)
    if family is None:
        return None
    old, new = node.target, rng.choice([t for t in family if t is not node.target])
    node.target = new
    return node, f"{node.name}: {old} becomes {new}"


def _inserted(value: Tensor, rng: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """An operator that keeps type and shape, and its further arguments."""
    ways: list[tuple[Any, tuple[Any, ...]]] = []
    if value.dim():
        last, any_dim = value.dim() - 1, rng.randrange(value.dim())
        ways += [
            (aten.flip.default, ([last],)),
            (aten.roll.default, ([1], [last])),
            (aten.roll.default, ([1], [any_dim])),
        ]
        ways += [(aten.flip.default, ([any_dim],))]
    if value.is_floating_point():
        ways += [
            (aten.mul.Tensor, (rng.choice([0.5, 2.0, -1.0]),)), (aten.add.Tensor, (rng.choice([0.25, -0.25]),)),
            (aten.clamp.default, (-0.2, 0.2)), (aten.clamp.default, (None, 0.3)), (rng.choice(ONE_OPERAND), ()),
        ]  # fmt: skip
        if value.dim():
            ways += [(aten.softmax.int, (last,)), (aten.cumsum.default, (any_dim,))]
    elif value.dtype == torch.int64:
        ways += [(aten.bitwise_xor.Scalar, (1,)), (aten.clamp.default, (0, 1)), (aten.mul.Tensor, (0,))]
    elif value.dtype == torch.bool:
        ways += [(aten.logical_not.default, ())] * 3
    return rng.choice(ways)


def _insert(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    target, rest = _inserted(value, rng)
    readers = list(node.users)
    if rng.random() < 0.5:  # one reader only
        readers = [rng.choice(readers)]
    with edit.graph.inserting_after(node):
        new = edit.call(target, node, *rest, like=node)
    for reader in readers:
        reader.replace_input_with(node, new)
    return new, f"{target}{rest} after {node.name}, for {[r.name for r in readers]}"


def _reorder(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    """Rows read as columns: a transpose, and a reshape back to the old shape."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    a, b = rng.sample(range(value.dim()), 2)
    sizes = [s if isinstance(s, int) else -1 for s in value.shape]
    if sizes.count(-1) > 1:
        return None
    readers = list(node.users)
    with edit.graph.inserting_after(node):
        turned = edit.call(aten.transpose.int, node, a, b, like=node)
    with edit.graph.inserting_after(turned):
        new = edit.call(aten.reshape.default, turned, sizes, like=node)
    for reader in readers:
        reader.replace_input_with(node, new)
    return turned, f"{node.name} is transposed ({a}, {b}) and read as {sizes}"


def _drop(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    """The node's value becomes that of one of its operands."""
    operands = [n for n in node.all_input_nodes if _alike(n, node)]
    if not operands:
        return None
    kept = rng.choice(operands)
    readers = list(node.users)
    node.replace_all_uses_with(kept)
    return readers[0], f"{node.name} becomes {kept.name}"


def _reader(edit: Editor, node: Node, rng: random.Random) -> tuple[Node, str] | None:
    """The program's result depends on an inner value too."""
    value = node.meta.get("val")
    output = next(reversed(edit.graph.nodes))
    result = output.all_input_nodes[-1]
    if not isinstance(value, Tensor) or result is node:
        return None
    with edit.graph.inserting_before(output):
        number = edit.call(aten.sum.default, edit.call(aten._to_copy.default, node, dtype=torch.float32))
        total = edit.call(aten.add.Tensor, result, edit.call(aten.mul.Tensor, number, 0.01))
    output.replace_input_with(result, total)
    return total, f"the result reads {node.name}"


EDITS: list[Edit] = [
    _number,
    _number,
    _letters,
    _swap,
    _operand,
    _operand,
    _operator,
    _insert,
    _insert,
    _reorder,
    _drop,
    _reader,
]
