"""Named, weighted compositions of adapters as a document: use_cases.json, and the lora_config.yaml
of Qualcomm's QAIRT that says the same.

    OUT/
      use_cases.json          this document, made by `remora-build use-cases convert`
      adapters/<name>/        one converted adapter each

A use case gives each of its adapters an alpha, the weight its part is multiplied with:
    y = x W + sum_i alpha_i (x A_i) B_i          PEFT's scaling (lora_alpha / r, ...) lies in B_i
so alpha 1 is the adapter as it was trained. What only QAIRT reads (quant_overrides, model_name,
...) is carried verbatim. Pure but for `load_use_cases`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_contract.artifact import check_name
from remora_contract.bundle import BundleFile, check_relative, read_document
from remora_contract.digests import check_digest
from remora_contract.errors import DocumentInvalid
from remora_contract.release import (
    BASE_USE_CASES,
    ReleaseUseCase,
    WeightedName,
    check_use_cases,
)
from remora_contract.strict import loads

USE_CASES_JSON = "use_cases.json"
ADAPTERS_DIR = "adapters"
FORMAT_VERSION = 1
MAX_ADAPTERS = 1024
MAX_USE_CASES = 1024
MAX_DOCUMENT_BYTES = 4 << 20

QAIRT_FIELDS = ("model_name", "quant_overrides", "quant_updatable_tensors")


@dataclass(frozen=True)
class UseCaseAdapter:
    """`directory`: of the adapter, relative to the document. `lora_config` is QAIRT's own."""

    name: str
    directory: str | None = None
    digest: str | None = None  # once converted
    lora_config: Any = None

    def __post_init__(self) -> None:
        check_name(self.name, "adapter name")
        if self.digest is not None:
            check_digest(self.digest, f"adapter {self.name}")


@dataclass(frozen=True)
class UseCase:
    """`adapter_alphas` None: 1 each, as QAIRT has it."""

    name: str
    adapter_names: tuple[str, ...]
    adapter_alphas: tuple[float, ...] | None = None
    model_name: Any = None
    quant_overrides: Any = None
    quant_updatable_tensors: Any = None

    def __post_init__(self) -> None:
        if self.adapter_alphas is None:
            object.__setattr__(self, "adapter_alphas", (1.0,) * len(self.adapter_names))
        if len(self.alphas) != len(self.adapter_names):
            raise ValueError(
                f"use case {self.name[:80]}: {len(self.adapter_names)} adapter_names, but "
                f"{len(self.alphas)} adapter_alphas"
            )
        if self.name in BASE_USE_CASES and self.adapter_names:
            raise ValueError(f"use case {self.name} is the base model alone: it names no adapter")
        self.release_form()

    @property
    def alphas(self) -> tuple[float, ...]:
        return self.adapter_alphas or ()

    def release_form(self) -> ReleaseUseCase:
        pairs = zip(self.adapter_names, self.alphas, strict=True)
        return ReleaseUseCase(self.name, tuple(WeightedName(n, a) for n, a in pairs))


@dataclass(frozen=True)
class UseCaseDocument:
    """`base_digest` and `files` are set once the adapters are converted, for one base."""

    format_version: int
    adapters: tuple[UseCaseAdapter, ...]
    use_cases: tuple[UseCase, ...]
    base_digest: str | None = None
    attach_point_onnx_mapping: Any = None
    files: tuple[BundleFile, ...] = ()

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format version {self.format_version} is not {FORMAT_VERSION}; "
                "convert again with this version of remora-build"
            )
        names = [a.name for a in self.adapters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"adapter {name} is listed twice")
        if self.base_digest is not None:
            check_digest(self.base_digest, "base_digest")
            for adapter in self.adapters:
                _check_converted(adapter)
        check_use_cases(self.release_use_cases(), names)

    def release_use_cases(self) -> tuple[ReleaseUseCase, ...]:
        return tuple(u.release_form() for u in self.use_cases)

    def counts(self) -> dict[str, int]:
        """How many adapters each use case composes."""
        return {u.name: len(u.adapter_names) for u in self.use_cases}


def only_for_qairt(document: UseCaseDocument) -> tuple[str, ...]:
    """Fields of use cases that are carried in the document and used by QAIRT's tools alone, each
    with the use cases that have it."""
    told = []
    for key in QAIRT_FIELDS:
        users = [u.name for u in document.use_cases if getattr(u, key) is not None]
        if users:
            told.append(f"{key} of {', '.join(users)}")
    return tuple(told)


def load_use_cases(path: Path) -> tuple[UseCaseDocument, Path]:
    """A converted document and the directory its paths are relative to; `path` may be either.

    Raises ArtifactInvalid, DocumentInvalid.
    """
    file = path / USE_CASES_JSON if path.is_dir() else path
    if file.suffix in (".yaml", ".yml"):
        raise DocumentInvalid(
            f"{file}: its adapters are not converted; run remora-build use-cases convert"
        )
    data = read_document(file)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentInvalid(f"{file}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    document = loads(UseCaseDocument, data, str(file))
    if document.base_digest is None:
        raise DocumentInvalid(
            f"{file}: its adapters are not converted; run remora-build use-cases convert"
        )
    return document, file.parent


def _check_converted(adapter: UseCaseAdapter) -> None:
    if adapter.directory is None or adapter.digest is None:
        raise ValueError(f"adapter {adapter.name} has no directory or digest")
    check_relative(adapter.directory)
