"""Adapter paths of a batch file, and how its answers are written."""

from __future__ import annotations

import json

import pytest

from remora_agent.batch.report import write_atomically
from remora_agent.batch.weights import adapter_directory
from remora_contract.errors import AdapterInvalid, Refused


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    return path


def test_a_sidecar_is_found_by_its_folder_or_a_file_in_it(folder, tmp_path):
    for name in ("adapter.json", "adapter.safetensors"):
        (folder / name).touch()
    for path in (folder, folder / "adapter.safetensors"):
        assert adapter_directory("a", path, tmp_path) == folder


def test_other_forms_are_refused_with_the_command_that_converts_them(folder, tmp_path):
    bundle = tmp_path / "bundle"
    with pytest.raises(AdapterInvalid, match="does not exist"):
        adapter_directory("a", folder / "absent", bundle)
    with pytest.raises(AdapterInvalid, match="holds no adapter"):
        adapter_directory("a", folder, bundle)
    processed = folder / "processed_adapter_model.safetensors"
    processed.touch()
    for path in (folder, processed):
        with pytest.raises(AdapterInvalid, match="remora-build adapter PEFT_DIR OUT --base"):
            adapter_directory("a", path, bundle)
    (folder / "adapter_config.json").touch()
    with pytest.raises(AdapterInvalid, match=f"remora-build adapter {folder} OUT --base {bundle}"):
        adapter_directory("a", folder, bundle)


def test_the_answers_replace_the_file_whole_and_leave_nothing_beside_it(tmp_path):
    path = tmp_path / "output.json"
    path.write_text("old")
    write_atomically(path, {"text": "ä"})
    assert json.loads(path.read_text()) == {"text": "ä"}
    assert [p.name for p in tmp_path.iterdir()] == ["output.json"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(Refused, match="absent"):
        write_atomically(tmp_path / "absent" / "o.json", {})
