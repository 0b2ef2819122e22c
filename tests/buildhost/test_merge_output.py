"""What the command leaves on disk: a whole checkpoint or nothing, and the source as it was."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from remora_build.cli import build_app
from remora_build.merge import merger
from remora_build.merge.adapter import Weighted
from remora_build.merge.merger import merge_adapters
from remora_build.merge.shard_file import ShardFile
from remora_contract.errors import (
    AdapterInvalid,
    CheckpointInvalid,
    Conflict,
    Exhausted,
    RequestInvalid,
)
from tests.buildhost.documents import plain_config, write_peft
from tests.buildhost.merging import adapter, load, logits, merge, stored, with_adapter
from tests.support.checkpoints import make_checkpoint

LEFT_BEHIND = ("pytorch_model.bin", "model.onnx", ".gitattributes", "tf_model.h5.index.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded checkpoint with a tokenizer, and an adapter of its last layer."""
    root = tmp_path_factory.mktemp("made")
    base = make_checkpoint(root / "base", "llama", shards=3)
    (base / "LICENSE.txt").write_text("do as you like")
    (base / "modeling_own.py").write_text("# code of the model")
    for stray in LEFT_BEHIND:
        (base / stray).write_text("left behind")
    return base, adapter(base, root / "peft", layers_to_transform=1)


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, free to be changed."""
    for source in made:
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path / "base", tmp_path / "peft"


def digests(directory: Path) -> dict[str, str]:
    files = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {
        p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
    }


def test_the_output_is_a_whole_checkpoint(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = made
    before = digests(base)

    merged = merge(base, tmp_path / "out", trained)

    out = digests(tmp_path / "out")
    assert digests(base) == before
    assert set(out) == set(before) - set(LEFT_BEHIND) | {"remora_merge.json"}
    documents = {n for n in out if not n.endswith(".safetensors") and n in before}
    assert {"config.json", "tokenizer.json", "LICENSE.txt", "modeling_own.py"} <= documents
    assert [n for n in documents if out[n] != before[n]] == []
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a shark")["input_ids"]
    assert tokens == transformers.AutoTokenizer.from_pretrained(base)("a shark")["input_ids"]
    difference = logits(load(tmp_path / "out")) - logits(with_adapter(base, trained))
    assert difference.abs().max() < 1e-4
    assert (merged.changed, merged.tensors) == (3, len(stored(base)))


def test_a_shard_without_a_change_keeps_its_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = made
    merge(base, tmp_path / "out", trained)
    shards = {n: d for n, d in digests(base).items() if n.endswith(".safetensors")}
    out = digests(tmp_path / "out")
    kept = {n for n, d in shards.items() if out[n] == d}
    assert kept and kept != set(shards)
    before, after = stored(base), stored(tmp_path / "out")
    changed = {n for n in before if (before[n] != after[n]).any()}
    assert changed == {
        f"model.layers.1.{m}.weight"
        for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }


def test_equal_input_gives_equal_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = made
    for name in ("one", "two"):
        merge(base, tmp_path / name, trained)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_record_says_what_was_merged(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = made
    merge(base, tmp_path / "out", trained, trained, weights=[2, -0.5])
    record = json.loads((tmp_path / "out" / "remora_merge.json").read_text())
    digest = "sha256:" + digests(trained)["adapter_model.safetensors"]
    assert record["adapters"] == [
        {"name": "peft", "digest": digest, "weight": 2},
        {"name": "peft", "digest": digest, "weight": -0.5},
    ]
    files = {f["path"]: f["bytes"] for f in record["files"]}
    on_disk = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert files == {n: size for n, size in on_disk.items() if n != "remora_merge.json"}


def test_metadata_and_order_of_a_file_are_kept(copied: tuple[Path, Path], tmp_path: Path) -> None:
    base, trained = copied
    path = next(
        p for p in base.glob("*.safetensors") if "model.layers.1" in str(load_file(p).keys())
    )
    save_file(load_file(path), path, metadata={"format": "pt", "note": "of its maker"})

    merge(base, tmp_path / "out", trained)

    def header(file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    assert header(tmp_path / "out" / path.name) == header(path)


def test_links_of_a_hugging_face_cache_are_followed(
    copied: tuple[Path, Path], tmp_path: Path
) -> None:
    base, trained = copied
    snapshot = tmp_path / "models--Org--Tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    merge(snapshot, tmp_path / "out", trained)
    merge(base, tmp_path / "direct", trained)
    assert digests(tmp_path / "out") == digests(tmp_path / "direct")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "LICENSE"])
def test_a_link_to_nothing_is_no_file_that_is_left_out(
    name: str, copied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    monkeypatch.setattr(merger, "_write_weights", lambda *args: begun.append(args))
    base, trained = copied
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to("../blobs/deleted")
    with pytest.raises(CheckpointInvalid, match=rf"{name} is a link to nothing"):
        merge(base, tmp_path / "out", trained)
    assert not (tmp_path / "out").exists() and not begun


def test_an_existing_output_is_replaced_only_when_asked_and_only_a_merge(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    base, trained = made
    adapters, out = [Weighted(trained)], tmp_path / "out"
    merge_adapters(base, adapters, out)
    before = digests(out)
    with pytest.raises(Conflict, match="--force"):
        merge_adapters(base, adapters, out)
    merge_adapters(base, [Weighted(trained, 2)], out, replace=True)
    assert digests(out) != before
    (out / "notes.txt").write_text("precious")
    with pytest.raises(Conflict, match=r"notes\.txt"):
        merge_adapters(base, adapters, out, replace=True)
    (out / "notes.txt").unlink()
    (out / "remora_merge.json").unlink()
    with pytest.raises(Conflict, match=r"remora_merge\.json"):
        merge_adapters(base, adapters, out, replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_in_the_middle_leaves_the_old_output(
    copied: tuple[Path, Path], tmp_path: Path
) -> None:
    base, trained = copied
    merge_adapters(base, [Weighted(trained)], tmp_path / "out")
    before = digests(tmp_path / "out")
    tensors = load_file(trained / "adapter_model.safetensors")
    list(tensors.values())[-1][0, 0] = np.inf
    save_file(tensors, trained / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid):
        merge_adapters(base, [Weighted(trained)], tmp_path / "out", replace=True)
    assert digests(tmp_path / "out") == before
    assert {p.name for p in tmp_path.iterdir()} == {"base", "peft", "out"}


def test_a_full_disk_is_said_and_leaves_nothing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: ShardFile, block: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardFile, "append", full)
    with pytest.raises(Exhausted, match="no space left"):
        merge(made[0], tmp_path / "out", made[1])
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_the_work(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        merger.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 8, 1)
    )
    with pytest.raises(Exhausted, match=r"GB free: make room"):
        merge(made[0], tmp_path / "out", made[1])


@pytest.mark.parametrize("place", ["base", "base/out", "peft", "."])
def test_an_output_within_its_sources_is_refused(
    place: str, copied: tuple[Path, Path], tmp_path: Path
) -> None:
    base, trained = copied
    before = digests(tmp_path)
    with pytest.raises(RequestInvalid, match="within each other"):
        merge_adapters(base, [Weighted(trained)], tmp_path / place, replace=True)
    assert digests(tmp_path) == before


def test_an_output_below_an_adapter_is_fine(copied: tuple[Path, Path]) -> None:
    base, trained = copied
    merge(base, trained / "merged", trained)
    assert (trained / "merged" / "config.json").exists()


def test_a_shard_that_shrinks_meanwhile_is_the_checkpoints_fault(
    copied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, trained = copied
    check = merger._check_room

    def shrink(out: Path, needed: int) -> None:
        for path in base.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-4])
        check(out, needed)

    monkeypatch.setattr(merger, "_check_room", shrink)
    with pytest.raises(CheckpointInvalid, match="ended while"):
        merge(base, tmp_path / "out", trained)
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """A weight of 64 MB, adapted, a head of 64 MB, replaced, and 64 MB untouched."""
    rows, columns = 32_768, 1024
    big = np.zeros((rows, columns), ml_dtypes.bfloat16)
    names = ["model.layers.0.mlp.up_proj", "lm_head", "model.embed_tokens"]
    (tmp_path / "base").mkdir()
    save_file({f"{n}.weight": big for n in names}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    stem = f"base_model.model.{names[0]}"
    tensors = {
        f"{stem}.lora_A.weight": np.ones((2, columns), np.float32),
        f"{stem}.lora_B.weight": np.ones((rows, 2), np.float32),
        "base_model.model.lm_head.weight": big,
    }
    config = plain_config(target_modules=["up_proj"], modules_to_save=["lm_head"])
    trained = write_peft(tmp_path / "peft", config, tensors)
    del big, tensors

    tracemalloc.start()
    merge(tmp_path / "base", tmp_path / "out", trained)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 40 << 20


TERMINATED = """
import os, signal, sys
from remora_build import cli
from remora_build.merge import merger

