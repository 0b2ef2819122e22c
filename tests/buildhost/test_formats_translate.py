"""From every format to every other, as a user does it: detected, bound to the base, exact, or
refused with the thing and the next step named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from remora_build.adapters.convert import convert_adapter
from remora_build.adapters.formats.manifest import MANIFEST, load_manifest
from remora_build.adapters.formats.registry import SIGNS, TARGET_FORMATS, TargetFormat, detect
from remora_build.adapters.formats.translate import Options, translate
from remora_build.adapters.matching import module_path
from remora_build.cli import build_app
from remora_contract.adapter import WEIGHTS_FILE, load_adapter
from remora_contract.digests import digest_bytes
from remora_contract.errors import (
    AdapterInvalid,
    Conflict,
    DocumentInvalid,
    Exhausted,
    Refused,
    RemoraError,
    UsageWrong,
)
from tests.buildhost.adapter_formats import FOREIGN, rewritten, save_pair
from tests.buildhost.documents import (
    decoder_spec,
    peft_tensors,
    plain_config,
    write_bundle,
    write_peft,
)
from tests.support.adapters import make_peft_adapter, peft_quiet

DECODER = decoder_spec()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "base", DECODER)
    return tmp_path / "base"


@pytest.fixture
def peft_dir(tmp_path: Path) -> Path:
    """Exact in float16, so that no format rounds it."""
    tensors = {n: np.round(t * 8) / 8 for n, t in peft_tensors(DECODER).items()}
    return write_peft(tmp_path / "peft", plain_config(), tensors)


@pytest.fixture
def sidecar(base: Path, peft_dir: Path, tmp_path: Path) -> Path:
    convert_adapter(peft_dir, tmp_path / "sidecar", base=base)
    return tmp_path / "sidecar"


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("way", ["edgellm", "trtllm", "trtllm-2"])
@pytest.mark.parametrize("start", ["peft", "sidecar"])
def test_a_foreign_format_and_back_is_the_same_adapter_by_its_digest(
    base: Path, peft_dir: Path, sidecar: Path, tmp_path: Path, way: str, start: str
) -> None:
    """The scaling and PEFT's config come back too, although neither format has a place for them."""
    out, back = tmp_path / "out", tmp_path / "back"
    options = Options(
        target="edgellm" if way == "edgellm" else "trtllm", tp_size=2 if way == "trtllm-2" else 1
    )
    translate(peft_dir if start == "peft" else sidecar, out, base=base, options=options)
    translate(out, back, base=base, options=Options())
    assert files(back) == files(sidecar)


def test_from_one_foreign_format_to_the_other(base: Path, peft_dir: Path, tmp_path: Path) -> None:
    first, second, direct = tmp_path / "first", tmp_path / "second", tmp_path / "direct"
    for source, out, target in (
        (peft_dir, first, "trtllm"),
        (first, second, "edgellm"),
        (peft_dir, direct, "edgellm"),
    ):
        translate(source, out, base=base, options=Options(target=target))  # type: ignore[arg-type]
    assert files(second) == files(direct)


def test_a_sidecar_can_be_written_again_in_another_type(
    base: Path, sidecar: Path, tmp_path: Path
) -> None:
    translate(sidecar, tmp_path / "half", base=base, options=Options(dtype="float16"))
    assert load_adapter(tmp_path / "half").dtype == "float16"
    for name, tensor in load_file(sidecar / WEIGHTS_FILE).items():
        assert np.array_equal(load_file(tmp_path / "half" / WEIGHTS_FILE)[name], tensor)


