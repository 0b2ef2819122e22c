"""Derives the attach points of a graph and holds that nothing is missing. Pure.

Names speak first (`naming`); a graph without any is read by its structure (`structure`). What
stays unknown is reported, never skipped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from remora_build.insert.attach import AttachPlan, AttachPoint, Part, shown
from remora_build.insert.naming import Module, named_modules
from remora_build.insert.parts import check_seams, part_sizes
from remora_build.insert.patterns import Linear
from remora_build.insert.structure import structural_modules
from remora_build.insert.view import GraphView
from remora_contract.errors import InvalidInput, Unsupported
from remora_contract.targets import PROJECTIONS, AdapterTarget, Projection

_CACHE = re.compile(r"past[a-z_]*[._](?:key_values?[._])?([0-9]{1,4})(?:[._](?:key|value))?")
_MOST_NAMES = 4


class NodeNames:
    """How a document speaks of nodes: by name where it is unique, else by what they make."""

    def __init__(self, view: GraphView) -> None:
        count = Counter(n.name for n in view.nodes if n.name)
        self._names: dict[int, str] = {}
        for number, node in enumerate(view.nodes):
            unique = count[node.name] == 1 and view.maker(node.name) in (None, number)
            self._names[number] = node.name if unique else (*node.output, "")[0]
        self._numbers = {name: number for number, name in self._names.items() if name}

    def of(self, number: int) -> str:
        return self._names[number]

    def find(self, name: str) -> int | None:
        return self._numbers.get(name)


def modules_of(view: GraphView, linears: Sequence[Linear]) -> dict[int, Module]:
    """Linear layers by node number, as far as names or structure tell. Raises InvalidInput when
    they belong to more than one stack of layers."""
    modules = named_modules(view, linears)
    if not any(m.parts for m in modules.values()):
        modules |= structural_modules(view, linears)
    stacks = {m.stack.rpartition(".")[2]: m.path for m in modules.values() if m.parts}
    if len(stacks) > 1:
        raise InvalidInput(
            f"the model has more than one stack of layers: {' and '.join(stacks.values())}; "
            "say with --attach which nodes are the decoder's"
        )
    return modules


def derive_plan(
    view: GraphView,
    linears: Sequence[Linear],
    modules: Mapping[int, Module],
    wanted: Sequence[Projection] = PROJECTIONS,
) -> AttachPlan:
    """Points of all layers that have a wanted part; a fused projection comes whole."""
    names = NodeNames(view)
    o_rows = {m.layer: li.k for li in linears if (m := modules.get(li.node)) and m.parts == ("o",)}
    points, rest, unknown = [], [], []
    for linear in linears:
        module, name = modules.get(linear.node), names.of(linear.node)
        if module is None:
            unknown.append(name)
        elif module.layer is None or not set(module.parts) & set(wanted):
            rest.append(name)
        else:
            _check_open(linear, module, name)
            sizes = part_sizes(module.parts, linear.n, o_rows.get(module.layer), module.path)
            check_seams(view, linear.y, sizes, module.path)
            parts = tuple(map(Part, module.parts, sizes))
            points.append(AttachPoint(module.layer, name, parts))
    points.sort(key=lambda p: (p.layer, PROJECTIONS.index(p.projections[0])))
    return AttachPlan(tuple(points), tuple(rest), tuple(unknown))


def _check_open(linear: Linear, module: Module, name: str) -> None:
    if linear.refusal is not None:
        raise Unsupported(
            f"{module.path} is node {shown(name)}, which takes no branch: {linear.refusal}"
        )


def check_complete(
    plan: AttachPlan, view: GraphView, wanted: Sequence[Projection] = PROJECTIONS
) -> None:
    """Every layer has every wanted projection once, and no layer of the cache is without. Raises
    InvalidInput naming what is missing or doubled."""
    found = plan.by_target()
    if plan.undecided:
        raise InvalidInput(
            f"nothing tells which modules these nodes are: {_listed(plan.undecided)}; "
            "--write-attach FILE writes down what is known, --attach FILE takes it corrected"
        )
    layers = max([t.layer + 1 for t in found] + [_cache_layers(view)])
    missing = [
        t.name()
        for layer in range(layers)
        for p in wanted
        if (t := AdapterTarget(layer, p)) not in found
    ]
    if missing or not found:
        raise InvalidInput(
            f"no node was found for {_listed(missing) or 'any projection'}: {_hint(view)}name it "
            "with --attach, or leave such projections out with --targets"
        )


def check_accounted(
    plan: AttachPlan,
    view: GraphView,
    linears: Iterable[Linear],
    modules: Mapping[int, Module],
    wanted: Sequence[Projection] = PROJECTIONS,
) -> None:
    """Raises InvalidInput when a given plan forgets a linear layer of the graph."""
    names = NodeNames(view)
    told = {names.find(name) for name in plan.not_adapted}
    if None in told:
        absent = next(n for n in plan.not_adapted if names.find(n) is None)
        raise InvalidInput(f"not_adapted names {shown(absent)}, which is no node of the model")
    told |= {names.find(point.node) for point in plan.points}
    forgotten = [
        names.of(linear.node)
        for linear in linears
        if linear.node not in told and _matters(modules.get(linear.node), wanted)
    ]
    if forgotten:
        raise InvalidInput(
            f"the attach points say nothing of {_listed(forgotten)}: add each to points or to "
            "not_adapted"
        )


def _matters(module: Module | None, wanted: Sequence[Projection]) -> bool:
    return module is None or bool(set(module.parts) & set(wanted))


def _cache_layers(view: GraphView) -> int:
    """How many layers the cache among the graph's inputs has."""
    matches = [_CACHE.fullmatch(name) for name in view.inputs]
    return max((int(m[1]) + 1 for m in matches if m is not None), default=0)


def _hint(view: GraphView) -> str:
    inner = next((n.op_type for n in view.nodes if n.op_type in ("If", "Loop", "Scan")), None)
    if inner is not None:
        return f"linear layers inside {inner} (a merged decoder) are not reached; "
    if view.has_functions:
        return "linear layers inside model-local functions are not reached: inline them; "
    return ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(shown, names[:_MOST_NAMES])) + more
