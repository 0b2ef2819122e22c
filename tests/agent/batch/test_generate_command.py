"""`remora-agent generate` on a real engine."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from remora_agent.cli import build_app
from remora_contract.adapter import load_adapter
from remora_contract.bundle import load_bundle
from remora_contract.errors import (
    AdapterInvalid,
    DocumentInvalid,
    Refused,
    RemoraError,
    RequestInvalid,
)

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0.0, "max_generate_length": 8}


@pytest.fixture
def generate(real_bundles, tmp_path):
    def run(document: dict[str, object], *more: str, raises=None) -> dict[str, object]:
        (tmp_path / "in.json").write_text(json.dumps(document))
        arguments = [
            *("generate", "--bundle", str(real_bundles.plain)),
            *("--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")),
            *("--cache-dir", str(real_bundles.cache), "--threads", "1", *more),
        ]
        result = CliRunner().invoke(build_app(), arguments)
        if raises is not None:
            assert isinstance(result.exception, raises), result
        else:
            assert result.exit_code == 0, result
        out = tmp_path / "out.json"
        return json.loads(out.read_text()) if out.exists() else {"absent": str(result.exception)}

    return run


def test_mixed_adapters_in_one_batch_are_answered_in_order(generate, real_bundles):
    weights = {n: str(real_bundles.adapter_dir(n)) for n in "ab"}
    names = ["", "a", "b", "a", "", "b"]
    document = {
        **GREEDY,
        "batch_size": 4,
        "available_lora_weights": weights,
        "requests": [{"messages": HELLO, "lora_name": n} for n in names],
    }
    answer = generate(document)
    responses = answer["responses"]
    assert [r["request_idx"] for r in responses] == list(range(6))
    assert [r["batch_idx"] for r in responses] == [0, 1, 2, 3, 0, 1]
    by_name = {}
    for name, response in zip(names, responses, strict=True):
        provenance = response["remora"]["provenance"]
        assert provenance["bundle_digest"] == load_bundle(real_bundles.plain).digest
        used = {a["name"]: a["digest"] for a in provenance["adapters"]}
        wanted = {name: load_adapter(real_bundles.adapter_dir(name)).digest} if name else {}
        assert used == wanted
        by_name.setdefault(name, set()).add(response["output_text"])
    assert all(len(texts) == 1 for texts in by_name.values())
    assert len({next(iter(t)) for t in by_name.values()}) == 3
    first = responses[0]
    assert first["messages"] == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert first["formatted_complete_request"].startswith("<|im_start|>user\nhello")
    assert first["finish_reason"] in {"max-length", "end-of-sequence"}


def test_one_request_that_fails_leaves_the_others_answered_and_the_status_1(generate):
    requests = [{"messages": HELLO}, {"messages": [{"role": "user", "content": "x" * 4000}]}]
    answer = generate({**GREEDY, "requests": requests}, raises=RemoraError)
    good, bad = answer["responses"]
    assert good["finish_reason"] != "error"
    assert bad["finish_reason"] == "error"
    assert "context" in bad["error"] or "tokens" in bad["error"]


def test_a_seed_makes_the_file_repeatable(generate):
    document = {"max_generate_length": 24, "requests": [{"messages": HELLO}] * 2}
    first = [r["output_text"] for r in generate(document, "--seed", "5")["responses"]]
    assert first == [r["output_text"] for r in generate(document, "--seed", "5")["responses"]]
    assert first[0] != first[1]


def test_an_unconverted_adapter_is_refused_and_nothing_is_written(generate, tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    document = {"available_lora_weights": {"a": str(peft)}, "requests": [{"messages": HELLO}]}
    answer = generate(document, raises=AdapterInvalid)
    assert "remora-build adapter" in answer["absent"]


def test_a_missing_input_file_is_named(generate, tmp_path):
    result = CliRunner().invoke(
        build_app(),
        ["generate", "--bundle", "b", "--input", "absent.json", "--output", str(tmp_path / "o")],
    )
    assert isinstance(result.exception, DocumentInvalid)
    assert "absent.json" in str(result.exception)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps({"requests": [{"messages": HELLO}]}))
    arguments = ["generate", "--bundle", "absent", "--input", str(tmp_path / "in.json"), "--output"]
    for output, why in ((tmp_path / "no" / "o.json", "No such file"), (tmp_path, "directory")):
        result = CliRunner().invoke(build_app(), [*arguments, str(output)])
        assert isinstance(result.exception, Refused)
        assert why in str(result.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["in.json"]


def test_no_rows_at_all_are_refused(generate):
    generate({**GREEDY, "requests": [{"messages": HELLO}]}, "--rows", "0", raises=RequestInvalid)


def test_options_of_sampling_and_constraints_reach_the_engine(generate):
    document = {
        **GREEDY,
        "requests": [
            {"messages": HELLO, "constraint": {"choice": ["yes", "no"]}},
            {"messages": HELLO, "logit_bias": {"70": 100.0}},
        ],
    }
    first, second = generate(document, "--min-tokens", "2", "--logprobs", "1")["responses"]
    assert first["output_text"] in ("yes", "no")
    assert first["finish_reason"] == "end-of-sequence"
    scores = second["remora"]["logprobs"]
    assert len(scores) == 8 and {s["token_id"] for s in scores} == {70}
    assert all(len(s["top"]) == 1 for s in scores)


def test_an_option_out_of_range_fails_its_requests_by_name(generate):
    document = {**GREEDY, "requests": [{"messages": HELLO}]}
    answer = generate(document, "--repetition-penalty", "0", raises=RemoraError)
    assert "repetition_penalty must be" in answer["responses"][0]["error"]
