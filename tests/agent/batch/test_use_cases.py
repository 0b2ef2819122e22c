"""Use cases in batch files: the file's own, those of a converted document, weights per request."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from remora_agent.batch.document import Names, call_of, read_document
from remora_agent.cli import build_app
from remora_agent.runtime.api import AdapterRef
from remora_agent.serving.call import UseCaseRef
from remora_build.use_cases.convert import convert_use_cases
from remora_build.use_cases.source import Places
from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_contract.release import ReleaseUseCase, WeightedName

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
AVAILABLE = {"available_lora_weights": {"a": "./a", "b": "./b"}}
BOTH = {"both": {"a": 0.5, "b": 0.25}}


def read(request: dict[str, object], known: Names | None = None, **fields: object):
    document = {**AVAILABLE, "use_cases": BOTH, **fields, "requests": [{**HELLO, **request}]}
    return read_document(json.dumps(document).encode(), "input.json", known)


@pytest.mark.parametrize(
    ("request_fields", "selection"),
    [
        ({"use_case": "both"}, UseCaseRef("both")),
        (
            {"use_case": "both", "weights": {"b": -1, "a": 0}},
            UseCaseRef("both", (WeightedName("b", -1.0), WeightedName("a", 0.0))),
        ),
        ({"adapters": {"b": 2, "a": 0}}, (AdapterRef("b", None, 2.0), AdapterRef("a", None, 0.0))),
        ({"use_case": "", "lora_name": "a"}, (AdapterRef("a"),)),
        ({"use_case": None, "adapters": {}}, ()),
    ],
)
def test_a_request_chooses_a_use_case_a_mix_or_one_adapter(request_fields, selection):
    assert call_of(read(request_fields), 0, None).selection == selection


def test_the_files_use_cases_may_be_spelt_as_qairt_does():
    spelt = [{"name": "both", "adapter_names": ["a", "b"], "adapter_alphas": [0.5, 0.25]}]
    plain, qairt = read({"use_case": "both"}), read({"use_case": "both"}, use_cases=spelt)
    assert plain.use_cases == qairt.use_cases
    assert plain.use_cases == (
        ReleaseUseCase("both", (WeightedName("a", 0.5), WeightedName("b", 0.25))),
    )


def test_what_the_command_line_brings_may_be_named_and_composed():
    known = Names(frozenset("c"), (ReleaseUseCase("c-only", (WeightedName("c"),)),))
    assert call_of(read({"use_case": "c-only"}, known), 0, None).selection == UseCaseRef("c-only")
    mixed = read({"use_case": "a+c"}, known, use_cases={"a+c": {"a": 1.0, "c": 1.0}})
    assert call_of(mixed, 0, None).selection == UseCaseRef("a+c")
    with pytest.raises(DocumentInvalid, match="use case c-only is listed twice"):
        read({}, known, use_cases={"c-only": {"a": 1.0}})
    with pytest.raises(DocumentInvalid, match="an adapter of --use-cases too"):
        read({}, known, available_lora_weights={"c": "./c"}, use_cases={})


@pytest.mark.parametrize(
    ("request_fields", "said"),
    [
        ({"use_case": "zzz"}, r"use_case 'zzz' is unknown \(known: both\)"),
        ({"use_case": "both", "weights": {"c": 1.0}}, "use case both has no adapter 'c'"),
        ({"use_case": "both", "weights": {"a": "x"}}, "weights.a must be a number"),
        ({"weights": {"a": 1.0}}, "weights go with use_case"),
        ({"lora_name": "a", "weights": {"a": 1.0}}, "weights go with use_case"),
        ({"use_case": "both", "lora_name": "a"}, "one of lora_name, adapters and use_case"),
        ({"use_case": "both", "adapters": {"a": 1.0}}, "one of lora_name, adapters and use_case"),
        ({"adapters": {"c": 1.0}}, "adapters: 'c' is not in available_lora_weights"),
        ({"adapters": ["a"]}, "adapters must be a table"),
    ],
)
def test_a_choice_that_means_nothing_is_refused_by_its_place(request_fields, said):
    with pytest.raises(DocumentInvalid, match=rf"^input\.json: requests\[0\]: .*{said}"):
        read(request_fields)


@pytest.mark.parametrize(
    ("use_cases", "said"),
    [
        ({"u": {"c": 1.0}}, "unknown adapter c"),
        ({"u": {}}, "names no adapter"),
        ({"u": {"a": 1e9}}, "within"),
        ([{"name": "u", "adapter_names": ["a", "a"]}], "twice"),
    ],
)
def test_a_use_case_nobody_could_answer_is_refused(use_cases, said):
    with pytest.raises(DocumentInvalid, match=rf"^input\.json: use_cases.*{said}"):
        read({}, use_cases=use_cases)


def test_a_weight_out_of_range_is_refused_when_the_request_is_made():
    with pytest.raises(RequestInvalid, match="use_case_weights: weight of a"):
        call_of(read({"use_case": "both", "weights": {"a": 1000.0}}), 0, None)


def test_a_batch_of_use_cases_weights_and_mixes_is_answered(real_bundles, tmp_path):
    document = {
        "adapter": [{"name": n, "directory": str(real_bundles.adapter_dir(n))} for n in "ab"],
        "use-case": [
            {"name": "base", "adapter_names": []},
            {"name": "a+b", "adapter_names": ["a", "b"], "adapter_alphas": [0.5, 2.0]},
        ],
    }
    (tmp_path / "lora_config.yaml").write_text(yaml.safe_dump(document))
    convert_use_cases(
        tmp_path / "lora_config.yaml",
        tmp_path / "use_cases",
        base=real_bundles.plain,
        places=Places(),
    )
    choices: list[dict[str, object]] = [
        {"use_case": "a+b"},
        {"adapters": {"a": 0.5, "b": 2.0}},
        {"use_case": "a+b", "weights": {"b": 0.0}},
        {"adapters": {"a": 0.5}},
        {"use_case": "base"},
        {},
        {"use_case": "just-b"},
        {"lora_name": "b"},
    ]
    given = {
        "batch_size": 8,
        "temperature": 0.0,
        "max_generate_length": 12,
        "use_cases": {"just-b": {"b": 1.0}},
        "requests": [{**HELLO, **choice} for choice in choices],
    }
    (tmp_path / "in.json").write_text(json.dumps(given))
    result = CliRunner().invoke(
        build_app(),
        [
            *("generate", "--bundle", str(real_bundles.plain), "--threads", "1"),
            *("--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")),
            *("--cache-dir", str(real_bundles.cache), "--use-cases", str(tmp_path / "use_cases")),
        ],
    )
    assert result.exit_code == 0, result
    responses = json.loads((tmp_path / "out.json").read_text())["responses"]
    texts = [r["output_text"] for r in responses]
    assert texts[0] == texts[1] and texts[2] == texts[3]
    assert texts[4] == texts[5] and texts[6] == texts[7]
    assert len(set(texts)) == 4
    assert responses[2]["remora"]["use_case"] == "a+b"
    weights = {a["name"]: a["weight"] for a in responses[2]["remora"]["provenance"]["adapters"]}
    assert weights == {"a": 0.5, "b": 0.0}
    assert "use_case" not in responses[1]["remora"]
