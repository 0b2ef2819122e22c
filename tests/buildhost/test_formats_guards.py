"""What lies beside the factors, or is not what its document says, is refused by name: nothing that
a format cannot carry is dropped."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from remora_build.adapters.convert import convert_adapter
from remora_build.adapters.formats.carried import Carried, refuse_more
from remora_build.adapters.formats.manifest import MANIFEST
from remora_build.adapters.formats.registry import TargetFormat
from remora_build.adapters.formats.translate import Options, translate
from remora_build.adapters.sidecar import Factor
from remora_contract.adapter import ADAPTER_JSON, WEIGHTS_FILE, Adapter, load_adapter
from remora_contract.digests import canonical_json, digest_file
from remora_contract.errors import (
    AdapterInvalid,
    ArtifactInvalid,
    DocumentInvalid,
    Incompatible,
    Unsupported,
)
from remora_contract.targets import AdapterTarget
from tests.buildhost.adapter_formats import FOREIGN, random_factors, rewritten, save_pair
from tests.buildhost.documents import (
    decoder_spec,
    peft_tensors,
    plain_config,
    write_bundle,
    write_peft,
)

DECODER = decoder_spec()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "base", DECODER)
    return tmp_path / "base"


@pytest.fixture
def peft_dir(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "peft", plain_config(), peft_tensors(DECODER))


@pytest.fixture
def sidecar(base: Path, peft_dir: Path, tmp_path: Path) -> Path:
    convert_adapter(peft_dir, tmp_path / "sidecar", base=base)
    return tmp_path / "sidecar"


@pytest.mark.parametrize("target", FOREIGN)
def test_files_changed_after_they_were_written_are_recognised(
    base: Path, peft_dir: Path, tmp_path: Path, target: TargetFormat
) -> None:
    out = tmp_path / "out"
    translate(peft_dir, out, base=base, options=Options(target=target))
    weights = max(out.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactInvalid, match=rf"{weights.name} is damaged"):
        translate(out, tmp_path / "back", base=base, options=Options())


def test_a_manifest_that_does_not_belong_to_the_files_is_an_error(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    translate(peft_dir, out, base=base, options=Options(target="trtllm"))
    targets = json.loads((out / MANIFEST).read_text())["targets"]
    for changes, what in (
        ({"format": "edgellm"}, "belongs to edgellm, the files beside it to trtllm"),
        ({"format": "trtllm", "targets": targets[1:]}, "lists other targets"),
        ({"targets": [{**targets[0], "rank": 3}, *targets[1:]]}, "lists other targets"),
    ):
        rewritten(out / MANIFEST, **changes)
        with pytest.raises(AdapterInvalid, match=what):
            translate(out, back, base=base, options=Options())
    rewritten(out / MANIFEST, targets=targets, surprise=1)
    with pytest.raises(DocumentInvalid, match="unknown key 'surprise'"):
        translate(out, back, base=base, options=Options())


def test_a_damaged_sidecar_is_recognised(base: Path, sidecar: Path, tmp_path: Path) -> None:
    data = bytearray((sidecar / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (sidecar / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(ArtifactInvalid, match=r"adapter\.safetensors is damaged"):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target="edgellm"))


def with_tensors(sidecar: Path, change: Any) -> None:
    """Rewrites the sidecar's weights after `change` was applied to them, its document with them."""
    path = sidecar / WEIGHTS_FILE
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)
    document = json.loads((sidecar / ADAPTER_JSON).read_text())
    entry = {"path": WEIGHTS_FILE, "size": path.stat().st_size, "digest": digest_file(path)}
    (sidecar / ADAPTER_JSON).write_bytes(canonical_json(document | {"files": [entry]}))


@pytest.mark.parametrize("target", FOREIGN)
def test_a_tensor_a_sidecar_holds_beside_its_factors_is_refused_by_name(
    base: Path, sidecar: Path, tmp_path: Path, target: TargetFormat
) -> None:
    with_tensors(sidecar, lambda t: t.update({"layers.0.q.magnitude": np.ones(32, np.float32)}))
    with pytest.raises(Unsupported, match=r"tensor layers\.0\.q\.magnitude is none that"):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target=target))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("layers.1.v.b"), r"layers\.1\.v\.b is missing"),
        (
            lambda t: t.update({"layers.1.v.b": np.ones((3, 16), np.float32)}),
            r"layers\.1\.v\.b is \[3, 16\], the base needs \[2, 16\]",
        ),
        (
            lambda t: t.update({"layers.1.v.b": np.full((2, 16), np.inf, np.float32)}),
            r"layers\.1\.v\.b holds NaN or infinity",
        ),
    ],
)
def test_a_sidecar_whose_tensors_are_not_what_it_says_is_an_error(
    base: Path, sidecar: Path, tmp_path: Path, change: Any, what: str
) -> None:
    with_tensors(sidecar, change)
    with pytest.raises(AdapterInvalid, match=what):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target="trtllm"))