@pytest.mark.parametrize("target", FOREIGN)
def test_equal_input_gives_equal_bytes(
    base: Path, peft_dir: Path, tmp_path: Path, target: TargetFormat
) -> None:
    for out in ("one", "two"):
        translate(peft_dir, tmp_path / out, base=base, options=Options(target=target))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_every_way_adds_to_a_projection_what_peft_adds(tmp_path: Path) -> None:
    """A real rsLoRA adapter with rank and alpha patterns, in float32 all the way."""
    from tests.support.checkpoints import make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen3", hidden=32, head_dim=8)
    decoder = decoder_spec(checkpoint)
    write_bundle(tmp_path / "base", decoder)
    peft_dir = make_peft_adapter(
        checkpoint,
        tmp_path / "peft",
        seed=1,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        alpha_pattern={"o_proj": 5},
    )
    options = Options(target="trtllm", dtype="float32", tp_size=2)
    translate(peft_dir, tmp_path / "trtllm", base=tmp_path / "base", options=options)
    translate(tmp_path / "trtllm", tmp_path / "back", base=tmp_path / "base", options=Options())

    stored = load_file(tmp_path / "back" / WEIGHTS_FILE)
    reference = peft_deltas(checkpoint, peft_dir)
    targets = [t.target for t in load_adapter(tmp_path / "back").targets]
    assert {module_path(t) for t in targets} == set(reference)
    for target in targets:
        delta = (stored[target.tensor_a()] @ stored[target.tensor_b()]).T
        assert np.allclose(delta, reference[module_path(target)], atol=1e-6), target


