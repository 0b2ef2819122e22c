"""Adapters, use cases and status over gRPC."""

from __future__ import annotations

import pytest

from remora_agent.client import UseCase
from remora_contract.errors import (
    Conflict,
    DocumentInvalid,
    NotFound,
    Refused,
    RequestInvalid,
)

OPTIONS = {"max_tokens": 4, "ignore_eos": True, "temperature": 0.0}


def test_an_adapter_is_registered_and_answers_under_its_name(served, world):
    adapter = world.adapter("c")
    info = served.client.register_adapter("c", str(adapter.directory))
    assert (info.name, info.digest, info.rank) == ("c", adapter.digest, 4)
    assert info.revision == adapter.digest.removeprefix("sha256:")[:12]
    assert info.alias_target
    result = served.client.generate("x", adapter="c", **OPTIONS)
    assert result.provenance.adapters[0].digest == adapter.digest


def test_an_alias_moves_only_from_the_epoch_that_was_seen(served, world):
    new = world.adapter("a", "r2")
    served.client.register_adapter("a", str(new.directory), "r2")
    seen = next(a for a in served.client.adapters().aliases if a.name == "a")
    moved = served.client.set_alias("a", "r2", seen.epoch)
    assert (moved.revision, moved.digest, moved.epoch) == ("r2", new.digest, seen.epoch + 1)
    with pytest.raises(Conflict, match="epoch"):
        served.client.set_alias("a", "r1", seen.epoch)
    result = served.client.generate("x", adapter="a", **OPTIONS)
    assert result.provenance.adapters[0].digest == new.digest


def test_load_pin_and_unload_move_an_adapter_between_the_tiers(served, world):
    served.client.register_adapter("c", str(world.adapter("c").directory), "r1")
    assert served.client.load_adapter("c").tier == "bank"
    assert served.client.pin_adapter("c").pinned
    with pytest.raises(Refused):
        served.client.unload_adapter("c")
    assert not served.client.pin_adapter("c", pinned=False).pinned
    assert served.client.unload_adapter("c").tier != "bank"
    served.client.unload_adapter("c", "r1", forget=True)
    with pytest.raises(NotFound):
        served.client.load_adapter("c")


def test_capacity_tells_how_many_more_fit(served):
    capacity = served.client.capacity(8)
    assert capacity.max_rank == 64
    assert capacity.used_rank == 8  # a and b, rank 4 each
    assert capacity.more_adapters == 8
    with pytest.raises(RequestInvalid):
        served.client.capacity(0)


@pytest.mark.parametrize(
    ("name", "path", "error"),
    [
        ("", "/x", RequestInvalid),
        ("c", "relative", RequestInvalid),
        ("c", "/nowhere/at/all", RequestInvalid),
        ("../c", None, DocumentInvalid),
    ],
)
def test_a_registration_that_cannot_work_is_refused(served, world, name, path, error):
    with pytest.raises(error):
        served.client.register_adapter(name, path or str(world.adapter("c").directory))


def test_an_adapter_as_peft_saves_it_is_to_be_converted_first(served, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RequestInvalid, match="remora-build adapter"):
        served.client.register_adapter("c", str(tmp_path))


def test_an_alias_needs_a_revision_and_an_unload_a_known_mode(served):
    with pytest.raises(RequestInvalid, match="revision"):
        served.client.set_alias("a", "")
    with pytest.raises(RequestInvalid, match="mode"):
        served.client.unload_adapter("a", mode="violent")


def test_use_cases_are_set_listed_used_and_deleted(served):
    made = served.client.set_use_case("mostly-a", {"a": 0.75, "b": 0.25})
    assert made == UseCase("mostly-a", {"a": 0.75, "b": 0.25})
    assert {u.name for u in served.client.use_cases()} == {"both", "mostly-a"}
    result = served.client.generate("x", use_case="mostly-a", **OPTIONS)
    assert result.token_ids == served.solo("x", 4, {"a": 0.75, "b": 0.25})
    assert served.client.delete_use_case("mostly-a")
    assert not served.client.delete_use_case("mostly-a")


def test_a_use_case_of_unknown_adapters_or_fixed_revisions_is_refused(served):
    with pytest.raises(NotFound):
        served.client.set_use_case("u", {"zzz": 1.0})
    with pytest.raises(RequestInvalid, match="revision"):
        served.client.set_use_case("u", {"a@r1": 1.0})
    with pytest.raises(RequestInvalid):
        served.client.set_use_case("u", {})


def test_status_says_what_serves(served, world):
    served.client.generate("x", **OPTIONS)
    status = served.client.status()
    assert status.state == "serving"
    assert status.backend == "reference"
    assert status.model_name == "base"
    assert status.bundle_digest == world.bundle("base").digest
    assert (status.context_tokens, status.rows) == (256, 4)
    assert status.requests_served == 1
    assert status.tokens_generated == 4
