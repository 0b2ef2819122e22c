"""Use cases in releases: QAIRT's document taken as it is, its spelling in release.yaml, and what a
bundle's bank cannot hold together refused before anything is shipped."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from remora_contract.digests import digest_bytes
from remora_contract.errors import DocumentInvalid, NotFound, Refused, UsageWrong
from remora_controller.operator_cli.app import app
from remora_controller.operator_cli.release_document import (
    from_flags,
    read_release_file,
    read_use_cases,
)
from tests.controller import artifacts
from tests.controller.test_cli import Remora

QAIRT = {
    "adapter": [{"name": "sql", "lora_config": "sql.json"}, {"name": "chat"}],
    "use-case": [
        {"name": "base", "adapter_names": []},
        {
            "name": "sql+chat",
            "adapter_names": ["sql", "chat"],
            "adapter_alphas": [0.7, -0.3],
            "quant_overrides": "both.encodings",
        },
    ],
}
WANTED = [
    {"name": "base", "adapters": []},
    {
        "name": "sql+chat",
        "adapters": [{"name": "sql", "weight": 0.7}, {"name": "chat", "weight": -0.3}],
    },
]


@pytest.fixture
def remora(world):
    return Remora(world)


@pytest.fixture
def published(world):
    artifacts.bundle(world.home.repository)
    artifacts.adapter(world.home.repository, "sql", "1")
    artifacts.adapter(world.home.repository, "sql", "2")
    artifacts.adapter(world.home.repository, "chat", "1")
    return world


def created(remora, *words: str) -> dict:
    remora.json("releases", "create", *words)
    return remora.json("releases", "list")[0]["release"]


def test_a_qairt_document_gives_a_release_its_adapters_and_use_cases(published, remora, tmp_path):
    file = tmp_path / "lora_config.yaml"
    file.write_text(yaml.safe_dump(QAIRT))
    words = ("--name", "r", "--bundle", "tiny", "--use-cases", str(file), "--adapter", "sql=sql@1")
    release = created(remora, *words)
    assert release["use_cases"] == WANTED
    assert {a["name"]: a["revision"] for a in release["adapters"]} == {"sql": "1", "chat": "1"}
    told = CliRunner().invoke(app, [*remora._globals, "releases", "create", *words, "--json"])
    assert "only QAIRT reads it: quant_overrides of sql+chat" in told.stderr
    assert json.loads(told.stdout)["name"] == "r"


def test_a_converted_document_names_its_adapters_by_digest(published, tmp_path):
    digest = digest_bytes(b"converted")
    entry = {"name": "sql", "directory": "adapters/sql", "digest": digest}
    document = {
        "format_version": 1,
        "base_digest": digest,
        "adapters": [entry],
        "use_cases": [{"name": "u", "adapter_names": ["sql"]}],
    }
    parsed = read_use_cases(json.dumps(document).encode(), "use_cases.json")
    assert from_flags("r", "b", [], [], parsed).adapters == {"sql": digest}
    # What --adapter says wins; use cases of both kinds of option stand side by side.
    both = from_flags("r", "b", ["sql=sql@1"], ["v=sql:0.5"], parsed)
    assert both.adapters == {"sql": "sql@1"}
    assert [u.name for u in both.use_cases] == ["v", "u"]


@pytest.mark.parametrize(
    "use_cases",
    [
        {"base": {"adapter_names": []}, "sql+chat": {"sql": 0.7, "chat": -0.3}},
        [
            {"name": "base", "adapter_names": []},
            {"name": "sql+chat", "adapter_names": ["sql", "chat"], "adapter_alphas": [0.7, -0.3]},
        ],
    ],
)
def test_a_release_file_may_spell_use_cases_as_qairt_does(published, remora, tmp_path, use_cases):
    file = tmp_path / "release.yaml"
    adapters = {"sql": "sql@2", "chat": "chat"}
    release = {"name": "r", "bundle": "tiny", "adapters": adapters, "use_cases": use_cases}
    file.write_text(yaml.safe_dump(release, sort_keys=False))
    assert created(remora, "--file", str(file))["use_cases"] == WANTED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("use_cases: {u: {sql: heavy}}", r"use_cases\.u: sql must be a number"),
        (
            "use_cases: {u: {adapter_names: [sql], quant_overrides: q}}",
            "quant_overrides is QAIRT's",
        ),
        ("use_cases: {u: {sql: 1}, u: {sql: 2}}", "key 'u' is there twice"),
        ("use_cases: !!python/name:os.system", "tags"),
        ("use_cases: 3", "use_cases: must be a table or a list"),
    ],
)
def test_a_release_file_is_strict_about_use_cases(text, said):
    with pytest.raises(DocumentInvalid, match=said):
        read_release_file(f"name: r\nbundle: b\n{text}\n".encode(), "release.yaml")


def test_what_cannot_be_taken_is_refused(published, remora, tmp_path):
    file = tmp_path / "lora_config.yaml"
    file.write_text(yaml.safe_dump({**QAIRT, "adapter": [*QAIRT["adapter"], {"name": "poet"}]}))
    flags = ("releases", "create", "--name", "r", "--bundle", "tiny", "--use-cases", str(file))
    with pytest.raises(NotFound, match="no adapter poet"):
        remora(*flags)
    with pytest.raises(UsageWrong, match="leave the other options out"):
        remora("releases", "create", "--file", str(file), "--use-cases", str(file))
    file.write_bytes(b"#" * ((4 << 20) + 1))
    with pytest.raises(DocumentInvalid, match="larger than"):
        remora(*flags)
    with pytest.raises(NotFound, match="cannot be read"):
        remora(*flags[:-1], str(tmp_path / "nowhere.yaml"))


def test_a_use_case_the_bank_cannot_hold_together_is_refused(world, remora):
    repository = world.home.repository
    artifacts.bundle(repository)
    artifacts.publish(repository, "adapter", "sql", "1", [b"sql"], rank=20)
    artifacts.publish(repository, "adapter", "chat", "1", [b"chat"], rank=16)
    words = ("releases", "create", "--name", "r", "--bundle", "tiny")
    adapters = ("--adapter", "sql=sql", "--adapter", "chat=chat")
    remora(*words, *adapters, "--use-case", "one=sql", "--use-case", "other=chat:0.5")
    with pytest.raises(Refused, match="use case both of ranks that add up to <= 32, has rank 36"):
        remora(*words, *adapters, "--use-case", "both=sql,chat")