def peft_deltas(checkpoint: Path, peft_dir: Path) -> dict[str, np.ndarray]:
    """module path -> what PEFT adds to its weight [n, k]."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with peft_quiet():
        model = peft.PeftModel.from_pretrained(model, peft_dir)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("found", SIGNS)
def test_a_format_shows_by_its_files(tmp_path: Path, found: Any) -> None:
    for name in SIGNS[found]:
        (tmp_path / name).touch()
        assert detect(tmp_path) == found
        (tmp_path / name).unlink()


def test_a_directory_of_no_format_or_of_two_is_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"known format \(peft: adapter_config\.json"):
        detect(tmp_path)
    (tmp_path / "adapter.json").touch()
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UsageWrong, match="looks like peft and remora: say which with --from peft"):
        detect(tmp_path)


def test_from_says_which_format_is_meant(base: Path, peft_dir: Path, tmp_path: Path) -> None:
    (peft_dir / "adapter.json").write_text("left over")
    translate(peft_dir, tmp_path / "out", base=base, options=Options(source="peft"))
    assert load_adapter(tmp_path / "out").rank == 2
    with pytest.raises(DocumentInvalid, match=r"adapter\.json"):
        translate(peft_dir, tmp_path / "two", base=base, options=Options(source="remora"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (Options(target="edgellm", dtype="float32"), "edgellm stores float16, not float32"),
        (Options(dtype="bfloat16"), "remora stores float16 or float32, not bfloat16"),
        (Options(tp_size=2), "--tp-size belongs to --format trtllm, not to remora"),
        (Options(target="edgellm", tp_size=2), "not to edgellm"),
        (Options(target="trtllm", tp_size=1025), "--tp-size must be 1 to 1024"),
        (Options(target="trtllm", gate_up="up-gate"), "how to read trtllm, not peft"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    base: Path, peft_dir: Path, tmp_path: Path, options: Options, what: str
) -> None:
    with pytest.raises(UsageWrong, match=what):
        translate(peft_dir, tmp_path / "out", base=base, options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["remora", *FOREIGN])
def test_an_adapter_of_another_base_is_refused(
    base: Path, sidecar: Path, tmp_path: Path, source: TargetFormat
) -> None:
    made = sidecar
    if source != "remora":
        made = tmp_path / source
        translate(sidecar, made, base=base, options=Options(target=source))
    document = json.loads((base / "bundle.json").read_text())
    other = json.dumps(document | {"base_digest": digest_bytes(b"another base")})
    (base / "bundle.json").write_text(other)
    with pytest.raises(Refused, match=r"was made for base .*--base"):
        translate(made, tmp_path / "out", base=base, options=Options())


@pytest.mark.parametrize("target", FOREIGN)
def test_the_bank_limits_what_becomes_a_sidecar_and_nothing_else(
    tmp_path: Path, peft_dir: Path, target: TargetFormat
) -> None:
    write_bundle(tmp_path / "narrow", DECODER, max_bank_rank=1)
    out = tmp_path / "out"
    translate(peft_dir, out, base=tmp_path / "narrow", options=Options(target=target))
    with pytest.raises(Refused, match=r"rank 2, the bundle's bank holds 1"):
        translate(out, tmp_path / "back", base=tmp_path / "narrow", options=Options())


@pytest.mark.parametrize("target", TARGET_FORMATS)
def test_an_existing_output_is_kept_unless_forced(
    base: Path, peft_dir: Path, tmp_path: Path, target: TargetFormat
) -> None:
    out = tmp_path / "out"
    translate(peft_dir, out, base=base, options=Options(target=target))
    before = files(out)
    rewritten(peft_dir / "adapter_config.json", lora_alpha=8)
    with pytest.raises(Conflict, match="--force"):
        translate(peft_dir, out, base=base, options=Options(target=target))
    assert files(out) == before
    translate(peft_dir, out, base=base, options=Options(target=target, replace=True))
    assert files(out) != before


def test_force_replaces_neither_another_format_nor_a_strangers_file(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    translate(peft_dir, out, base=base, options=Options(target="trtllm"))
    with pytest.raises(Conflict, match=r"no adapter\.json"):
        translate(peft_dir, out, base=base, options=Options(replace=True))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(Conflict, match=r"notes\.txt is not listed"):
        translate(peft_dir, out, base=base, options=Options(target="trtllm", replace=True))
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("target", FOREIGN)
def test_a_full_disk_leaves_nothing_behind(
    base: Path,
    peft_dir: Path,
    tmp_path: Path,
    target: TargetFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Exhausted, match="free some"):
        translate(peft_dir, tmp_path / "out", base=base, options=Options(target=target))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "peft"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


@pytest.mark.parametrize("target", FOREIGN)
def test_the_command_reports_what_it_wrote(
    base: Path, peft_dir: Path, tmp_path: Path, target: TargetFormat
) -> None:
    out = tmp_path / "out"
    told = run("adapter", peft_dir, out, "--base", base, "--format", target, "--json")
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert (report["kind"], report["format"], report["rank"]) == ("foreign_adapter", target, 2)
    assert {f["path"] for f in report["document"]["files"]} == set(files(out)) - {MANIFEST}

    again = run("inspect", out, "--verify")
    assert again.exit_code == 0
    assert "files match their digests" in again.stdout
    assert report["document"]["exporter"] == load_manifest(out).exporter


def test_the_command_splits_and_reads_back(base: Path, peft_dir: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    given = ("--format", "trtllm", "--tp-size", 2, "--dtype", "bfloat16")
    assert run("adapter", peft_dir, out, "--base", base, *given).exit_code == 0
    assert len(files(out)) == 5
    assert run("adapter", out, back, "--base", base, "--from", "trtllm").exit_code == 0
    assert load_adapter(back).rank == 2


def test_the_order_of_a_fused_gate_and_up_can_be_given(base: Path, tmp_path: Path) -> None:
    source = save_pair(tmp_path / "fused", np.ones((1, 32 + 96), np.float32), [[18, 0, 1]])
    refused = run("adapter", source, tmp_path / "out", "--base", base)
    assert refused.exit_code == 1
    assert isinstance(refused.exception, RemoraError)
    told = ("--gate-up-order", "gate-up")
    assert run("adapter", source, tmp_path / "out", "--base", base, *told).exit_code == 0


# What a plain conversion does without: together they would take longer than all of its work.
UNUSED = {
    *("onnx", "onnx_ir", "onnxruntime", "torch", "ml_dtypes"),
    *("rich", "pydantic", "yaml", "grpc", "google.protobuf"),
    *("importlib.metadata", "email", "zipfile", "pickletools", "asyncio", "ssl"),
    *("remora_contract.release", "remora_build.export.command", "remora_build.graph.layout"),
}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_plain_conversion_imports_what_it_runs(
    base: Path, peft_dir: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    script = (
        "import sys; from remora_build.cli import main\n"
        "try: main()\n"
        f"finally: print(*sorted({UNUSED} & set(sys.modules)))"
    )
    given = ["adapter", peft_dir, tmp_path / "out", "--base", base, *options]
    told = subprocess.run(
        [sys.executable, "-c", script, *given], capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines()[-1] == ""
    assert "sha256:" in told.stdout
