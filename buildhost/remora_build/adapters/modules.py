"""The base model's modules and parameters that an adapter may change, by their path in the model.

Owns which of a family's namings an adapter uses, and how PEFT nests its wrappers of parameters.
Pure: works on names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from remora_build.families import namings
from remora_build.families.naming import ModulePart, Naming
from remora_contract.decoder import DecoderSpec

Parts = tuple[ModulePart, ...]
_WRAPPED = ".base_layer"


@dataclass(frozen=True)
class ModuleTable:
    """`modules` holds linear modules, the embedding and the head; `parameters` stacks of experts
    [E, n, k]."""

    naming: Naming
    modules: Mapping[str, Parts]
    parameters: Mapping[str, Parts]

    @property
    def embedding(self) -> str:
        return self.naming.embedding.removesuffix(".weight")

    @property
    def head(self) -> str:
        return self.naming.place.head

    @cached_property
    def linear(self) -> frozenset[str]:
        """What "all-linear" means."""
        return frozenset(self.modules) - {self.embedding, self.head}

    @cached_property
    def unadaptable(self) -> frozenset[str]:
        return self.naming.unadaptable()

    def nested(self, parameters: Collection[str]) -> dict[str, str]:
        """Where PEFT keeps each parameter's factors when exactly these are adapted: a module's
        parameters are wrapped one in the other, the first being the innermost."""
        places: dict[str, str] = {}
        for container in sorted({p.rpartition(".")[0] for p in parameters}):
            inside = [p for p in self.parameters if p.rpartition(".")[0] == container]
            wrapped = [p for p in inside if p in parameters]
            for depth, parameter in enumerate(reversed(wrapped)):
                places[parameter] = container + _WRAPPED * depth
        return places


def module_table(decoder: DecoderSpec, names: Collection[str]) -> ModuleTable:
    """In the naming that knows most of `names`, the adapter's module paths; the family's usual one
    when none knows any. Raises Unsupported for a family that this version does not know."""
    tables = [ModuleTable(n, n.modules(), n.parameters()) for n in namings(decoder)]
    return max(tables, key=lambda table: _known(table, names))


def _known(table: ModuleTable, names: Collection[str]) -> int:
    containers = {p.rpartition(".")[0] for p in table.parameters}
    known = table.modules.keys() | containers | table.unadaptable
    return sum(n.removesuffix(_WRAPPED) in known for n in names)
