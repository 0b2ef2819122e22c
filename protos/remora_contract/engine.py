"""A built engine that travels: engine.json, and the choice between shipping one and building. Pure.

    ENGINE/
      engine.json   this document: build key, files, facts; its canonical digest is the identity
      ...           what the backend loads

An engine fits one device class. `choose` compares build keys field by field and is asked twice: by
the controller for its plan, with what the device reports, and by the device, with its whole recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remora_contract.bundle import (
    GOLDEN_JSON,
    GRAPH_FILE,
    BundleFile,
    check_listed,
    read_document,
)
from remora_contract.digests import digest_document, short
from remora_contract.errors import ArtifactInvalid
from remora_contract.strict import loads, plain

ENGINE_JSON = "engine.json"
PREFILL = "prefill"  # the recipe's field that depends on the bundle too
DIALECT = "dialect"  # the recipe's field of an engine that was built from a bundle's second graph
PROCESSORS = "gpu.processors"  # compute capabilities, of a device its own one
MAX_KEY_FIELDS = 64
MAX_FIELD_TEXT = 256
_SHOWN = 4
# Of what a build writes, in sizes of the graph. Rewritten model, optimised model with prepacked
# weights, and the widening of float16.
_DISK_FACTOR = 5
_PLAN_DISK_FACTOR = 2  # of a TensorRT engine: the weights once, its kernels, and some air
_INT8_DISK_FACTOR = 6  # of prompts' weights: as written, as saved, and prepacked, twice int4's size


@dataclass(frozen=True)
class EngineKey:
    """What was built, and how; the recipe is the agent's, kept here as it is."""

    files: tuple[BundleFile, ...]
    recipe: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest_document(self)


@dataclass(frozen=True)
class EngineDocument:
    key: EngineKey
    files: tuple[BundleFile, ...]
    facts: dict[str, str]

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("an engine has files")
        check_listed(self.files, self.files[0].path)
        check_listed(self.key.files, GRAPH_FILE)
        if any(f.path == ENGINE_JSON for f in self.files):
            raise ValueError(f"{ENGINE_JSON} lists itself")
        if len(flat(self.key.recipe)) > MAX_KEY_FIELDS:
            raise ValueError(f"a recipe has at most {MAX_KEY_FIELDS} fields")

    @property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def base_digest(self) -> str:
        """What it was built from: the graph, whose file names its weights."""
        return next(f.digest for f in self.key.files if f.path == GRAPH_FILE)


def load_engine_document(directory: Path) -> EngineDocument:
    """Parses DIRECTORY/engine.json. Raises ArtifactInvalid, DocumentInvalid."""
    path = directory / ENGINE_JSON
    if not path.exists():
        raise ArtifactInvalid(f"{directory} is no engine: it has no {ENGINE_JSON}")
    return loads(EngineDocument, read_document(path), str(path))


def flat(recipe: object) -> dict[str, str]:
    """A recipe's fields as text, "gpu.rows" for the inner ones; fields that are None are left out.
    `recipe` is a dataclass or decoded JSON."""
    found: dict[str, str] = {}
    _flatten(plain(recipe), "", found)
    return found


