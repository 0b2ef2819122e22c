"""One adapter's tensors -> changes of the checkpoint's tensors, or an error that names one.

Owns the rules that every tensor is used exactly once and that everything the config adapts or
trains has its tensors. Pure: names, shapes and settings, decided before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from remora_build.adapters.matching import selects_parameter
from remora_build.merge.changes import Change, Replacement, TokenRows, together
from remora_build.merge.factors import Bound, Source, bind_factors
from remora_build.merge.layouts import Base
from remora_build.merge.names import AdapterTensors, Whole, sort_tensors
from remora_build.merge.places import DIALECTS, Dialect, Shape, is_single_expert
from remora_build.merge.selection import (
    HEADS,
    is_embedding_or_head,
    last_part,
    saved_as_whole,
    selects_module,
    token_rows,
    trains,
)
from remora_contract.errors import AdapterInvalid, Unsupported


def bind(source: Source, base: Base, *, tied: bool) -> dict[str, Change]:
    """Checkpoint tensor -> change. `tied`: whether head and embedding are one tensor.

    Raises AdapterInvalid or Unsupported, naming the tensor.
    """
    tensors = sort_tensors(source.shapes, source.settings.training_tensors)
    dialect = _dialect(tensors, base)
    bound = [b for f in tensors.factors for b in bind_factors(f, source, base, dialect)]
    bound += [_bind_whole(whole, source, base, dialect) for whole in tensors.wholes]
    bound += [_bind_tokens(m, t, source, base, dialect) for m, t in tensors.tokens.items()]
    _check_complete(source, base, dialect, {b.path for b in bound})
    _check_tokens(source, tensors.tokens, tied=tied)
    _check_weight(source, bound)
    return _gathered(bound)


def _dialect(tensors: AdapterTensors, base: Base) -> Dialect:
    """The way of spelling in which the checkpoint knows every module of the adapter."""
    modules = [
        *((f.module, next(iter(f.parts.values()))) for f in tensors.factors),
        *((w.module, w.tensor) for w in tensors.wholes),
        *tensors.tokens.items(),
    ]
    if not modules:
        raise AdapterInvalid("the adapter has no tensors: was it saved sharded or incompletely?")
    for dialect in DIALECTS:
        if all(base.places.knows(module, dialect) for module, _ in modules):
            return dialect
    plain = DIALECTS[0]
    module, tensor = next(pair for pair in modules if not base.places.knows(pair[0], plain))
    raise AdapterInvalid(
        f"tensor {tensor}: the checkpoint has no {module}; the adapter was trained on another base"
    )


def _bind_whole(whole: Whole, source: Source, base: Base, dialect: Dialect) -> Bound:
    place = base.places.tensor(whole.module, whole.parameter, dialect)
    path = f"{whole.module}.{whole.parameter}"
    if place is None:
        raise AdapterInvalid(f"tensor {whole.tensor}: the checkpoint has no {path}")
    trained = _trained(whole, source)
    _check_whole_shape(whole, source.shapes[whole.tensor], base.places.shapes[place])
    return Bound(path, place, Change(base=Replacement(source.index, whole.tensor, trained)))


def _trained(whole: Whole, source: Source) -> bool:
    """False for the copy of a base weight that PEFT saves with save_embedding_layers."""
    settings, embedding = source.settings, is_embedding_or_head(whole.module)
    if whole.parameter == "bias" and settings.lora.bias != "none":
        return True
    if not whole.of_base and saved_as_whole(settings, whole.module):
        return True
    if whole.of_base and (embedding or selects_module(settings, whole.module)):
        return False
    if embedding:
        return settings.lora.weight_tying and last_part(whole.module) in HEADS
    raise AdapterInvalid(
        f"tensor {whole.tensor}: {settings.where} trains it neither as a bias (bias) nor as "
        "a whole (modules_to_save); PEFT would ignore it"
    )


def _check_whole_shape(whole: Whole, have: Shape, need: Shape) -> None:
    if have == need:
        return
    if is_embedding_or_head(whole.module) and have[1:] == need[1:]:
        raise Unsupported(
            f"{whole.tensor} has {have[0]} rows, the checkpoint's vocabulary {need[0]}: load the "
            f"checkpoint in transformers, resize_token_embeddings({have[0]}), save_pretrained it "
            "with the adapter's tokenizer and merge into that"
        )
    raise AdapterInvalid(
        f"{whole.tensor} is {list(have)}, the checkpoint's is {list(need)}: the adapter was "
        "trained on another base"
    )


def _bind_tokens(module: str, tensor: str, source: Source, base: Base, dialect: Dialect) -> Bound:
    indices = token_rows(source.settings, module)
    place = base.places.tensor(module, "weight", dialect)
    if indices is None or place is None:
        raise AdapterInvalid(
            f"tensor {tensor}: trainable_token_indices of {source.settings.where} names no "
            "rows for it"
        )
    if len(set(indices)) != len(indices):
        raise AdapterInvalid(f"{source.settings.where}: trainable_token_indices repeats a token")
    shape, have = base.places.shapes[place], source.shapes[tensor]
    if len(shape) != 2 or have != (len(indices), shape[1]):
        raise AdapterInvalid(
            f"{tensor} is {list(have)}, {len(indices)} rows of {list(shape)} are needed"
        )
    if max(indices, default=0) >= shape[0]:
        raise AdapterInvalid(f"{tensor}: token {max(indices)} is none of {shape[0]} of {place}")
    rows = TokenRows(source.index, tensor, indices)
    return Bound(f"{module}.weight", place, Change(rows=(rows,)))


def _check_complete(source: Source, base: Base, dialect: Dialect, bound: set[str]) -> None:
    expected = list(_expected(source, base, dialect))
    missing = [path for path in expected if path not in bound]
    # Where transformers stacks the experts in memory, a name that other modules have too selects
    # only those. The tensors tell; a name that only experts have must have some.
    if not any(is_single_expert(path) for path in bound):
        elsewhere = {_name(path) for path in expected if not is_single_expert(path)}
        missing = [p for p in missing if not is_single_expert(p) or _name(p) not in elsewhere]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise AdapterInvalid(
            f"{source.settings.where} adapts what has no tensors in the adapter: "
            f"{', '.join(missing[:4])}{more}"
        )


def _check_tokens(source: Source, modules: Iterable[str], *, tied: bool) -> None:
    """Every module whose tokens the config trains has rows. A tied head that trains the embedding's
    tokens has none of its own: PEFT lets it follow."""
    settings = source.settings
    saved = {rows for rows in (token_rows(settings, m) for m in modules) if rows is not None}
    named = {name for name, _ in settings.lora.tokens if any(trains(name, m) for m in modules)}
    for name, rows in settings.lora.tokens:
        if name not in named and not (tied and rows in saved):
            raise AdapterInvalid(
                f"{settings.where}: trainable_token_indices trains tokens of "
                f"{name or 'the embedding'}, and the adapter has no trainable_tokens_delta for "
                "it: PEFT would answer with the base's; if that is meant, take the field out"
            )


def _name(path: str) -> str:
    """Of the module that has the parameter."""
    return last_part(path.rpartition(".")[0])


def _expected(source: Source, base: Base, dialect: Dialect) -> Iterator[str]:
    """Paths of the parameters that the config adapts or trains."""
    settings = source.settings
    for path, shape in base.places.parameters(dialect):
        module, _, parameter = path.rpartition(".")
        adapted = selects_module(settings, module)
        if (
            (parameter == "weight" and len(shape) == 2 and adapted)
            or (parameter == "bias" and settings.lora.bias == "all")
            or (parameter == "bias" and settings.lora.bias == "lora_only" and adapted)
            or saved_as_whole(settings, module)
            or selects_parameter(settings.lora, path)
        ):
            yield path


def _check_weight(source: Source, bound: Iterable[Bound]) -> None:
    """Raises Unsupported when a weight is asked of what has none."""
    for b in bound:
        change = b.change
        whole = (change.base is not None and change.base.trained) or change.rows
        if source.weight != 1 and (whole or change.magnitude):
            kind = "trained as a whole" if whole else "DoRA"
            raise Unsupported(
                f"--weights {source.weight:g}: {b.path} is {kind}, so it has no part that a weight "
                "could scale; merge this adapter with weight 1"
            )


def _gathered(bound: Iterable[Bound]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for b in bound:
        first = changes.get(b.tensor, Change())
        whole = first.base is not None or first.rows
        if (b.change.base or b.change.rows) and whole:
            raise AdapterInvalid(f"{b.path} is trained twice as a whole")
        changes[b.tensor] = together(first, b.change)
    for tensor, change in changes.items():
        trained = change.base is not None and change.base.trained
        if change.products and (trained or change.rows):
            raise AdapterInvalid(f"{tensor} is both adapted and trained as a whole")
    return changes
