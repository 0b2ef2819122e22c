"""What differs between two releases."""

from dataclasses import replace

from remora_contract.release import Constraints, ReleaseUseCase, SamplingDefaults, WeightedName
from remora_controller.release_diff import Difference, release_differences
from tests.controller import artifacts


def test_each_part_is_compared_under_its_name(tmp_path):
    bundle, sql, chat = (
        artifacts.bundle(tmp_path),
        artifacts.adapter(tmp_path, "sql", "1"),
        artifacts.adapter(tmp_path, "chat", "1"),
    )
    new = artifacts.publish(tmp_path, "adapter", "sql", "2", [b"new"], rank=4)
    manifests = {m.digest: m for m in (bundle, sql, chat, new)}
    before = artifacts.release("first", bundle, sql, chat)
    mixed = ReleaseUseCase("both", (WeightedName("sql"), WeightedName("chat", 0.5)))
    after = replace(
        artifacts.release("first", bundle, chat, new),
        use_cases=(mixed,),
        sampling=SamplingDefaults(temperature=0.2),
        constraints=Constraints(min_memory_bytes=1 << 30),
    )
    found = {d.path: (d.before, d.after) for d in release_differences(before, after, manifests)}
    assert found["adapters.sql.revision"] == ('"1"', '"2"')
    assert found["adapters.sql.facts.rank"] == ("8", "4")
    assert found["use_cases.both.adapters.chat.weight"] == (None, "0.5")
    assert found["sampling.temperature"] == (None, "0.2")
    assert found["constraints.min_memory_bytes"] == (None, "1073741824")
    assert not any(path.startswith(("bundle", "adapters.chat")) for path in found)


def test_order_is_no_difference_and_what_is_unpublished_differs_by_digest(tmp_path):
    one, two = artifacts.bundle(tmp_path, "1"), artifacts.bundle(tmp_path, "2")
    sql, chat = artifacts.adapter(tmp_path, "sql"), artifacts.adapter(tmp_path, "chat")
    assert not release_differences(
        artifacts.release("r", one, sql, chat), artifacts.release("r", one, chat, sql), {}
    )
    assert release_differences(artifacts.release("r", one), artifacts.release("r", two), {}) == [
        Difference("bundle.digest", f'"{one.digest}"', f'"{two.digest}"')
    ]
