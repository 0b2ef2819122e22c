"""`remora-agent serve --use-cases`: what remora-build converted, served as it is."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import pytest
import yaml

from remora_agent.client import Client, UseCase
from remora_agent.serving.standalone import local_assignment
from remora_build.use_cases.convert import convert_use_cases
from remora_build.use_cases.source import Places
from remora_contract.errors import ArtifactInvalid, DocumentInvalid, RequestInvalid
from remora_contract.release import ReleaseUseCase, WeightedName
from tests.agent.serving.test_serve_command import OPTIONS, serve
from tests.support.real_bundles import RealBundles

QAIRT = [
    {"name": "base", "adapter_names": []},
    {"name": "a+b", "adapter_names": ["a", "b"], "adapter_alphas": [0.5, -1.0]},
]


@pytest.fixture
def converted(real_bundles: RealBundles, tmp_path: Path) -> Path:
    adapters = [{"name": n, "directory": str(real_bundles.adapter_dir(n))} for n in "ab"]
    file = tmp_path / "lora_config.yaml"
    file.write_text(yaml.safe_dump({"adapter": adapters, "use-case": QAIRT}))
    convert_use_cases(file, tmp_path / "made", base=real_bundles.plain, places=Places())
    return tmp_path / "made"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_converted_document_is_served_weighed_anew_and_counted(real_bundles, converted):
    port = free_port()
    more = ("--use-cases", converted, "--metrics-listen", f"127.0.0.1:{port}")
    with (
        serve(real_bundles, *more, "--use-case=just-b=b") as (_, address),
        Client(address, timeout_s=30) as client,
    ):
        assert client.use_cases() == (
            UseCase("a+b", {"a": 0.5, "b": -1.0}),
            UseCase("base", {}),
            UseCase("just-b", {"b": 1.0}),
        )
        named = client.generate("hello", use_case="a+b", **OPTIONS)
        mixed = client.generate("hello", adapter={"a": 0.5, "b": -1.0}, **OPTIONS)
        assert named.token_ids == mixed.token_ids
        again = client.generate("hello", use_case="a+b", weights={"a": 0.0, "b": 1.0}, **OPTIONS)
        just_b = client.generate("hello", use_case="just-b", **OPTIONS)
        assert again.token_ids == just_b.token_ids != named.token_ids
        base = client.generate("hello", use_case="base", **OPTIONS)
        assert base.token_ids == client.generate("hello", **OPTIONS).token_ids
        counted = {c.use_case: c.requests for c in client.use_case_counts()}
        assert counted == {"a+b": 2, "just-b": 1, "base": 1}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        assert 'remora_use_case_requests_total{use_case="a+b"} 2.0' in text
        assert 'remora_use_case_tokens_total{use_case="base"} 24.0' in text
        assert "remora_compositions_total 3.0" in text


def assignment(bundles: RealBundles, document: Path, *use_cases: ReleaseUseCase, **adapters: Path):
    return local_assignment(bundles.plain, adapters, use_cases, document)


def test_options_and_document_stand_side_by_side_and_never_hide_each_other(real_bundles, converted):
    more = ReleaseUseCase("c+b", (WeightedName("c"), WeightedName("b")))
    both = assignment(real_bundles, converted, more, c=real_bundles.adapter_dir("a", "r2"))
    assert [a.name for a in both.adapters] == ["c", "a", "b"]
    assert [u.name for u in both.use_cases] == ["c+b", "base", "a+b"]
    with pytest.raises(RequestInvalid, match="adapter a is given by --adapter and by"):
        assignment(real_bundles, converted, a=real_bundles.adapter_dir("a"))
    with pytest.raises(RequestInvalid, match=r"use case a\+b is listed twice"):
        assignment(real_bundles, converted, ReleaseUseCase("a+b", (WeightedName("a"),)))


def test_a_document_that_is_not_what_was_converted_is_refused(real_bundles, converted, tmp_path):
    with pytest.raises(ArtifactInvalid, match="does not exist"):
        assignment(real_bundles, tmp_path)
    with pytest.raises(DocumentInvalid, match="remora-build use-cases convert"):
        assignment(real_bundles, tmp_path / "lora_config.yaml")
    file = converted / "use_cases.json"
    document = json.loads(file.read_text())
    for entry, other in zip(document["adapters"], "ba", strict=True):
        entry["directory"] = f"adapters/{other}"
    file.write_text(json.dumps(document))
    with pytest.raises(ArtifactInvalid, match="convert the use cases again"):
        assignment(real_bundles, converted)
