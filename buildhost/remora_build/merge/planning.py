"""All that a merge will write, decided before the first byte: which tensor of which shard is
changed how, and whether head and embedding part. Reads weights only to compare copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remora_build.adapters.budget import matching
from remora_build.checkpoint.directory import CONFIG, check_directory, find_tensors, read_json
from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_build.merge.adapter import OpenAdapter
from remora_build.merge.binding import bind
from remora_build.merge.changes import Change, Changes, combine
from remora_build.merge.comparing import Comparer
from remora_build.merge.layouts import Base
from remora_build.merge.places import Places
from remora_build.merge.reading import CheckpointReader
from remora_build.merge.tying import Tie, find_tie, follow_tie, parts
from remora_contract.errors import Unsupported


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    def model_types(self) -> frozenset[str]:
        documents = (self.config, self.config.get("text_config"))
        found = (d.get("model_type") for d in documents if isinstance(d, Mapping))
        return frozenset(t for t in found if isinstance(t, str))


@dataclass(frozen=True)
class Output:
    """A tensor to write: `entry` has its new name and where its old values are."""

    entry: TensorEntry
    change: Change | None


@dataclass(frozen=True)
class MergePlan:
    """`shards`: file name -> tensors in file order; `untied`: the head that the checkpoint tied
    gets a tensor of its own, `new_head` when it had none."""

    shards: Mapping[str, tuple[Output, ...]]
    untied: bool
    new_head: TensorEntry | None

    @property
    def bytes(self) -> int:
        return sum(o.entry.bytes for outputs in self.shards.values() for o in outputs)

    @property
    def count(self) -> int:
        return sum(len(outputs) for outputs in self.shards.values())

    @property
    def changed(self) -> int:
        return sum(o.change is not None for outputs in self.shards.values() for o in outputs)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Raises CheckpointInvalid, or Unsupported for a quantized checkpoint."""
    check_directory(directory)
    config = read_json(directory / CONFIG)
    if config.get("quantization_config"):
        raise Unsupported(
            f"{directory} is quantized (quantization_config): adding to rounded weights would "
            "round them again; merge into the original checkpoint"
        )
    return Checkpoint(directory, config, find_tensors(directory))


def plan_merge(
    checkpoint: Checkpoint, adapters: Sequence[OpenAdapter], reader: CheckpointReader
) -> MergePlan:
    """Raises AdapterInvalid or Unsupported, naming the tensor that cannot be merged."""
    for entry in checkpoint.tensors.values():
        reader.open(entry.path)
    comparer = Comparer(reader, adapters)
    tie = _tie(checkpoint, comparer)
    held = _with_head(checkpoint.tensors, tie)
    base = Base(Places({n: e.shape for n, e in held.items()}), checkpoint.model_types())
    total = combine(_changes(a, base, held, tie, comparer) for a in adapters)
    untied = tie is not None and parts(total, tie)
    if tie is None or tie.stored or untied:
        written = held
    else:
        written = {n: e for n, e in held.items() if n != tie.head}
    new_head = written.get(tie.head) if tie is not None and not tie.stored else None
    return MergePlan(_shards(written, total), untied, new_head)


def _tie(checkpoint: Checkpoint, comparer: Comparer) -> Tie | None:
    """As transformers: copies that differ are not tied, whatever the config says."""
    tensors = checkpoint.tensors
    tie = find_tie(checkpoint.config, tensors)
    if tie is None or not tie.stored:
        return tie
    return tie if comparer.stored_alike(tensors[tie.embedding], tensors[tie.head]) else None


def _with_head(tensors: Mapping[str, TensorEntry], tie: Tie | None) -> dict[str, TensorEntry]:
    """The tensors, and behind its embedding the head that shares it."""
    held: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        held[name] = entry
        if tie is not None and not tie.stored and name == tie.embedding:
            held[tie.head] = replace(entry, name=tie.head)
    return held


def _changes(
    adapter: OpenAdapter,
    base: Base,
    held: Mapping[str, TensorEntry],
    tie: Tie | None,
    comparer: Comparer,
) -> Changes:
    changes = {}
    with matching(adapter.source.settings.where):
        bound = bind(adapter.source, base, tied=tie is not None)
    for name, change in bound.items():
        saved = change.base
        if saved is not None and not saved.trained and comparer.is_copy(saved, held[name]):
            change = replace(change, base=None)
        if change != Change():
            changes[name] = change
    if tie is None:
        return changes
    ensured = adapter.source.settings.lora.weight_tying
    return follow_tie(changes, tie, ensured=ensured, same=comparer.changed_alike)


def _shards(tensors: Mapping[str, TensorEntry], total: Changes) -> dict[str, tuple[Output, ...]]:
    shards: dict[str, list[Output]] = {}
    for entry in sorted(tensors.values(), key=lambda e: e.offset):
        shards.setdefault(entry.path.name, []).append(Output(entry, total.get(entry.name)))
    return {name: tuple(outputs) for name, outputs in sorted(shards.items())}
