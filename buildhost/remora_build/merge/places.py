"""Where a module of the model in memory lies in the checkpoint. Pure: names and shapes only.

Most checkpoints name tensors as the model does. What differs is listed here as data: the prefixes
of multimodal and of headless checkpoints, Mixtral's block_sparse_moe, and experts that transformers
stacks in memory (`experts.gate_up_proj` [e, 2·i, h], `experts.down_proj` [e, h, i]) and stores one
by one. One dialect holds for a whole adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from remora_contract.errors import CheckpointInvalid

Shape = tuple[int, ...]

_EXPERT = re.compile(
    r"(?P<stack>.+\.experts)\.(?P<index>0|[1-9]\d{0,4})\.(?P<projection>\w+)\.weight"
)
# The parts of a stacked parameter, in the order transformers concatenates their rows.
_STACKED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
STACKED_ORDER = tuple(_STACKED)  # as the module registers them


@dataclass(frozen=True)
class Dialect:
    """(prefix in the model, prefix in the checkpoint), the first that fits; then infixes alike."""

    prefixes: tuple[tuple[str, str], ...]
    infix: tuple[str, str] = ("", "")

    def stored(self, path: str) -> str | None:
        """The model's path as the checkpoint spells it."""
        return _spelled(path, self.prefixes, self.infix)

    def in_model(self, path: str) -> str | None:
        """Inverse of `stored`; None for what the model in memory does not have."""
        return _spelled(path, [(b, a) for a, b in self.prefixes], self.infix[::-1])


_PREFIXES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("", ""),),
    # A multimodal model, saved in the older order of names, and the other way round.
    (
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
        ("model.", ""),
    ),
    (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("", "model."),
    ),
    # An adapter of the text model, on the multimodal checkpoint; and the other way round.
    (("model.", "language_model.model."), ("lm_head", "language_model.lm_head")),
    (("model.", "model.language_model."), ("lm_head", "lm_head")),
    (("model.language_model.", "model."), ("lm_head", "lm_head")),
    (("language_model.model.", "model."), ("language_model.lm_head", "lm_head")),
    # A checkpoint saved without its head.
    (("lm_head", "lm_head"), ("model.", "")),
    (("lm_head", "lm_head"), ("transformer.", "")),
)
_INFIXES = (("", ""), (".mlp.", ".block_sparse_moe."))
DIALECTS = tuple(Dialect(p, i) for i in _INFIXES for p in _PREFIXES)


def _spelled(path: str, prefixes: Iterable[tuple[str, str]], infix: tuple[str, str]) -> str | None:
    for old, new in prefixes:
        if path.startswith(old):
            spelled = new + path[len(old) :]
            return spelled.replace(*infix) if infix[0] else spelled
    return None


@dataclass(frozen=True)
class Stack:
    """Experts stored one by one: `tensors[e]` are expert e's parts, whose rows lie below each
    other in memory."""

    tensors: tuple[tuple[str, ...], ...]


class Places:
    """`shapes`: the checkpoint's tensors. Raises CheckpointInvalid for experts with holes."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self._stacks = _find_stacks(shapes)
        self._modules = {name.rpartition(".")[0] for name in shapes}
        self._modules |= {module for module, _ in self._stacks}

    def knows(self, module: str, dialect: Dialect) -> bool:
        """Has the module parameters of its own in the checkpoint?"""
        return dialect.stored(module) in self._modules

    def tensor(self, module: str, parameter: str, dialect: Dialect) -> str | None:
        """The checkpoint's name of a parameter that it stores as the model holds it."""
        stored = dialect.stored(module)
        name = None if stored is None else f"{stored}.{parameter}"
        return name if name in self.shapes else None

    def stack(self, module: str, parameter: str, dialect: Dialect) -> Stack | None:
        """A stacked parameter that the checkpoint stores expert by expert."""
        stored = dialect.stored(module)
        return None if stored is None else self._stacks.get((stored, parameter))

    def parameters(self, dialect: Dialect) -> Iterator[tuple[str, Shape]]:
        """(path, shape) of every parameter of the model in memory; experts have no shape here."""
        stacks = ((f"{module}.{parameter}", ()) for module, parameter in self._stacks)
        for stored, shape in (*self.shapes.items(), *stacks):
            path = dialect.in_model(stored)
            if path is not None:
                yield path, shape


def is_single_expert(path: str) -> bool:
    """Does a parameter belong to one expert of many? Whether the model in memory has such
    parameters, or only their stacks, depends on the version of transformers."""
    return _EXPERT.fullmatch(path) is not None


def _find_stacks(names: Iterable[str]) -> dict[tuple[str, str], Stack]:
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = _EXPERT.fullmatch(name)
        if match is not None:
            experts = found.setdefault(match["stack"], {})
            experts.setdefault(int(match["index"]), set()).add(match["projection"])
    stacks = {}
    for module, experts in found.items():
        for parameter, spellings in _STACKED.items():
            parts = next((s for s in spellings if set(s) <= experts.get(0, set())), None)
            if parts is not None:
                stacks[module, parameter] = _stack(module, experts, parts)
    return stacks


def _stack(module: str, experts: Mapping[int, set[str]], parts: tuple[str, ...]) -> Stack:
    for index in range(len(experts)):
        if not set(parts) <= experts.get(index, set()):
            raise CheckpointInvalid(f"the checkpoint lacks {module}.{index}.{parts[0]}.weight")
    return Stack(
        tuple(
            tuple(f"{module}.{index}.{part}.weight" for part in parts)
            for index in range(len(experts))
        )
    )
