"""No field of PEFT's LoraConfig is ignored: each is honoured, harmless, or refused by its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from remora_build.adapters.fields import CARRIED, FIELDS
from remora_build.adapters.initial import check_initial
from remora_build.adapters.settings import parse_settings
from remora_contract.errors import AdapterInvalid, RemoraError, Unsupported
from tests.buildhost.documents import plain_config

NEUTRAL = sorted(name for name, rule in FIELDS.items() if rule.kind == "neutral")
WRONG_VALUES: dict[str, list[Any]] = {
    "r": [0, -1, 1.5, True, "8", None, 1 << 40],
    "lora_alpha": ["16", None, True, float("inf"), [16]],
    "use_rslora": ["yes", 1],
    "rank_pattern": [[8], {"q_proj": 0}, {"q_proj": "8"}, {"": 8}],
    "alpha_pattern": [[8], {"q_proj": None}, {"q_proj": True}, {"x" * 5000: 8}],
    "target_modules": [None, [], "", 7, [7], ["q_proj", None], {"q_proj": True}],
    "exclude_modules": [7, [None]],
    "layers_to_transform": ["all", [0, "1"], [-1], [True], {}],
    "layers_pattern": [7, "layers", ["layers"]],
    "target_parameters": ["gate_up_proj", [7], {}],
    "use_dora": ["yes", 1],
    "lora_bias": ["yes", 1],
    "bias": ["some", True, 7],
    "trainable_token_indices": [7, ["a"], [-1], {"embed_tokens": [True]}, {"": [1]}],
    "ensure_weight_tying": [1],
    "alora_invocation_tokens": [7, ["a"], [-1], [1] * 5000],
}


def test_every_field_of_the_installed_peft_is_in_the_table() -> None:
    import peft

    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == set(FIELDS)


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    assert [name for name in FIELDS if f"`{name}`" not in text] == []


def test_peft_defaults_are_accepted() -> None:
    import peft

    config = json.loads(json.dumps(peft.LoraConfig(task_type="CAUSAL_LM").to_dict(), default=vars))

    CARRIED.check(config, "adapter_config.json")


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_feature_that_is_not_carried_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(Unsupported, match=rf"file: {name} = .+: \w"):
        CARRIED.check({name: {"something": 1}}, "file")


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_is_accepted(name: str) -> None:
    for value in FIELDS[name].neutral:
        CARRIED.check({name: value}, "file")


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_an_initialisation_that_changes_the_base_asks_for_the_initial_state(name: str) -> None:
    settings = parse_settings(plain_config(init_lora_weights=name), "file")
    with pytest.raises(Unsupported, match=rf"{name}.*--initial.*path_initial_model"):
        check_initial(settings, None, "trained", "initial")


@pytest.mark.parametrize("name", ["loftq", "an_init_of_2031", 1.5])
def test_an_initialisation_that_cannot_be_undone_is_refused(name: object) -> None:
    with pytest.raises(Unsupported, match="init_lora_weights"):
        parse_settings(plain_config(init_lora_weights=name), "file")


def test_zero_does_not_pass_for_false() -> None:
    with pytest.raises(Unsupported, match="use_qalora"):
        CARRIED.check({"use_qalora": 0}, "file")
    with pytest.raises(AdapterInvalid, match="use_dora"):
        parse_settings(plain_config(use_dora=0), "file")


def test_every_field_says_in_one_sentence_what_becomes_of_it() -> None:
    for name, rule in FIELDS.items():
        assert rule.text and "\n" not in rule.text, name
        capital = rule.text[0].isupper()
        if rule.kind != "neutral":  # a reason completes a refusal and may begin with a name
            assert capital, name


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": None}])
def test_an_unknown_field_that_says_something_is_refused(value: object) -> None:
    with pytest.raises(Unsupported, match="use_lora_of_2031"):
        CARRIED.check({"use_lora_of_2031": value}, "file")


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_says_nothing_is_accepted(value: object) -> None:
    CARRIED.check({"use_lora_of_2031": value}, "file")


@pytest.mark.parametrize("peft_type", ["LOHA", "IA3", "ADALORA", "PREFIX_TUNING"])
def test_other_adapter_types_are_refused_before_their_fields(peft_type: str) -> None:
    with pytest.raises(Unsupported, match=r"peft_type = .*only LORA"):
        CARRIED.check({"a_field_of_theirs": 1, "peft_type": peft_type}, "file")


def test_a_config_without_a_type_is_no_adapter() -> None:
    config = plain_config()
    del config["peft_type"]
    with pytest.raises(AdapterInvalid, match="no peft_type"):
        parse_settings(config, "file")


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in WRONG_VALUES.items() for v in values]
)
def test_a_value_peft_could_not_use_is_refused_by_its_field(name: str, value: object) -> None:
    with pytest.raises(RemoraError, match=name):
        parse_settings(plain_config(**{name: value}), "file")


@pytest.mark.parametrize("name", ["layers_to_transform", "layers_pattern"])
def test_layer_selection_needs_a_list_of_modules(name: str) -> None:
    config = plain_config(target_modules="all-linear", layers_to_transform=[0])
    with pytest.raises(AdapterInvalid, match="layers_to_transform needs target_modules"):
        parse_settings(config | {name: [0] if name == "layers_to_transform" else "layers"}, "file")
