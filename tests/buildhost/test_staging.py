"""A directory appears whole or not at all, and nothing of anybody else's is ever deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remora_build.staging import staged_directory
from remora_contract.errors import Conflict

MARKER = "thing.json"


def write(out: Path, text: str, *, replace: bool = False) -> None:
    with staged_directory(out, marker=MARKER, replace=replace) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "data").write_text(text)
        (staging / MARKER).write_text(json.dumps({"files": [{"path": "part/data"}]}))


def left(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def test_a_replaced_directory_is_the_new_one_and_leaves_no_trace(tmp_path):
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "part" / "data").read_text() == "new"
    assert left(tmp_path) == {"out"}


@pytest.mark.parametrize("replace", [False, True])
def test_the_slower_of_two_writers_never_replaces_what_it_did_not_see(tmp_path, replace):
    out = tmp_path / "out"
    with (
        pytest.raises(Conflict),
        staged_directory(out, marker=MARKER, replace=replace) as staging,
    ):
        (staging / MARKER).write_text("{}")
        write(out, "faster")
        (out / "own").write_text("made meanwhile")
    assert (out / "part" / "data").read_text() == "faster"
    assert left(tmp_path) == {"out"}


@pytest.mark.parametrize("stranger", ["notes.txt", "part/other", "deep/er/file"])
def test_force_keeps_what_the_document_does_not_list(tmp_path, stranger):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / stranger).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / stranger).write_text("precious")
    with pytest.raises(Conflict, match=stranger):
        write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / stranger).read_text() == "precious"


@pytest.mark.parametrize("document", ["", "[]", '{"files": 3}', '{"files": [{}]}', "[" * 100_000])
def test_force_replaces_nothing_whose_document_lists_no_files(tmp_path, document):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / MARKER).write_text(document)
    with pytest.raises(Conflict, match=MARKER):
        write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "part" / "data").read_text() == "old"


@pytest.mark.parametrize("replace", [False, True])
def test_a_symbolic_link_is_not_written_through_nor_replaced(tmp_path, replace):
    write(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(Conflict, match="symbolic link"):
        write(tmp_path / "out", "new", replace=replace)
    assert left(tmp_path) == {"real", "out"}
    assert (tmp_path / "real" / "part" / "data").read_text() == "old"


def test_an_interruption_between_the_two_renames_brings_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if ".new-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "part" / "data").read_text() == "old"
    assert left(tmp_path) == {"out"}