def _flatten(value: Any, path: str, found: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{path}.{key}" if path else str(key), found)
    elif isinstance(value, list):
        found[path] = ",".join(map(str, value))
    else:
        found[path] = str(value)


@dataclass(frozen=True)
class Offered:
    """An engine that a release carries, by what decides whether it fits."""

    digest: str
    files: Mapping[str, str]  # path of the bundle's file -> digest
    recipe: Mapping[str, str]  # as `flat` writes it


def offered(document: EngineDocument) -> Offered:
    return offered_key(document.digest, document.key)


def offered_key(digest: str, key: EngineKey) -> Offered:
    """An engine of this key, known by `digest`."""
    return Offered(digest, {f.path: f.digest for f in key.files}, flat(key.recipe))


@dataclass(frozen=True)
class Wanted:
    """What a device builds of a bundle. `is_whole`: a field that is absent is no field of the
    recipe; else it is one that the device did not tell and only the device can compare.
    `others`: what it builds of the bundle's further graphs, should that of `recipe` not do."""

    files: Mapping[str, str]  # every file of the bundle, path -> digest
    recipe: Mapping[str, str]
    is_whole: bool
    others: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Ship:
    digest: str
    why: str


@dataclass(frozen=True)
class Build:
    why: str


def choose(engines: Sequence[Offered], wanted: Wanted) -> Ship | Build:
    """The first engine whose key is the wanted one, else of another of the bundle's graphs, else
    why the nearest one's is not."""
    chosen = _choose(engines, wanted)
    for recipe in wanted.others:
        other = _choose(engines, replace(wanted, recipe=recipe))
        if isinstance(chosen, Build) and isinstance(other, Ship):
            return other
    return chosen


def _choose(engines: Sequence[Offered], wanted: Wanted) -> Ship | Build:
    if not engines:
        return Build("the release carries no engine")
    if not wanted.recipe:
        return Build("the device does not say which engines fit; its agent is older than they are")
    nearest: list[str] | None = None
    for engine in engines:
        found = differences(engine, wanted)
        if not found:
            untold = _untold(engine, wanted)
            also = f", if {', '.join(untold)} agree" if untold else ""
            return Ship(engine.digest, f"its build key is the device's{also}")
        if nearest is None or len(found) < len(nearest):
            nearest = found
    assert nearest is not None
    more = len(nearest) - _SHOWN
    shown = "; ".join(nearest[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return Build(f"no engine of {len(engines)} fits: {shown}")


def differences(engine: Offered, wanted: Wanted) -> list[str]:
    """Fields of the build key that differ, in words; empty when the engine fits."""
    found = []
    for path in sorted(_built_from(engine, wanted) | engine.files.keys()):
        have, need = engine.files.get(path), wanted.files.get(path)
        if have != need:
            found.append(f"{path} is {_short(have)}, the bundle's {_short(need)}")
    for name in sorted(engine.recipe.keys() | wanted.recipe.keys()):
        if name not in wanted.recipe and not wanted.is_whole and name != DIALECT:
            continue
        built, here = engine.recipe.get(name, "none"), wanted.recipe.get(name, "none")
        if built != here:
            found.append(f"{name} {_text(built)}, the device has {_text(here)}")
    return found


def prefill_of(choice: str, facts: Mapping[str, Any]) -> str:
    """The recipe's prefill for a bundle whose manifest has these facts, when the device is set to
    `choice`. The agent's rule, as far as the facts go: integers, float activations, no experts."""
    takes = (
        facts.get("quant") in ("int4", "int8")
        and facts.get("activations", "none") == "none"
        and not facts.get("experts", False)
    )
    return choice if takes else "plain"


def build_disk_bytes(graph_bytes: int, recipe: Mapping[str, str]) -> int:
    """What a build by this flat recipe may write at its worst moment. A device that told none is
    taken for one that builds for its processor."""
    has_gpu = any(name.startswith("gpu.") for name in recipe)
    factor = _PLAN_DISK_FACTOR if has_gpu else _DISK_FACTOR
    factor += _INT8_DISK_FACTOR if recipe.get(PREFILL, "plain") != "plain" else 0
    return factor * graph_bytes


def _built_from(engine: Offered, wanted: Wanted) -> set[str]:
    """Files of the bundle that such a build reads: the graph's, and the golden prompts when the
    recipe lets them decide."""
    graph = {path for path in wanted.files if path.startswith(GRAPH_FILE)}
    decided = engine.recipe.get(PREFILL, "plain") != "plain" and GOLDEN_JSON in wanted.files
    return graph | ({GOLDEN_JSON} if decided else set())


def _untold(engine: Offered, wanted: Wanted) -> list[str]:
    untold = engine.recipe.keys() - wanted.recipe.keys() - {DIALECT}
    return [] if wanted.is_whole else sorted(untold)


def _short(digest: str | None) -> str:
    return "none" if digest is None else short(digest)


def _text(value: str) -> str:
    return short(value) if value.startswith("sha256:") else value[:80] or "none"


def manifest_facts(document: EngineDocument) -> dict[str, Any]:
    """What a manifest says of an engine, so that nobody fetches one to find out that it is not
    his. Vouched for by nothing: the device compares again what it fetched."""
    mine = offered(document)
    return {"files": dict(mine.files), "recipe": dict(mine.recipe)}


def offered_in(digest: str, facts: Mapping[str, Any]) -> Offered:
    """The reverse of `manifest_facts`. Raises ArtifactInvalid."""
    files, recipe = facts.get("files"), facts.get("recipe")
    for table in (files, recipe):
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise ArtifactInvalid(
                f"the manifest of engine {short(digest)} does not say what it was built from; "
                "publish it again"
            )
    assert isinstance(files, dict) and isinstance(recipe, dict)
    return Offered(digest, files, recipe)