def copy_documents(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)

merger.copy_documents = copy_documents
sys.argv = ["remora-build", "merge", *sys.argv[1:]]
cli.main()
"""


def test_a_terminated_merge_leaves_nothing_behind(made: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", TERMINATED, *map(str, made), str(tmp_path / "out")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def command(made: tuple[Path, Path]) -> Callable[..., Any]:
    base, trained = map(str, made)

    def run(*arguments: str) -> Any:
        places = [a.format(base=base, peft=trained) for a in arguments]
        return CliRunner().invoke(build_app(), ["merge", *places])

    return run


def test_the_command_reports_as_json_and_for_people(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    places = ["{base}", "{peft}", "{peft}"]
    done = command(*places, str(tmp_path / "a"), "--weights", "0.5,-0.25", "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert [a["weight"] for a in summary["adapters"]] == [0.5, -0.25]
    assert (summary["changed"], summary["untied"]) == (3, False)
    done = command(*places, str(tmp_path / "b"), "--weights", "0.5", "--weights", "-0.25")
    assert "0.5 · peft + -0.25 · peft, 3 of 21 tensors changed" in done.stdout
    for name in ("a", "b"):
        (tmp_path / name / "remora_merge.json").unlink()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_head_of_its_own_is_reported(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", tied=True)
    trained = adapter(base, tmp_path / "peft", modules_to_save=["lm_head"])
    done = CliRunner().invoke(build_app(), ["merge", *map(str, (base, trained, tmp_path / "out"))])
    assert "tie_word_embeddings: false" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["{base}"],
        ["{base}", "{peft}"],
        ["{base}", "{peft}", "out", "--weights", "1,2"],
        ["{base}", "{peft}", "out", "--weights", "much"],
        ["{base}", "{peft}", "out", "--weights", ""],
        ["{base}", "{peft}", "out", "--combination", "svd"],
    ],
)
def test_wrong_usage_exits_with_two(
    arguments: list[str],
    command: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*arguments).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_one_line_on_stderr_and_exit_one(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    code = "from remora_build.cli import main; main()"
    places = [made[0], made[0], tmp_path / "out"]
    arguments = [sys.executable, "-c", code, "merge", *map(str, places)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "adapter_config.json" in done.stderr
