"""Derives the attach points of a graph and holds that nothing is missing. Pure.

Names speak first (`naming`); a graph without any is read by its structure (`structure`). What
stays unknown is reported, never skipped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remora_build.insert.attach import AttachPlan, AttachPoint, Part
from remora_build.insert.naming import Mapped, Module, named_modules
from remora_build.insert.parts import check_seams, part_sizes
from remora_build.insert.patterns import Linear
from remora_build.insert.shown import listed, shown
from remora_build.insert.structure import structural_modules
from remora_build.insert.view import GraphView
from remora_contract.errors import InvalidInput, RemoraError, Unsupported
from remora_contract.targets import PROJECTIONS, AdapterTarget, Projection

_CACHE = re.compile(r"past[a-z_]*[._](?:key_values?[._])?([0-9]{1,4})(?:[._](?:key|value))?")


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


def modules_of(view: GraphView, linears: Sequence[Linear]) -> Mapped:
    """As far as names or structure tell; more than one stack of layers is a problem."""
    named = named_modules(view, linears)
    modules, problems = named.modules, list(named.problems)
    if not any(m.parts for m in modules.values()) and not problems:
        modules = modules | structural_modules(view, linears)
    stacks = {m.stack.rpartition(".")[2]: m.path for m in modules.values() if m.parts}
    if len(stacks) > 1:
        problems.append(
            InvalidInput(
                f"the model has more than one stack of layers: {listed(list(stacks.values()))}; "
                "say with --attach which nodes are the decoder's"
            )
        )
    return Mapped(modules, tuple(problems))


@dataclass(frozen=True)
class Derived:
    """A plan, and what stands against using it as it is: people correct it, nothing else does."""

    plan: AttachPlan
    problems: tuple[RemoraError, ...] = ()


def derive_plan(
    view: GraphView, linears: Sequence[Linear], mapped: Mapped, wanted: Sequence[Projection]
) -> Derived:
    """Points of all layers that have a wanted part; a fused projection comes whole."""
    names, modules = NodeNames(view), mapped.modules
    o_rows = {m.layer: li.k for li in linears if (m := modules.get(li.node)) and m.parts == ("o",)}
    points, rest, unknown = [], [], []
    problems = list(mapped.problems)
    for linear in linears:
        module, name = modules.get(linear.node), names.of(linear.node)
        if module is None:
            unknown.append(name)
        elif module.layer is None or not set(module.parts) & set(wanted):
            rest.append(name)
        else:
            try:
                points.append(_point(view, linear, module, name, o_rows.get(module.layer)))
            except RemoraError as e:
                problems.append(e)
                unknown.append(name)
    points.sort(key=lambda p: (p.layer, PROJECTIONS.index(p.projections[0])))
    return Derived(AttachPlan(tuple(points), tuple(rest), tuple(unknown)), tuple(problems))


def _point(
    view: GraphView, linear: Linear, module: Module, name: str, o_rows: int | None
) -> AttachPoint:
    """Raises Unsupported or InvalidInput where no branch can be added or parts cannot be told."""
    where = f"{module.path} (node {shown(name)})"
    if linear.refusal is not None:
        raise Unsupported(f"{where} takes no branch: {linear.refusal}")
    sizes = part_sizes(module.parts, linear.n, o_rows, where)
    check_seams(view, linear.y, sizes, where)
    return AttachPoint(module.layer or 0, name, tuple(map(Part, module.parts, sizes)))


def check_complete(plan: AttachPlan, view: GraphView, wanted: Sequence[Projection]) -> None:
    """Every layer has every wanted projection once, and no layer of the cache is without. Raises
    InvalidInput naming what is missing or doubled."""
    found = plan.by_target()
    if plan.undecided:
        raise InvalidInput(
            f"nothing tells which modules these nodes are: {listed(plan.undecided)}; "
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
            f"no node was found for {listed(missing) or 'any projection'}: {_hint(view)}name it "
            "with --attach, or leave such projections out with --targets"
        )


def check_accounted(plan: AttachPlan, view: GraphView, linears: Iterable[Linear]) -> None:
    """Raises InvalidInput when a given plan forgets a linear layer of the graph."""
    names = NodeNames(view)
    absent = [name for name in plan.not_adapted if names.find(name) is None]
    if absent:
        raise InvalidInput(f"not_adapted names {listed(absent)}, which the model does not have")
    told = {names.find(name) for name in plan.not_adapted}
    told |= {names.find(point.node) for point in plan.points}
    forgotten = [names.of(linear.node) for linear in linears if linear.node not in told]
    if forgotten:
        raise InvalidInput(
            f"the attach points say nothing of {listed(forgotten)}: add each to points or to "
            "not_adapted"
        )


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
