"""How use cases are spelt: QAIRT's lora_config.yaml <-> the document, and what people write beside
adapters that are named elsewhere. Pure; works on decoded YAML or JSON.

    adapter:                                    # also adapters
    - {name: long, lora_config: long.json}      # directory: where the adapter lies, is ours
    attach_point_onnx_mapping: base.json
    use-case:                                   # also use_cases
    - name: elementary+long
      adapter_names: [elementary, long]
      adapter_alphas: [1.0, 0.5]                # left out: 1 each
      model_name: elementary+long.onnx          # QAIRT's, carried: quant_overrides and
      quant_overrides: elementary+long.json     # quant_updatable_tensors too
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remora_contract.errors import DocumentInvalid, Unsupported
from remora_contract.release import ReleaseUseCase, WeightedName
from remora_contract.strict import parse
from remora_contract.use_cases import (
    FORMAT_VERSION,
    MAX_ADAPTERS,
    MAX_USE_CASES,
    QAIRT_FIELDS,
    UseCase,
    UseCaseAdapter,
    UseCaseDocument,
)

_MAPPING = "attach_point_onnx_mapping"
# Spellings of QAIRT's tools and of its Python API for what is called otherwise here.
_TOP = {"adapter": "adapters", "use-case": "use_cases", "use_case": "use_cases"}
_ADAPTER = {"adapter_lora_config": "lora_config"}
_USE_CASE = {"model": "model_name", "encodings": "quant_overrides"}


def parse_use_cases(data: object, where: str) -> UseCaseDocument:
    """From decoded YAML or JSON, QAIRT's spelling or ours. `where` names the source in errors.

    Raises DocumentInvalid naming the key, Unsupported for QAIRT's other documents.
    """
    if not isinstance(data, dict):
        raise DocumentInvalid(f"{where}: must be a table with adapter and use-case")
    _refuse_others(data, where)
    if "format_version" in data:
        return parse(UseCaseDocument, data, where)
    given = _renamed(data, _TOP, where)
    given["adapters"] = _entries(UseCaseAdapter, data, "adapters", _ADAPTER, MAX_ADAPTERS, where)
    given["use_cases"] = _entries(UseCase, data, "use_cases", _USE_CASE, MAX_USE_CASES, where)
    known = {"adapters", "use_cases", _MAPPING}
    if _MAPPING in given:  # of QAIRT's own form, but only what can be written again
        given |= parse(dict[str, Any], {_MAPPING: given[_MAPPING]}, where)
    for key in given:
        if key not in known:
            raise DocumentInvalid(
                f"{where}: unknown key {str(key)[:80]!r} (known: adapter, use-case, "
                "attach_point_onnx_mapping)"
            )
    try:
        return UseCaseDocument(FORMAT_VERSION, **given)
    except ValueError as e:
        raise DocumentInvalid(f"{where}: {e}") from e


def written_use_cases(data: object, where: str) -> tuple[ReleaseUseCase, ...]:
    """Use cases as people write them where the adapters are named besides: a table of names to
    {adapter: weight} or to {adapter_names, adapter_alphas}, or a list of the latter with a name.

    Raises DocumentInvalid naming the key.
    """
    if isinstance(data, dict):
        return tuple(_written(name, value, f"{where}.{name}") for name, value in data.items())
    if not isinstance(data, (list, tuple)):
        raise DocumentInvalid(f"{where}: must be a table or a list, not {str(data)[:80]!r}")
    return tuple(_spelt_out(entry, f"{where}[{i}]") for i, entry in enumerate(data))


def _written(name: object, value: object, where: str) -> ReleaseUseCase:
    if isinstance(value, dict) and isinstance(value.get("adapter_names"), list):
        if "name" in value:
            raise DocumentInvalid(f"{where}: unknown key 'name': its key names the use case")
        return _spelt_out({"name": name, **value}, where)
    weights = parse(dict[str, float], value, where)
    names = tuple(WeightedName(a, w) for a, w in weights.items())
    try:
        return ReleaseUseCase(parse(str, name, where), names)
    except ValueError as e:
        raise DocumentInvalid(f"{where}: {e}") from e


def _spelt_out(entry: object, where: str) -> ReleaseUseCase:
    use_case = parse(UseCase, entry, where)
    for key in QAIRT_FIELDS:
        if getattr(use_case, key) is not None:
            raise DocumentInvalid(
                f"{where}: {key} is QAIRT's and does not go to devices; leave it out, or give the "
                "whole document as --use-cases"
            )
    return use_case.release_form()


def qairt_form(document: UseCaseDocument) -> dict[str, Any]:
    """As QAIRT's tools read it, ready for a YAML dump. Pure inverse of `parse_use_cases` but for
    directories and digests, which QAIRT has no place for."""
    adapters = [_without_none(name=a.name, lora_config=a.lora_config) for a in document.adapters]
    use_cases = [
        _without_none(
            name=u.name,
            adapter_names=list(u.adapter_names),
            model_name=u.model_name,
            adapter_alphas=list(u.alphas),
            quant_overrides=u.quant_overrides,
            quant_updatable_tensors=u.quant_updatable_tensors,
        )
        for u in document.use_cases
    ]
    mapping = document.attach_point_onnx_mapping
    return {
        "adapter": adapters,
        **({} if mapping is None else {"attach_point_onnx_mapping": mapping}),
        "use-case": use_cases,
    }


def _refuse_others(data: Mapping[Any, Any], where: str) -> None:
    if "features" in data or "recipe" in data:
        raise Unsupported(f"{where}: pipeline recipes are not read; give a lora_config.yaml")
    for key in ("use_case", "use-case", "use_cases"):
        entries = data.get(key)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and {"lora_weights", "weights"} & set(entry):
                raise Unsupported(
                    f"{where}: this is what qairt-lora-importer reads or writes, whose use cases "
                    "hold weights that are joined already; give the lora_config.yaml with "
                    "adapter_names that they were made from"
                )


def _entries(
    cls: type[Any],
    data: Mapping[Any, Any],
    name: str,
    renamed: Mapping[str, str],
    most: int,
    where: str,
) -> tuple[Any, ...]:
    key = next((k for k in data if _TOP.get(k, k) == name), None)
    if key is None:
        spelling = next(k for k, v in _TOP.items() if v == name)
        raise DocumentInvalid(f"{where}: missing key {spelling!r}")
    entries = data[key]
    if not isinstance(entries, list) or len(entries) > most:
        raise DocumentInvalid(f"{where}: {key} must be a list of at most {most}")
    found = []
    for i, entry in enumerate(entries):
        at = f"{where}: {key}[{i}]"
        if isinstance(entry, dict):
            entry = _renamed(entry, renamed, at)
        found.append(parse(cls, entry, at))
    return tuple(found)


def _renamed(table: Mapping[Any, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = names.get(key, key) if isinstance(key, str) else key
        if name in found:
            raise DocumentInvalid(f"{where}: {key!r} says again what another key says")
        found[name] = value
    return found


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
