"""Waves: order and sizes."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.device_phase import MAX_SOAK_S
from remora_controller.domain import RolloutSpec, Wave
from remora_controller.waves import assign_waves, wave_order, wave_sizes

IDS = st.sets(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=1, max_size=50)
WAVES = st.lists(
    st.one_of(
        st.integers(1, 60).map(lambda n: Wave(count=n)),
        st.floats(0.1, 100).map(lambda p: Wave(percent=p)),
    ),
    max_size=5,
).map(tuple)


@pytest.mark.parametrize(
    ("waves", "devices", "sizes"),
    [
        ((Wave(count=1),), 3, [1, 2]),
        ((Wave(count=1),), 1, [1]),
        ((Wave(count=1), Wave(percent=50)), 10, [1, 4, 5]),
        ((Wave(percent=25), Wave(percent=100)), 8, [2, 6]),
        ((Wave(count=5), Wave(count=2)), 10, [5, 5]),
        ((Wave(percent=1),), 3, [1, 2]),
        ((Wave(count=1),), 0, []),
    ],
)
def test_waves_are_cumulative_and_the_rest_follows(waves, devices, sizes):
    assert wave_sizes(waves, devices) == sizes


@given(IDS, WAVES)
def test_every_device_is_in_exactly_one_wave(ids, waves):
    ordered = wave_order(ids, frozenset())
    sizes = wave_sizes(waves, len(ordered))
    assert sum(sizes) == len(ids)
    assert all(size > 0 for size in sizes)
    numbers = assign_waves(ordered, sizes)
    assert numbers.keys() == ids
    assert sorted(set(numbers.values())) == list(range(1, len(sizes) + 1))


@given(IDS)
def test_the_order_does_not_depend_on_how_devices_are_listed(ids):
    listed = sorted(ids)
    assert wave_order(listed, frozenset()) == wave_order(reversed(listed), frozenset())


@given(IDS, st.data())
def test_devices_that_can_answer_come_first(ids, data):
    online = data.draw(st.frozensets(st.sampled_from(sorted(ids))))
    ordered = wave_order(ids, online)
    assert set(ordered[: len(online)]) == online


@given(
    st.dictionaries(
        st.text("abcdef0123456789", min_size=1, max_size=6),
        st.sampled_from(["berlin", "lyon", "oslo"]),
        min_size=1,
        max_size=40,
    )
)
def test_every_beginning_of_the_order_holds_of_each_domain_its_share(sites):
    ordered = wave_order(sites, frozenset(), {d: (site,) for d, site in sites.items()})
    assert sorted(ordered) == sorted(sites)
    sizes = Counter(sites.values())
    for length in range(len(ordered) + 1):
        seen = Counter(sites[d] for d in ordered[:length])
        for site, size in sizes.items():
            share = size * length / len(ordered)
            assert abs(seen[site] - share) < len(sizes)


def test_a_quarter_of_the_fleet_is_a_quarter_of_each_site():
    sites = {f"d{i}": ("big" if i < 80 else "small",) for i in range(100)}
    first = wave_order(sites, frozenset(), sites)[:25]
    assert sum(sites[d] == ("small",) for d in first) == 5


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Wave(),
        lambda: Wave(count=1, percent=5.0),
        lambda: Wave(count=0),
        lambda: Wave(percent=101.0),
        lambda: RolloutSpec(success_threshold=0.0),
        lambda: RolloutSpec(soak_s=100.0, wave_timeout_s=100.0),
        lambda: RolloutSpec(max_unavailable=0),
        lambda: RolloutSpec(wave_timeout_s=math.inf),
        lambda: RolloutSpec(soak_s=math.nan),
        lambda: RolloutSpec(soak_s=MAX_SOAK_S + 1, wave_timeout_s=MAX_SOAK_S + 2),
    ],
)
def test_a_rollout_that_makes_no_sense_cannot_be_written_down(bad):
    with pytest.raises(ValueError):
        bad()
