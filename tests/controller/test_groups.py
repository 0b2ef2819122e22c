"""Groups of devices, and selectors that name them."""

import pytest

from remora_contract.errors import NotFound, RemoraError, RequestInvalid
from remora_controller.groups import Group, bind, bind_live, make_group, users_of
from remora_controller.selector import parse_selector

GROUPS = {
    "canary": Group("canary", ("d1", "d2"), None),
    "orin": Group("orin", None, "gpu=orin"),
    "careful": Group("careful", None, "group=canary and not group=orin"),
    "a": Group("a", None, "group=b"),
    "b": Group("b", None, "site=x or group=a"),
}


@pytest.mark.parametrize(
    ("text", "device", "labels", "expected"),
    [
        ("group=canary", "d1", {}, True),
        ("group=canary", "d3", {}, False),
        ("group!=canary", "d3", {}, True),
        ("group in (canary,orin)", "d3", {"gpu": "orin"}, True),
        ("group notin (canary,orin)", "d1", {}, False),
        ("group=careful", "d1", {"gpu": "orin"}, False),
        ("group=careful", "d1", {"gpu": "thor"}, True),
        ("group=canary", "d3", {"group": "canary"}, False),
    ],
)
def test_a_selector_means_what_its_groups_hold(text, device, labels, expected):
    assert bind(parse_selector(text), GROUPS).matches(device, labels) is expected


def test_a_group_that_leads_back_to_itself_is_refused_with_the_way():
    with pytest.raises(RequestInvalid, match="a -> b -> a"):
        bind(parse_selector("group=a"), GROUPS)


def test_groups_over_too_many_steps_are_refused():
    chain = {f"g{n}": Group(f"g{n}", None, f"group=g{n + 1}") for n in range(40)}
    with pytest.raises(RequestInvalid, match="more than 8 steps"):
        bind(parse_selector("group=g0"), chain)


def test_groups_that_name_each_other_often_are_looked_at_once():
    wide = {f"g{n}": Group(f"g{n}", None, " or ".join([f"group=g{n + 1}"] * 50)) for n in range(7)}
    wide["g7"] = Group("g7", (), None)
    assert not bind(parse_selector("group=g0"), wide).matches("d", {})


def test_an_unknown_group_is_an_error_for_people_and_nobody_for_what_is_stored():
    with pytest.raises(NotFound, match="remora groups list"):
        bind(parse_selector("not group=gone"), GROUPS)
    assert not bind_live("not group=gone", GROUPS).matches("d1", {})
    assert bind_live("not group=orin", GROUPS).matches("d1", {})


@pytest.mark.parametrize(
    ("devices", "selector", "named"),
    [(["d1"], "site=x", "not both"), (["d9"], "", "no device d9"), ([], "a b", "cannot read")],
)
def test_a_group_that_makes_no_sense_is_refused(devices, selector, named):
    with pytest.raises(RemoraError, match=named):
        make_group("g", devices, selector, 1.0, "op", ["d1", "d2"])


def test_who_uses_a_group_is_known():
    assert users_of("canary", GROUPS.values()) == ["careful"]
