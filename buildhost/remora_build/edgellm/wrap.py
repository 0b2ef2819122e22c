"""An engine folder of TensorRT Edge-LLM becomes a bundle: copied, described, content-addressed.

The engine is opaque: what is said of it comes from its config.json, and what is said of the model
from the checkpoint that it was made of, so that adapters of that checkpoint fit.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_build.checkpoint.directory import CONFIG, find_tensors, read_json
from remora_build.checkpoint.inventory import Inventory, base_digest, take_inventory
from remora_build.checkpoint.stream import TensorStream
from remora_build.export.progress import Progress, SilentProgress
from remora_build.families import left_out_of, naming, read_config
from remora_build.staging import staged_directory
from remora_build.tokenizer import copy_tokenizer, load_tokenizer, special_tokens
from remora_build.version import exporter_name
from remora_contract.bundle import (
    BUNDLE_JSON,
    EDGELLM_DIR,
    EDGELLM_VERSION,
    MAX_BANK_RANK,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
)
from remora_contract.decoder import DecoderSpec
from remora_contract.digests import canonical_json, digest_file
from remora_contract.errors import ArtifactInvalid, Refused, Unsupported

_ENGINE = "llm.engine"
_BUILDER = "builder_config"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_SPECULATIVE = ("spec_base.engine", "spec_draft.engine")
_MEDIA = ("visual", "audio", "talker")


@dataclass(frozen=True)
class Built:
    """What the engine folder says of itself, in the words of Edge-LLM's builder_config."""

    max_kv_cache_capacity: int
    max_input_len: int
    max_lora_rank: int


def wrap_engine(
    engine_dir: Path,
    out: Path,
    *,
    checkpoint: Path,
    name: str | None = None,
    version: str | None = None,
    sm: int | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Writes the bundle directory `out`. `version` of tensorrt-edgellm and `sm` (compute
    capability, 87 for 8.7) are those that the engine was built with and for.

    Raises ArtifactInvalid for what is no engine folder, Unsupported for one with more than a text
    decoder, CheckpointInvalid, Conflict, Exhausted.
    """
    built = read_built(engine_dir)
    shown = progress or SilentProgress()
    spec = read_config(checkpoint)
    load_tokenizer(checkpoint, spec)
    tensors = find_tensors(checkpoint)
    names = naming(spec, tensors)
    inventory = take_inventory(names, tensors, left_out_of(checkpoint))
    special = special_tokens(checkpoint, spec.vocab)
    base = _base(names.spec, inventory, shown)
    with staged_directory(out, marker=BUNDLE_JSON, replace=replace) as staging:
        copied = _copy_engine(engine_dir, staging, shown)
        carried = copy_tokenizer(checkpoint, staging)
        bundle = Bundle(
            format_version=EDGELLM_VERSION,
            base_digest=base,
            decoder=names.spec,
            graph=_graph(built),
            files=tuple(_described(staging, path) for path in sorted([*copied, *carried])),
            eos_token_ids=special.eos,
            bos_token_id=special.bos,
            pad_token_id=special.pad,
            source=SourceInfo(
                name=name or checkpoint.resolve().name,
                model_type=str(read_json(checkpoint / CONFIG)["model_type"]),
                dtype=_DTYPES.get(inventory.tensors[names.embedding].dtype, "unknown"),
            ),
            exporter=exporter_name(),
            notes={
                "edgellm": _notes(built, version, sm),
                "golden": "none: give questions by text with the release (gates.golden)",
            },
        )
        (staging / BUNDLE_JSON).write_bytes(canonical_json(bundle))
    return bundle


def read_built(engine_dir: Path) -> Built:
    """Raises ArtifactInvalid, Unsupported."""
    for other in _SPECULATIVE:
        if (engine_dir / other).exists():
            raise Unsupported(f"{engine_dir / other}: engines with a draft model are not served")
    for other in _MEDIA:
        if (engine_dir / other).is_dir():
            raise Unsupported(f"{engine_dir / other}: only text is served; leave its engines out")
    if not (engine_dir / _ENGINE).is_file():
        raise ArtifactInvalid(
            f"{engine_dir} is no engine folder of TensorRT Edge-LLM: it has no {_ENGINE}"
        )
    path = engine_dir / CONFIG
    config = read_json(path).get(_BUILDER) if path.is_file() else None
    if not isinstance(config, dict):
        raise ArtifactInvalid(f"{path} says no {_BUILDER}; build the engine again")
    capacity = _number(config, "max_kv_cache_capacity", str(path))
    return Built(
        capacity,
        min(capacity, _number(config, "max_input_len", str(path))),
        _number(config, "max_lora_rank", str(path), 0),
    )


def _number(config: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < (default is None):
        raise ArtifactInvalid(f"{where}: {_BUILDER}.{key} is {value!r}, no such number")
    return value


def _graph(built: Built) -> GraphSpec:
    """What a device must know of it before it opens it; it has no operator set."""
    rank = min(built.max_lora_rank, MAX_BANK_RANK)
    return GraphSpec("edgellm", "float16", built.max_kv_cache_capacity, rank, opset=0)


def _base(spec: DecoderSpec, inventory: Inventory, progress: Progress) -> str:
    """As an export of the same checkpoint has it."""
    advance = progress.stage("hashing the checkpoint", len(inventory.tensors))
    with TensorStream() as stream:
        for entry in inventory.tensors.values():
            stream.digest(entry)
            advance(1)
        return base_digest(spec, inventory.tensors, stream.digests)


def _copy_engine(engine_dir: Path, staging: Path, progress: Progress) -> list[str]:
    """Every file of the folder, links followed; paths in the bundle."""
    files = sorted(p for p in engine_dir.rglob("*") if p.is_file())
    advance = progress.stage("copying the engine", len(files))
    copied = []
    for file in files:
        path = f"{EDGELLM_DIR}/{file.relative_to(engine_dir).as_posix()}"
        target = staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, target)
        except PermissionError as e:
            raise Refused(f"{file} cannot be read: {e.strerror}") from e
        copied.append(path)
        advance(1)
    return copied


def _described(staging: Path, path: str) -> BundleFile:
    file = staging / path
    return BundleFile(path, file.stat().st_size, digest_file(file))


def _notes(built: Built, version: str | None, sm: int | None) -> dict[str, Any]:
    notes: dict[str, Any] = {"max_input_len": built.max_input_len}
    if version is not None:
        notes["version"] = version
    if sm is not None:
        notes["sm"] = sm
    return notes
