"""Named sets of devices, for selectors: `group=canary`. Pure.

A static group lists devices, a dynamic one is a selector and follows labels by itself. A dynamic
group may name other groups, never itself by any way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from remora_contract.artifact import check_name
from remora_contract.errors import NotFound, RequestInvalid
from remora_controller.selector import Expression, Selector, Term, group_names, parse_selector

MAX_MEMBERS = 50_000
MAX_GROUPS = 1000
MAX_NESTING = 8
_NOBODY = Selector(Term("id", "in", frozenset()))


@dataclass(frozen=True)
class Group:
    name: str
    device_ids: tuple[str, ...] | None  # of a static group; of a dynamic one None
    selector: str | None  # of a dynamic group
    created_at: float = 0.0
    created_by: str = ""

    def __post_init__(self) -> None:
        if (self.device_ids is None) == (self.selector is None):
            raise ValueError("a group has either devices or a selector")


def make_group(
    name: str, device_ids: Sequence[str], selector: str, now: float, by: str, known: Iterable[str]
) -> Group:
    """`known`: the fleet's device ids. Raises RequestInvalid, NotFound, DocumentInvalid."""
    check_name(name, "group name")
    if selector:
        if device_ids:
            raise RequestInvalid(f"group {name}: give devices or a selector, not both")
        parse_selector(selector)
        return Group(name, None, selector, now, by)
    if len(device_ids) > MAX_MEMBERS:
        raise RequestInvalid(f"a group lists at most {MAX_MEMBERS} devices; use a selector")
    unknown = sorted(set(device_ids) - set(known))
    if unknown:
        raise NotFound(f"no device {unknown[0]}; `remora devices` lists those there are")
    return Group(name, tuple(sorted(set(device_ids))), None, now, by)


def bind(selector: Selector, groups: Mapping[str, Group]) -> Selector:
    """With what the groups it leads to stand for. Raises NotFound for one that is not there,
    RequestInvalid for one that leads back to itself."""
    found: dict[str, Expression] = {}
    _gather(selector.expression, groups, found, ())
    return Selector(selector.expression, found)


def bind_live(text: str, groups: Mapping[str, Group]) -> Selector:
    """Of what was stored long ago: when a group is gone, `not group=x` must not mean everybody, so
    then nobody matches."""
    try:
        return bind(parse_selector(text), groups)
    except NotFound:
        return _NOBODY


def users_of(name: str, groups: Iterable[Group]) -> list[str]:
    """Names of dynamic groups whose selectors name the group."""
    return sorted(g.name for g in groups if name in names_in(g.selector or ""))


def names_in(selector: str) -> set[str]:
    return set(group_names(parse_selector(selector).expression))


def _gather(
    expression: Expression,
    groups: Mapping[str, Group],
    found: dict[str, Expression],
    way: tuple[str, ...],
) -> None:
    if len(way) > MAX_NESTING:
        raise RequestInvalid(f"groups lead to each other over more than {MAX_NESTING} steps")
    for name in group_names(expression):
        if name in way:
            raise RequestInvalid(f"group {name} leads back to itself: {' -> '.join((*way, name))}")
        if name not in found:
            inside = _expression(name, groups)
            _gather(inside, groups, found, (*way, name))
            found[name] = inside


def _expression(name: str, groups: Mapping[str, Group]) -> Expression:
    group = groups.get(name)
    if group is None:
        raise NotFound(f"no group {name[:80]}; `remora groups list` shows those there are")
    if group.selector is not None:
        return parse_selector(group.selector).expression
    return Term("id", "in", frozenset(group.device_ids or ()))
