"""Names, revisions, aliases with epochs, use cases."""

import itertools
import threading
from dataclasses import replace

import pytest

from remora_agent.bank.directory import AdapterDirectory, Declared
from remora_contract.digests import digest_bytes, short
from remora_contract.errors import (
    ArtifactInvalid,
    Conflict,
    DocumentInvalid,
    Incompatible,
    NotFound,
    RequestInvalid,
)
from remora_contract.experiments import Arm, Experiment
from remora_contract.release import WeightedName
from tests.support.runtime import add_adapter, make_bundle

BUNDLE = make_bundle()


@pytest.fixture
def directory():
    return AdapterDirectory(BUNDLE)


@pytest.fixture
def add(directory, tmp_path):
    count = itertools.count()

    def make(name, revision, seed, bundle=BUNDLE, **more):
        path = tmp_path / f"adapter-{next(count)}"
        return add_adapter(directory, bundle, path, name, revision, seed=seed, **more)

    return make


def test_the_first_revision_is_what_the_name_answers_with(directory, add):
    first, second = add("legal", "r1", 1), add("legal", "r2", 2)
    assert first.digest != second.digest and first.rank == 4 and first.bytes > 0
    assert directory.resolve("legal") == first
    assert directory.resolve("legal", "r2") == second
    assert directory.alias("legal").epoch == 1


def test_a_revision_without_a_name_is_called_after_its_digest(directory, add):
    record = add("legal", None, 1)
    assert record.revision == short(record.digest)


def test_registering_the_same_bytes_again_moves_them_and_other_bytes_conflict(directory, add):
    first = add("legal", "r1", 1)
    again = directory.register("legal", "r1", first.directory)
    assert again == first
    with pytest.raises(Conflict, match="choose another revision"):
        add("legal", "r1", 2)


def test_a_revision_that_comes_with_the_alias_moves_it_once(directory, add):
    add("legal", "r1", 1)
    second = add("legal", "r2", 2)
    assert not directory.is_alias_target(second)
    for _ in range(2):
        directory.register("legal", "r2", second.directory, set_alias=True)
        assert (directory.alias("legal").revision, directory.alias("legal").epoch) == ("r2", 2)
    assert directory.is_alias_target(second) and directory.swaps == 1


def test_an_alias_moves_by_compare_and_swap(directory, add):
    add("legal", "r1", 1), add("legal", "r2", 2)
    moved = directory.set_alias("legal", "r2", expected_epoch=1)
    assert (moved.revision, moved.epoch) == ("r2", 2)
    with pytest.raises(Conflict, match="epoch 2, not 1"):
        directory.set_alias("legal", "r1", expected_epoch=1)
    assert directory.set_alias("legal", "r1").epoch == 3
    assert directory.aliases() == (directory.alias("legal"),)


def test_of_many_swaps_at_one_epoch_exactly_one_wins(directory, add):
    for i in range(8):
        add("legal", f"r{i}", i)
    barrier, won = threading.Barrier(8), []

    def swap(i):
        barrier.wait(10)
        try:
            won.append(directory.set_alias("legal", f"r{i}", expected_epoch=1).revision)
        except Conflict:
            return

    threads = [threading.Thread(target=swap, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert won == [directory.alias("legal").revision] and directory.alias("legal").epoch == 2


def test_an_epoch_is_never_seen_twice_even_after_forgetting(directory, add):
    add("legal", "r1", 1)
    directory.set_alias("legal", "r1")
    directory.forget("legal", "r1")
    with pytest.raises(NotFound):
        directory.resolve("legal")
    add("legal", "r1", 1)
    assert directory.alias("legal").epoch == 3


def test_the_revision_a_name_answers_with_cannot_be_forgotten_before_others(directory, add):
    add("legal", "r1", 1), add("legal", "r2", 2)
    with pytest.raises(Conflict, match="another revision first"):
        directory.forget("legal", "r1")
    directory.forget("legal", "r2")
    directory.forget("legal", "r1")
    assert directory.revisions() == () and directory.aliases() == ()


@pytest.mark.parametrize("name", ["nobody", "legal"])
def test_an_unknown_name_or_revision_lists_what_is_known(directory, add, name):
    add("legal", "r1", 1)
    with pytest.raises(NotFound, match=r"known: (legal|r1)"):
        directory.resolve(name, "r9")


def test_an_adapter_of_another_base_or_too_large_is_refused_with_reasons(directory, add):
    other = replace(BUNDLE, base_digest=digest_bytes(b"other"))
    with pytest.raises(Incompatible, match="adapter_base"):
        add("legal", "r1", 1, bundle=other)
    with pytest.raises(Incompatible, match="adapter_rank"):
        add("legal", "r1", 1, r=17)


def test_a_directory_that_is_no_adapter_and_a_name_that_is_a_path_are_refused(
    directory, add, tmp_path
):
    with pytest.raises(ArtifactInvalid):
        directory.register("legal", "r1", tmp_path)
    record = add("legal", "r1", 1)
    with pytest.raises(DocumentInvalid):
        directory.register("../legal", "r1", record.directory)


def test_use_cases_are_kept_by_name_and_checked(directory, add):
    add("legal", "r1", 1), add("short", "r1", 2)
    mix = (WeightedName("legal", 0.5), WeightedName("short"))
    assert directory.set_use_case("letters", mix).adapters == mix
    assert directory.use_case("letters") in directory.use_cases()
    with pytest.raises(NotFound, match="nobody"):
        directory.set_use_case("letters", [WeightedName("nobody")])
    with pytest.raises(RequestInvalid):
        directory.set_use_case("letters", [])
    with pytest.raises(RequestInvalid):
        directory.set_use_case("letters", [*mix, mix[0]])
    with pytest.raises(RequestInvalid):
        directory.set_use_case("letters", [WeightedName("legal", float("nan"))])
    with pytest.raises(Conflict, match="letters"):
        directory.forget("legal", "r1")
    assert directory.delete_use_case("letters") and not directory.delete_use_case("letters")
    with pytest.raises(NotFound, match="letters"):
        directory.use_case("letters")


def test_what_answers_for_an_arm_of_an_experiment_stays_until_that_is_gone(directory, add):
    """Else a part of the sessions would be told that there is no such adapter."""
    add("legal", "r1", 1), add("short", "r1", 2)
    directory.set_use_case("letters", [WeightedName("short")])
    arms = (Arm("i", 50, adapter="legal"), Arm("c", 50, use_case="letters"))
    directory.set_experiments([Declared(Experiment("x", arms), {}, {})])
    with pytest.raises(Conflict, match="arm i of experiment x"):
        directory.forget("legal", "r1")
    with pytest.raises(Conflict, match="arm c of experiment x"):
        directory.delete_use_case("letters")
    directory.set_experiments([])
    directory.forget("legal", "r1")
    assert directory.delete_use_case("letters")


def test_a_use_case_may_join_names_and_only_base_names_no_adapter(directory, add):
    add("legal", "r1", 1)
    assert directory.set_use_case("legal+short", [WeightedName("legal")]).name == "legal+short"
    assert directory.set_use_case("base", []).adapters == ()
    for name in ("legal/short", "", "+legal"):
        with pytest.raises(DocumentInvalid):
            directory.set_use_case(name, [WeightedName("legal")])
