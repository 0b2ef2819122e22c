"""What the surface says about itself, and loading adapters over it."""

from __future__ import annotations

import shutil
from importlib import metadata

import openai
import pytest

from remora_agent.client import Client
from remora_agent.serving.openai.lora import inside
from remora_contract.errors import RequestInvalid


def test_base_adapters_and_use_cases_are_listed_and_found_again(http):
    listed = http.client.models.list().data
    assert [m.id for m in listed] == ["base", "a", "b", "both"]
    for model in listed:
        found = http.client.models.retrieve(model.id)
        assert found == model
        assert found.owned_by == "remora" and found.max_model_len == 512
    assert listed[0].parent is None and listed[1].parent == "base"
    assert listed[1].adapter["digest"] == http.digests["a"]
    assert listed[3].use_case == {"a": 0.5, "b": 0.25}
    assert http.client.models.retrieve("base:a").adapter["name"] == "a"


def test_health_and_version_are_told(http):
    assert http.raw.get("/health").json() == {"status": "serving"}
    assert http.raw.get("/version").json() == {"version": metadata.version("remora")}


def load(http, name: str, path: str, **more):
    return http.raw.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | more
    )


def unload(http, name: str):
    return http.raw.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_an_adapter_is_loaded_used_and_unloaded(own_http):
    http = own_http
    shutil.copytree(http.world.adapter("c").directory, http.adapters / "c")
    assert load(http, "c", "c").text == "Success: LoRA adapter 'c' added successfully."
    ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    with_c = http.client.chat.completions.create(model="c", **ask)
    assert (
        with_c.system_fingerprint
        != http.client.chat.completions.create(model="base", **ask).system_fingerprint
    )
    with Client(http.grpc) as client:
        (info,) = [a for a in client.adapters().adapters if a.name == "c"]
    assert (info.tier, info.digest) == ("bank", http.world.adapter("c").digest)
    assert load(http, "c", "c").status_code == 400
    assert load(http, "c", str(http.adapters / "c"), load_inplace=True).status_code == 200
    assert unload(http, "c").status_code == 200
    with pytest.raises(openai.NotFoundError):
        http.client.chat.completions.create(model="c", **ask)
    assert unload(http, "c").status_code == 404


def test_a_new_version_of_an_adapter_takes_its_name_over(own_http):
    http = own_http
    for revision in ("r1", "r2"):
        shutil.copytree(http.world.adapter("c", revision).directory, http.adapters / revision)
    assert load(http, "c", "r1").status_code == 200
    assert load(http, "c", "r2", load_inplace=True).status_code == 200
    digest = http.client.models.retrieve("c").adapter["digest"]
    assert digest == http.world.adapter("c", "r2").digest
    assert unload(http, "c").status_code == 200
    assert "c" not in [m.id for m in http.client.models.list()]


@pytest.mark.parametrize(
    "path", ["..", "../a/a-r1", "/etc", "/etc/passwd", "nothing", "link", "x\0y", "", "a" * 2000]
)
def test_a_path_never_leaves_the_adapter_directory(own_http, path):
    http = own_http
    (http.adapters / "link").symlink_to(http.world.adapter("c").directory)
    reply = load(http, "c", path)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "lora_path"
    assert str(http.adapters) not in reply.text


def test_what_is_outside_is_told_as_what_does_not_exist(tmp_path):
    (tmp_path / "in").mkdir()
    messages = set()
    for path in ("../in2", ".."):
        with pytest.raises(RequestInvalid) as caught:
            inside(tmp_path / "in", path)
        messages.add(str(caught.value).replace(path, "PATH"))
    assert len(messages) == 1


def test_a_directory_that_holds_no_adapter_is_refused(own_http):
    (own_http.adapters / "empty").mkdir()
    reply = load(own_http, "c", "empty")
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "lora_path" and "remora-build adapter" in error["message"]
    assert "c" not in [m.id for m in own_http.client.models.list()]


@pytest.mark.parametrize("name", ["base", "both"])
def test_an_adapter_takes_no_name_that_means_something_else(own_http, name):
    http = own_http
    shutil.copytree(http.world.adapter("c").directory, http.adapters / "c")
    for again in (False, True):
        reply = load(http, name, "c", load_inplace=again)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "lora_name"
        assert f"{name} is the name of" in reply.json()["error"]["message"]
    assert http.client.models.retrieve(name).id == name  # still means one thing


def test_names_that_are_none_are_refused(http):
    for name in ("", "../x", "a b", "x" * 200):
        assert load(http, name, "x").status_code == 400
        assert unload(http, name).status_code == 400


def test_an_adapter_that_a_use_case_needs_stays(own_http):
    assert unload(own_http, "a").status_code == 409
    assert "a" in [m.id for m in own_http.client.models.list()]


def test_an_adapter_that_does_not_load_leaves_no_name_behind(own_http):
    http = own_http
    shutil.copytree(http.world.adapter("c").directory, http.adapters / "c")
    (weights,) = (http.adapters / "c").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    assert load(http, "c", "c").status_code >= 400
    assert "c" not in [m.id for m in http.client.models.list()]
    shutil.copytree(http.world.adapter("c").directory, http.adapters / "good")
    assert load(http, "c", "good").status_code == 200
