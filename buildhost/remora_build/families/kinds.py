"""In what a decoder's layers differ: which slide, which have no rope, which have experts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from remora_build.families.fields import ConfigFields
from remora_contract.decoder import MAX_LAYERS, MAX_POSITION, LayerKind

SLIDING, FULL = "sliding_attention", "full_attention"


def plain_if_all_plain(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The one way to say that no layer differs is to say nothing."""
    return () if all(kind == LayerKind() for kind in kinds) else tuple(kinds)


def read_window(fields: ConfigFields) -> int | None:
    """`sliding_window`; None for a model without one."""
    window = fields.take("sliding_window")
    return None if window is None else fields.check_whole("sliding_window", window, MAX_POSITION)


def every_layer(window: int | None, layers: int) -> tuple[LayerKind, ...]:
    return plain_if_all_plain([LayerKind(window)] * layers)


def read_sliding(
    fields: ConfigFields, layers: int, otherwise: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Which layers slide: what `layer_types` says, or `otherwise(layer)` if there is none.

    Raises CheckpointInvalid for a list of another length, Unsupported for other kinds of attention.
    """
    types = fields.take("layer_types")
    if types is None:
        return tuple(otherwise(layer) for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise fields.invalid("layer_types", f"a list of {layers}", types)
    for kind in types:
        if kind not in (SLIDING, FULL):
            raise fields.unsupported("layer_types", kind, f"carried are {SLIDING} and {FULL}")
    return tuple(kind == SLIDING for kind in types)


def read_windows(
    fields: ConfigFields, layers: int, otherwise: Callable[[int], bool], window: int | None
) -> tuple[int | None, ...]:
    """The window of each layer, None for full attention. Without `layer_types` and without a window
    no layer slides."""
    sliding = read_sliding(fields, layers, lambda layer: window is not None and otherwise(layer))
    if any(sliding) and window is None:
        need = "given, since layer_types says that layers slide"
        raise fields.invalid("sliding_window", need, None)
    return tuple(window if slides else None for slides in sliding)


def drop_plain_layer_types(fields: ConfigFields) -> None:
    """Takes a `layer_types` that says of every layer what it is anyway in a family without any."""
    types = fields.left().get("layer_types")
    if isinstance(types, list) and set(map(str, types)) <= {FULL}:
        fields.ignore("layer_types")


def read_switched_window(fields: ConfigFields) -> int | None:
    """`sliding_window` where `use_sliding_window` switches it on, as in Qwen's configs."""
    if fields.flag("use_sliding_window"):
        return read_window(fields)
    fields.ignore("sliding_window")  # stays in the file where it is off, even as 0
    return None


def read_window_layers(fields: ConfigFields, default: int) -> int:
    """`max_window_layers`, from 0; on which side of it layers slide is the family's."""
    count = fields.take("max_window_layers", default)
    if type(count) is not int or not 0 <= count <= MAX_LAYERS:
        raise fields.invalid("max_window_layers", f"a whole number up to {MAX_LAYERS}", count)
    return count
