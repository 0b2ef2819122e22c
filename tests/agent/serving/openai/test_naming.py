"""What a `model` name means, and which names are listed."""

from __future__ import annotations

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.runtime.api import AdapterRef
from remora_agent.serving.call import UseCaseRef
from remora_agent.serving.openai.errors import FieldInvalid, ModelUnknown
from remora_agent.serving.openai.naming import listed_names, meaning_of
from remora_contract.release import WeightedName
from tests.support.runtime import add_adapter, make_bundle

BASE = "org/Model-1B"


@pytest.fixture
def directory(tmp_path) -> AdapterDirectory:
    bundle = make_bundle()
    made = AdapterDirectory(bundle)
    for seed, name in enumerate(("legal", "tales", "same")):
        add_adapter(made, bundle, tmp_path / name, name, "r1", seed=seed)
    made.set_use_case("support", [WeightedName("legal", 0.5)])
    made.set_use_case("same", [WeightedName("legal", 0.5)])
    return made


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        (BASE, ()),
        (f"{BASE}:", ()),
        ("legal", (AdapterRef("legal"),)),
        (f"{BASE}:legal", (AdapterRef("legal"),)),
        ("legal@r1", (AdapterRef("legal", "r1"),)),
        (f"{BASE}:legal@r1", (AdapterRef("legal", "r1"),)),
        ("support", UseCaseRef("support")),
        ("use_case:support", UseCaseRef("support")),
        (f"{BASE}:same", (AdapterRef("same"),)),
        ("use_case:same", UseCaseRef("same")),
    ],
)
def test_each_form_means_one_thing(directory, name, meaning):
    assert meaning_of(name, BASE, directory) == meaning


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Model-1B",
        "legal@r2",
        "legal@",
        f"{BASE}:legal@",
        f"{BASE}:support",
        f"{BASE}:nobody",
        "other:legal",
        "../legal",
    ],
)
def test_a_name_of_nothing_is_unknown(directory, name):
    with pytest.raises(ModelUnknown, match="/v1/models"):
        meaning_of(name, BASE, directory)


def test_a_name_of_two_things_is_refused_and_the_longer_forms_are_told(directory):
    with pytest.raises(FieldInvalid, match=f"{BASE}:same, use_case:same"):
        meaning_of("same", BASE, directory)
    with pytest.raises(FieldInvalid, match="legal:, legal:legal"):
        meaning_of("legal", "legal", directory)


def test_every_listed_name_means_what_it_is_listed_as(directory):
    for base in (BASE, "legal", "support"):
        names = listed_names(base, directory)
        assert len(names) == 1 + 3 + 2
        for name, meaning in names.items():
            assert meaning_of(name, base, directory) == meaning
