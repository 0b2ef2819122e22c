"""generation_config.json: every field honoured, harmless or warned about."""

import pytest

from remora_agent.runtime.api import (
    SamplingOverrides,
    SamplingParams,
    StoppingOverrides,
    StoppingParams,
)
from remora_agent.runtime.defaults import (
    layered,
    load_generation_defaults,
    parse_generation_config,
    sampling_params,
    stopping_params,
)
from remora_contract.errors import ArtifactInvalid
from remora_contract.release import SamplingDefaults


def parse(**config):
    return parse_generation_config(config, "generation_config.json")


def test_without_do_sample_the_answer_is_greedy_whatever_else_is_set():
    for config in ({}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.7, "top_k": 3}):
        assert sampling_params(parse(**config).sampling) == SamplingParams()


def test_sampling_settings_are_honoured():
    sampling = parse(do_sample=True, temperature=0.6, top_k=20, top_p=0.95).sampling
    asked = SamplingOverrides(seed=4)
    assert sampling_params(sampling, asked) == SamplingParams(0.6, 20, 0.95, 4)


def test_penalties_and_lengths_hold_with_and_without_sampling_and_min_p_only_with():
    config = {"repetition_penalty": 1.1, "min_p": 0.05, "min_new_tokens": 3}
    assert not parse(**config).warnings
    assert sampling_params(parse(**config).sampling) == SamplingParams(repetition_penalty=1.1)
    drawing = parse(do_sample=True, **config).sampling
    assert sampling_params(drawing) == SamplingParams(1.0, 50, min_p=0.05, repetition_penalty=1.1)
    assert drawing.min_tokens == 3


def test_a_default_of_min_tokens_gives_way_to_a_smaller_max_tokens():
    defaults = parse(min_new_tokens=9).sampling
    assert stopping_params(defaults, StoppingOverrides(max_tokens=4), 256).min_tokens == 4
    assert stopping_params(defaults, StoppingOverrides(min_tokens=2), 256).min_tokens == 2
    assert stopping_params(defaults, StoppingOverrides(), 256) == StoppingParams(256, min_tokens=9)


def test_unsaid_settings_of_a_sampling_config_are_transformers_own():
    assert sampling_params(parse(do_sample=True).sampling) == SamplingParams(1.0, 50, 1.0)


def test_max_new_tokens_is_the_default_length():
    assert parse(max_new_tokens=77).sampling.max_tokens == 77


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1, 2]),
        ("forced_bos_token_id", 0),
        ("something_new", 1),
    ],
)
def test_settings_that_would_change_answers_are_warned_about_by_name(name, value):
    (warning,) = parse(**{name: value}).warnings
    assert name in warning and "not implemented" in warning


def test_neutral_and_harmless_settings_are_silent():
    assert not parse(
        repetition_penalty=1.0,
        num_beams=1,
        no_repeat_ngram_size=0,
        min_p=None,
        suppress_tokens=None,
        bad_words_ids=[],
        eos_token_id=[1, 2],
        transformers_version="5.0",
        max_length=4096,
        use_cache=True,
    ).warnings


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "temperature": float("nan")},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "top_p": 0},
        {"do_sample": True, "top_k": True},
        {"do_sample": True, "min_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"min_new_tokens": -1},
        {"max_new_tokens": 0},
    ],
)
def test_a_value_out_of_range_is_named(config):
    with pytest.raises(ArtifactInvalid, match=list(config)[-1]):
        parse(**config)


def test_the_request_wins_over_the_release_over_the_bundle():
    request = SamplingDefaults(top_p=0.5)
    release = SamplingDefaults(temperature=0.2, top_p=0.6)
    bundle = SamplingDefaults(temperature=0.9, top_k=3, top_p=0.7, max_tokens=9)
    assert layered(request, layered(release, bundle)) == SamplingDefaults(0.2, 3, 0.5, 9)


def test_a_bundle_without_the_file_is_greedy_and_a_broken_one_is_named(tmp_path):
    assert load_generation_defaults(tmp_path).sampling.max_tokens is None
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ArtifactInvalid, match=r"generation_config\.json"):
        load_generation_defaults(tmp_path)
