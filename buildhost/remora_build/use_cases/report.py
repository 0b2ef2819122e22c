"""Explains a use-case document: what each use case composes, how wide it is and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_build.inspect.render import Report, Table, size_text
from remora_build.use_cases.source import qairt_files, read_file
from remora_contract.adapter import Adapter, load_adapter
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.compat import adapter_refusals
from remora_contract.digests import short
from remora_contract.errors import ArtifactInvalid, Incompatible
from remora_contract.use_cases import UseCase, UseCaseAdapter, UseCaseDocument

_UNKNOWN = "-"


@dataclass(frozen=True)
class Known:
    """Of one adapter; None where neither a converted adapter nor QAIRT's file says it."""

    rank: int | None
    bytes: int | None


def describe_use_cases(path: Path, base: Path | None = None, notes: tuple[str, ...] = ()) -> Report:
    """`base` is the bundle to fit, None: no judgement. Raises ArtifactInvalid, DocumentInvalid,
    Incompatible (an adapter of another base)."""
    document, home = read_file(path)
    bundle = None if base is None else load_bundle(base)
    adapters = {a.name: _known(a, document, home, bundle) for a in document.adapters}
    limit = None if bundle is None else bundle.graph.max_bank_rank
    rows = [_row(u, adapters, limit) for u in document.use_cases]
    together = _sum(adapters[a.name].rank for a in document.adapters)
    return Report(
        title=f"Use cases {path}",
        data={
            "kind": "use_cases",
            "base_digest": document.base_digest,
            "max_bank_rank": limit,
            "all_adapters_columns": together,
            "counts_by_use_case": document.counts(),
            "use_cases": rows,
            "adapters": [_adapter_data(a, adapters[a.name]) for a in document.adapters],
            "notes": list(notes),
        },
        facts=_facts(document, limit, together, notes),
        tables=(_use_case_table(rows), _adapter_table(document, adapters)),
    )


def _known(
    entry: UseCaseAdapter, document: UseCaseDocument, home: Path, bundle: Bundle | None
) -> Known:
    if document.base_digest is None or entry.directory is None:
        said = [f["rank"] for f in qairt_files(entry, home).values() if f and "rank" in f]
        ranks = [r for r in said if isinstance(r, int)]
        return Known(max(ranks, default=None), None)
    adapter = _converted(entry, home / entry.directory)
    if bundle is not None and (refusals := adapter_refusals(bundle, adapter)):
        raise Incompatible(refusals)
    return Known(adapter.rank, adapter.bytes)


def _converted(entry: UseCaseAdapter, directory: Path) -> Adapter:
    adapter = load_adapter(directory)
    if adapter.digest != entry.digest:
        raise ArtifactInvalid(
            f"{directory} holds adapter {short(adapter.digest)}, the document lists "
            f"{short(entry.digest or '')}; convert again"
        )
    return adapter


def _row(use_case: UseCase, adapters: dict[str, Known], limit: int | None) -> dict[str, Any]:
    used = [adapters[n] for n in use_case.adapter_names]
    columns = _sum(a.rank for a in used)
    fits = None if limit is None or columns is None else columns <= limit
    return {
        "name": use_case.name,
        "adapters": len(use_case.adapter_names),
        "adapter_names": list(use_case.adapter_names),
        "adapter_alphas": list(use_case.alphas),
        "ranks": [a.rank for a in used],
        "columns": columns,
        "bytes": _sum(a.bytes for a in used),
        "fits": fits,
        "quant_overrides": use_case.quant_overrides,
    }


def _facts(
    document: UseCaseDocument, limit: int | None, together: int | None, notes: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    converted = document.base_digest or "not converted yet"
    bank = "not said (--base)" if limit is None else f"{limit} columns"
    all_of_them = _UNKNOWN if together is None else f"{together} columns"
    if limit is not None and together is not None and together > limit:
        all_of_them += ", more than the bank: the least recently used make room"
    return (
        ("base", converted),
        ("use cases", str(len(document.use_cases))),
        ("adapters", str(len(document.adapters))),
        ("bank", bank),
        ("all resident", all_of_them),
        *(("note", note) for note in notes),
    )


def _use_case_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("use case", "adapters", "composition", "ranks", "columns", "size", "fits")
    return Table("Use cases", columns, tuple(_cells(row) for row in rows))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    pairs = zip(row["adapter_names"], row["adapter_alphas"], strict=True)
    composition = ", ".join(f"{name} {alpha:g}" for name, alpha in pairs)
    return (
        row["name"],
        str(row["adapters"]),
        composition or "the base model alone",
        " + ".join(_text(r) for r in row["ranks"]) or "0",
        _text(row["columns"]),
        _UNKNOWN if row["bytes"] is None else size_text(row["bytes"]),
        {True: "yes", False: "no", None: _UNKNOWN}[row["fits"]],
    )


def _adapter_table(document: UseCaseDocument, adapters: dict[str, Known]) -> Table:
    rows = []
    for entry in document.adapters:
        known = adapters[entry.name]
        users = sum(entry.name in u.adapter_names for u in document.use_cases)
        size = _UNKNOWN if known.bytes is None else size_text(known.bytes)
        digest = _UNKNOWN if entry.digest is None else short(entry.digest)
        rows.append((entry.name, _text(known.rank), size, digest, str(users)))
    return Table("Adapters", ("adapter", "rank", "size", "digest", "use cases"), tuple(rows))


def _adapter_data(entry: UseCaseAdapter, known: Known) -> dict[str, Any]:
    return {
        "name": entry.name,
        "directory": entry.directory,
        "digest": entry.digest,
        "rank": known.rank,
        "bytes": known.bytes,
    }


def _sum(values: Any) -> int | None:
    """None where one is not known."""
    found = list(values)
    return None if None in found else sum(found)


def _text(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)
