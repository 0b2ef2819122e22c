"""Whether an adapter's tensors have the shapes that this base and the config need. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from remora_build.adapters.bound import Binding, Bound
from remora_build.adapters.settings import LoraSettings
from remora_build.adapters.tensor_names import Part
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid

Shape = tuple[int, ...]


def check_shapes(
    bound: Bound, shapes: Mapping[str, Shape], decoder: DecoderSpec, settings: LoraSettings
) -> None:
    """Raises AdapterInvalid naming the first tensor that does not fit."""
    for binding in bound.factors:
        for part, need in expected(binding, decoder).items():
            _check(binding.tensors[part], shapes, need, part, binding, settings)
    for module, tensor in bound.biases.items():
        rows = max(p.end for p in bound.table.modules[module])
        _check_plain(tensor, shapes, (rows,), settings)
    for tensor in bound.norm_biases.values():
        _check_plain(tensor, shapes, (decoder.hidden,), settings)
    for tensor in bound.repeated.values():
        _check_plain(tensor, shapes, (decoder.vocab, decoder.hidden), settings)
    for rows_ in bound.tokens:
        _check_plain(rows_.tensor, shapes, (len(rows_.tokens), decoder.hidden), settings)


def expected(binding: Binding, decoder: DecoderSpec) -> dict[Part, Shape]:
    """The shape of each of its tensors."""
    projection, r = binding.place.parts[0].target.projection, binding.rank
    n, k = binding.place.rows, decoder.in_features(projection)
    if binding.place.layout == "embedding":
        shapes: dict[Part, Shape] = {
            "embedding_A": (r, decoder.vocab),
            "embedding_B": (decoder.hidden, r),
            "magnitude": (decoder.hidden,),
        }
    else:
        if binding.place.layout == "experts":
            r *= decoder.copies(projection)
        shapes = {"A": (r, k), "B": (n, r), "B.bias": (n,), "magnitude": (n,)}
    return {part: shape for part, shape in shapes.items() if part in binding.tensors}


def trained_on(settings: LoraSettings) -> str:
    """Completes "…: <this>" in the error of a shape that is another base's."""
    said = f" (its config says {settings.base_name!r})" if settings.base_name else ""
    return f"it was trained on another base{said}; give the bundle of that base with --base"


def _check(
    name: str,
    shapes: Mapping[str, Shape],
    need: Shape,
    part: Part,
    binding: Binding,
    settings: LoraSettings,
) -> None:
    have = shapes[name]
    rank_axis = {"A": 0, "embedding_A": 0, "B": 1, "embedding_B": 1}.get(part)
    if rank_axis is not None and len(have) == 2 and have != need:
        other = 1 - rank_axis
        copies = need[rank_axis] // binding.rank
        if have[other] == need[other] and have[rank_axis] % copies == 0:
            raise AdapterInvalid(
                f"{name} has rank {have[rank_axis] // copies}, the config says {binding.rank} "
                "(r and rank_pattern)"
            )
    _check_plain(name, shapes, need, settings)


def _check_plain(
    name: str, shapes: Mapping[str, Shape], need: Shape, settings: LoraSettings
) -> None:
    if shapes[name] != need:
        raise AdapterInvalid(
            f"{name} is {list(shapes[name])}, this base needs {list(need)}: {trained_on(settings)}"
        )