def dora_row(directory: Path) -> Path:
    """q of layer 1 with a magnitude, as TensorRT-LLM stores it."""
    row = np.concatenate([np.ones(2 * 64), np.full(32, 0.5)]).astype(np.float32)
    return save_pair(directory, row[None], [[1, 1, 2, 1]])


def test_dora_rows_are_cut_and_joined_again(base: Path, tmp_path: Path) -> None:
    source = dora_row(tmp_path / "dora")
    cut, joined = tmp_path / "cut", tmp_path / "joined"
    translate(source, cut, base=base, options=Options(target="trtllm", tp_size=2))
    translate(cut, joined, base=base, options=Options(target="trtllm"))
    for name in ("model.lora_weights.npy", "model.lora_config.npy"):
        assert np.array_equal(np.load(joined / name), np.load(source / name))


def test_edgellm_has_no_place_for_dora(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"layers\.1\.q: its DoRA magnitude cannot be carried"):
        translate(
            dora_row(tmp_path / "dora"),
            tmp_path / "out",
            base=base,
            options=Options(target="edgellm"),
        )


def test_dora_needs_a_bundle_that_was_exported_for_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="--dora"):
        translate(dora_row(tmp_path / "dora"), tmp_path / "out", base=base, options=Options())


@pytest.mark.parametrize(
    ("vector", "what"),
    [("bias", "its bias"), ("scale", "its DoRA magnitude")],
)
def test_vectors_of_a_sidecar_reach_the_formats_check(
    base: Path, sidecar: Path, tmp_path: Path, vector: str, what: str
) -> None:
    name = {"bias": "layers.0.q.bias", "scale": "layers.0.q.m"}[vector]
    with_tensors(sidecar, lambda t: t.update({name: np.ones(32, np.float32)}))
    retargeted(sidecar, **{"bias": {"bias": True}, "scale": {"dora": True}}[vector])
    with pytest.raises(Unsupported, match=rf"layers\.0\.q: {what} cannot be carried"):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target="edgellm"))


def test_invocation_tokens_go_nowhere_else(base: Path, sidecar: Path, tmp_path: Path) -> None:
    rewritten(sidecar / ADAPTER_JSON, invocation_tokens=[1, 2])
    with pytest.raises(Unsupported, match="alora_invocation_tokens"):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target="trtllm"))
    translate(sidecar, tmp_path / "again", base=base, options=Options(dtype="float16"))
    assert load_adapter(tmp_path / "again").invocation_tokens == (1, 2)


def retargeted(sidecar: Path, **changes: object) -> None:
    """Changes the first target that the sidecar's document lists."""
    targets = json.loads((sidecar / ADAPTER_JSON).read_text())["targets"]
    rewritten(sidecar / ADAPTER_JSON, targets=[targets[0] | changes, *targets[1:]])


@pytest.mark.parametrize("projection", ["expert_up", "shared_gate", "head"])
def test_targets_outside_a_dense_layer_are_refused_by_name(
    base: Path, sidecar: Path, tmp_path: Path, projection: str
) -> None:
    retargeted(sidecar, projection=projection)
    with pytest.raises(Unsupported, match=rf"{projection}: experts, embedding and head"):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target="trtllm"))


def test_a_layer_the_base_does_not_have_is_an_error(
    base: Path, sidecar: Path, tmp_path: Path
) -> None:
    retargeted(sidecar, layer=2)
    with pytest.raises(AdapterInvalid, match=r"layers\.2\.q: the base has 2 layers"):
        translate(sidecar, tmp_path / "out", base=base, options=Options(target="edgellm"))


@dataclass(frozen=True)
class LaterFactor(Factor):
    """A factor of a version that carries more."""

    gate: np.ndarray | None = None


@dataclass(frozen=True)
class LaterAdapter(Adapter):
    overrides: tuple[str, ...] = ()


def test_what_a_later_version_carries_is_refused_by_name_not_dropped(sidecar: Path) -> None:
    plain = random_factors(DECODER, projections=("q",))[AdapterTarget(0, "q")]
    later = LaterFactor(plain.a, plain.b, 1.0)
    Carried({AdapterTarget(0, "q"): later}).check_only(frozenset())
    later = replace(later, gate=np.ones(32, np.float32))
    with pytest.raises(Unsupported, match=r"layers\.0\.q: gate cannot be carried"):
        Carried({AdapterTarget(0, "q"): later}).check_only(frozenset({"scale"}))

    document = vars(load_adapter(sidecar))
    refuse_more(LaterAdapter(**document))
    with pytest.raises(Unsupported, match=r"adapter\.json: overrides cannot be carried"):
        refuse_more(LaterAdapter(**document, overrides=("norm",)))


def test_nothing_is_read_through_a_link_out_of_the_directory(
    base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    """A manifest from outside names files by paths that stay inside."""
    out = tmp_path / "out"
    translate(peft_dir, out, base=base, options=Options(target="edgellm"))
    document = json.loads((out / MANIFEST).read_text())
    rewritten(out / MANIFEST, files=[{**document["files"][0], "path": "../base/bundle.json"}])
    with pytest.raises(DocumentInvalid, match="unsafe path"):
        translate(out, tmp_path / "back", base=base, options=Options())
