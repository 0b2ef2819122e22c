"""Measuring: sources that come and go, counters that survive, bounded spools, /metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.control.state import Database
from remora_agent.telemetry.energy import MAX_GAP_S, Energy, joules_per_token
from remora_agent.telemetry.jetson import JetsonSource, board_readings
from remora_agent.telemetry.nvidia import NvmlSource
from remora_agent.telemetry.prometheus import MetricsServer
from remora_agent.telemetry.sampler import Opener, Sampler
from remora_agent.telemetry.serving import serving_readings
from remora_agent.telemetry.source import Reading
from remora_agent.telemetry.sources import device_openers
from remora_agent.telemetry.spool import MetricSpool
from remora_agent.telemetry.system import SystemSource
from remora_contract.errors import Exhausted, Refused, Unavailable


class Scripted:
    name = "scripted"

    def __init__(self, *readings: Reading) -> None:
        self.readings, self.closed, self.broken = readings, False, False

    def read(self) -> Iterator[Reading]:
        if self.broken:
            raise Unavailable("unplugged")
        yield from self.readings

    def close(self) -> None:
        self.closed = True


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def values(readings) -> dict[str, float]:
    return {r.wire_name: r.value for r in readings}


def sampler_of(*sources: Scripted, metrics=None, clock=None) -> Sampler:
    openers = [Opener(f"s{i}", lambda s=s: s) for i, s in enumerate(sources)]
    return Sampler(openers, lambda: metrics or {}, clock or Clock())


def test_this_machine_is_measured_for_real(tmp_path):
    found = values(SystemSource(tmp_path).read())
    assert 0 <= found["cpu_load"] <= 1
    assert 0 < found["memory_used_bytes"] < found["memory_total_bytes"]
    assert found["disk_free_bytes"] > 0
    assert found["agent_memory_bytes"] > 1e6


def test_throttling_is_counted_where_the_kernel_counts_it(tmp_path):
    for cpu in range(2):
        folder = tmp_path / f"cpu{cpu}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text("3\n")
    found = values(SystemSource(tmp_path, cpu_directory=tmp_path).read())
    assert found["cpu_throttle_events_total"] == 6.0


def test_the_first_source_to_give_a_name_wins():
    first, second = Scripted(Reading("power_watts", 5.0)), Scripted(Reading("power_watts", 9.0))
    assert values(sampler_of(first, second).sample())["power_watts"] == 5.0


def test_a_source_that_fails_is_closed_and_opened_again_later():
    clock, source = Clock(), Scripted(Reading("cpu_load", 0.5))
    sampler = sampler_of(source, Scripted(Reading("gpu_load", 0.1)), clock=clock)
    assert set(values(sampler.sample())) == {"cpu_load", "gpu_load"}
    source.broken = True
    assert set(values(sampler.sample())) == {"gpu_load"}
    assert source.closed
    assert sampler.absent() == {"s0": "unplugged"}
    source.broken = False
    assert set(values(sampler.sample())) == {"gpu_load"}, "not every sample tries again"
    clock.now_s += 301
    assert set(values(sampler.sample())) == {"cpu_load", "gpu_load"}


def test_what_is_not_installed_is_absent_with_the_thing_to_install(tmp_path):
    sampler = Sampler(device_openers(tmp_path), dict, Clock())
    assert "cpu_load" in values(sampler.sample())
    for why in sampler.absent().values():
        assert "pip install 'remora[" in why or "GPU" in why
    sampler.close()


def test_optional_libraries_are_named_when_they_are_missing(monkeypatch):
    for module, source in (("jtop", JetsonSource), ("pynvml", NvmlSource)):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(Unavailable, match="pip install 'remora"):
            source()


def test_serving_metrics_get_their_documented_names():
    metrics = {"requests": 4, "failures": 1, "tokens": 100, "ttft_s": 0.2}
    found = values(sampler_of(metrics=metrics).sample())
    assert found["requests_total"] == 4
    assert found["requests_failed_total"] == 1
    assert found["completion_tokens_total"] == 100
    assert found["ttft_s"] == 0.2


def test_joules_per_token_divide_the_energy_of_the_window():
    clock, metrics = Clock(), {"tokens": 0.0}
    sampler = sampler_of(Scripted(Reading("power_watts", 10.0)), metrics=metrics, clock=clock)
    sampler.sample()
    clock.now_s += 10
    metrics["tokens"] = 50.0
    found = values(sampler.sample())
    assert found["energy_joules_total"] == pytest.approx(100.0)
    assert found["joules_per_token"] == pytest.approx(2.0)
    clock.now_s += 10
    assert "joules_per_token" not in values(sampler.sample()), "no tokens, nobody's energy"


def test_unknown_power_gives_no_energy():
    assert "energy_joules_total" not in values(sampler_of(Scripted()).sample())


@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.01, MAX_GAP_S - 1)), min_size=2, max_size=20)
)
def test_energy_lies_between_least_and_most_power_times_time(samples):
    meter, now = Energy(), 0.0
    for watts, step in samples:
        now += step
        meter = meter.add(watts, now)
    elapsed = sum(step for _, step in samples[1:])
    least, most = min(w for w, _ in samples), max(w for w, _ in samples)
    assert least * elapsed - 1e-6 <= meter.joules <= most * elapsed * (1 + 1e-9) + 1e-6


def test_a_hole_between_samples_is_not_invented():
    meter = Energy().add(100.0, 0.0).add(100.0, MAX_GAP_S + 1)
    assert meter.joules == 0.0
    assert Energy().add(100.0, 0.0).add(None, 1.0).add(100.0, 2.0).joules == 0.0
    assert joules_per_token(5.0, 0.0) is None


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path / "state.db")
    yield made
    made.close()


def test_samples_that_were_sent_are_gone_and_the_others_stay_in_order(database):
    spool = MetricSpool(database, 100)
    for i in range(10):
        spool.add([Reading("cpu_load", float(i))], float(i))
        if i == 4:
            spool.flush()
    samples, mark = spool.batch(7)
    assert [s.value for s in samples] == [0, 1, 2, 3, 4, 5, 6]
    spool.sent(mark)
    assert [s.value for s in spool.batch(100)[0]] == [7, 8, 9]


def test_a_batch_with_its_counters_is_no_larger_than_the_controller_takes(database):
    """More is refused, and the device would send the same for ever."""
    spool = MetricSpool(database, 100)
    for i in range(30):
        counters = [Reading(f"c{n}_total", float(i)) for n in range(8)]
        spool.add([Reading("cpu_load", float(i)), *counters], float(i))
    samples, mark = spool.batch(20)
    assert len(samples) == 20
    spool.sent(mark)
    assert next(s.value for s in spool.batch(20)[0] if s.name == "cpu_load") == 12.0
    assert len(spool.batch(5)[0]) == 9, "counters are whole, and one level goes on"


def levels_of(spool, limit=1000):
    return [s.value for s in spool.batch(limit)[0]]


def test_a_controller_that_wants_fewer_samples_gets_whole_ones_and_every_counter(database):
    spool = MetricSpool(database, 100)
    spool.thin(30.0)
    for i in range(10):
        at = 10.0 * i - 0.05 * i  # a timer that fires a little early
        spool.add([Reading("cpu_load", float(i)), Reading("memory_used_bytes", float(i))], at)
        spool.add([Reading("requests_total", float(i))], at)
    samples, _ = spool.batch(100)
    kept = [(s.name, s.value) for s in samples]
    assert ("requests_total", 9.0) in kept, "a counter is as it stands, however seldom it is sent"
    levels = [v for n, v in kept if n == "cpu_load"]
    assert levels == [0.0, 3.0, 6.0, 9.0]
    assert levels == [v for n, v in kept if n == "memory_used_bytes"]
    spool.thin(0.0)
    spool.add([Reading("cpu_load", 10.0)], 91.0)
    assert levels_of(spool)[-1] == 10.0, "all of them again, at once"


def test_a_clock_that_was_set_back_ends_no_samples(database):
    spool = MetricSpool(database, 100)
    spool.thin(60.0)
    spool.add([Reading("cpu_load", 1.0)], 1000.0)
    spool.add([Reading("cpu_load", 2.0)], 10.0)
    assert levels_of(spool) == [1.0, 2.0]


def test_what_was_dropped_while_a_batch_was_under_way_costs_no_unsent_sample(database):
    spool = MetricSpool(database, 10)
    for i in range(10):
        spool.add([Reading("cpu_load", float(i))], float(i))
    _, mark = spool.batch(6)
    for i in range(10, 14):
        spool.add([Reading("cpu_load", float(i))], float(i))
    spool.flush()  # 0 to 3 are dropped; 4 and 5 are in the batch
    spool.sent(mark)
    assert levels_of(spool) == [6, 7, 8, 9, 10, 11, 12, 13]
    spool.sent(mark)
    assert spool.waiting() == 8


def test_what_a_full_disk_cost_while_a_batch_was_under_way_costs_no_later_sample(
    database, monkeypatch
):
    def full():
        raise Exhausted("the disk is full")

    spool = MetricSpool(database, 10)
    spool.add([Reading("cpu_load", 1.0)], 1.0)
    _, mark = spool.batch(10)
    with monkeypatch.context() as patched:
        patched.setattr(database, "transaction", full)
        spool.flush()
    spool.add([Reading("cpu_load", 2.0)], 2.0)
    spool.sent(mark)
    assert levels_of(spool) == [2.0]


def test_what_was_not_sent_survives_a_restart(tmp_path):
    first = Database(tmp_path / "s.db")
    spool = MetricSpool(first, 100)
    spool.add([Reading("cpu_load", 0.5)], 1.0)
    spool.flush()
    first.close()
    second = Database(tmp_path / "s.db")
    assert [s.value for s in MetricSpool(second, 100).batch(10)[0]] == [0.5]
    second.close()


def test_the_oldest_detail_is_dropped_and_counters_are_exact(database):
    spool = MetricSpool(database, 50)
    for i in range(400):
        spool.add([Reading("cpu_load", float(i)), Reading("tokens_total", float(i))], float(i))
    spool.flush()
    samples, _ = spool.batch(1000)
    levels = [s.value for s in samples if s.name == "cpu_load"]
    assert levels == [float(i) for i in range(350, 400)]
    assert [s.value for s in samples if s.name == "tokens_total"] == [399.0]


def test_counters_go_on_over_restarts_and_over_counters_that_start_again(tmp_path):
    for run in range(3):
        database = Database(tmp_path / "s.db")
        spool = MetricSpool(database, 50)
        for value in (10.0, 30.0, 5.0):  # the serving model was replaced after 30
            spool.add([Reading("tokens_total", value)], 1.0)
        [total], _ = spool.batch(10)
        assert total.value == 35.0 * (run + 1)
        spool.flush()
        database.close()


def test_memory_is_bounded_while_offline(database):
    spool = MetricSpool(database, 10_000)
    for i in range(2000):
        spool.add([Reading("cpu_load", float(i))], float(i))
    assert len(spool._fresh) < 500
    assert spool.waiting() == 2000


def scrape(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        return answer.read().decode()


def test_prometheus_reads_the_latest_sample():
    readings = [
        Reading("temperature_celsius", 41.5, "CPU"),
        Reading("temperature_celsius", 40.0, "GPU"),
        Reading("completion_tokens_total", 7.0),
    ]
    with MetricsServer("127.0.0.1", 0, lambda: readings) as server:
        text = scrape(server)
        assert 'remora_temperature_celsius{sensor="CPU"} 41.5' in text
        assert 'remora_temperature_celsius{sensor="GPU"} 40.0' in text
        assert "# TYPE remora_completion_tokens_total counter" in text
        assert "remora_completion_tokens_total 7.0" in text
        readings[2] = Reading("completion_tokens_total", 8.0)
        assert "remora_completion_tokens_total 8.0" in scrape(server)


def test_serve_and_run_show_the_same_serving_metrics_under_the_same_names():
    """`serve` reads its host directly, `run` through its sampler: a dashboard must not care."""
    counted = {"requests": 3.0, "engine_faults": 1.0, "ttft_s": 0.25, "step_s.decode": 0.01}
    sampler = sampler_of(metrics=counted)
    sampler.sample()
    with (
        MetricsServer("127.0.0.1", 0, lambda: serving_readings(counted)) as serve,
        MetricsServer("127.0.0.1", 0, sampler.latest) as run,
    ):
        assert scrape(serve) == scrape(run)
        assert 'remora_step_s{sensor="decode"} 0.01' in scrape(serve)
        assert "remora_engine_faults_total 1.0" in scrape(serve)


def test_a_taken_metrics_port_is_refused_by_name():
    with (
        MetricsServer("127.0.0.1", 0, list) as server,
        pytest.raises(Refused, match="metrics_listen"),
    ):
        MetricsServer("127.0.0.1", server.port, list)


def test_metric_names_are_checked_where_they_are_made():
    with pytest.raises(ValueError, match="CPU Load"):
        Reading("CPU Load", 1.0)


def test_a_boards_dictionaries_become_readings_in_si_units():
    found = values(
        board_readings(
            gpu={"ga10b": {"status": {"load": 43.0}, "freq": {"cur": 918000}}},
            temperature={
                "CPU": {"temp": 51.2, "online": True},
                "CV0": {"temp": -256, "online": False},
            },
            power={
                "rail": {"VDD_CPU_GPU": {"power": 1500, "curr": 400, "warn": 300, "online": True}},
                "tot": {"power": 6200},
            },
            memory={"RAM": {"tot": 8, "shared": 1024}},
            nvpmodel="MAXN",
        )
    )
    assert found == {
        "gpu_load.ga10b": 0.43,
        "gpu_frequency_hz.ga10b": 918_000_000.0,
        "temperature_celsius.CPU": 51.2,
        "rail_power_watts.VDD_CPU_GPU": 1.5,
        "rail_over_current.VDD_CPU_GPU": 1.0,
        "power_watts": 6.2,
        "gpu_memory_used_bytes": 1024.0 * 1024,
        "power_mode_info.MAXN": 1.0,
    }
