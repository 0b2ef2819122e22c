"""TensorRT-LLM's LoRA modules by number: name, how tensor parallelism cuts them, what they adapt.

For a module with weight [n, k] a row stores in [r, k] (LoRA's A) and out [n, r] (B, scaled):

    column   the engine cuts n: every rank keeps `in` whole and its n / N rows of `out`
    row      the engine cuts k: every rank keeps its k / N columns of `in` and `out` whole
    none     nothing is cut: every rank keeps both

A fused module is cut inside each of its parts, as the engine's own weights are. Owns the table and
the shapes it gives for one decoder; knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from remora_build.adapters.formats.registry import GateUpOrder
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import Projection

Cut = Literal["column", "row", "none"]


@dataclass(frozen=True)
class Module:
    """`parts`: the decoder's projections whose out rows lie in it, in order; empty when it is not
    one of a dense decoder's, and then `why` completes "it is ..."."""

    id: int
    name: str
    cut: Cut
    parts: tuple[Projection, ...] = ()
    why: str = ""


_CROSS = "of cross-attention, which a decoder-only model does not have"
_EXPERTS = "of a mixture of experts, which is carried from PEFT adapters only"

MODULES: tuple[Module, ...] = (
    Module(0, "attn_qkv", "column", ("q", "k", "v")),
    Module(1, "attn_q", "column", ("q",)),
    Module(2, "attn_k", "column", ("k",)),
    Module(3, "attn_v", "column", ("v",)),
    Module(4, "attn_dense", "row", ("o",)),
    Module(5, "mlp_h_to_4h", "column", ("gate",)),  # SiLU's side: gate_proj of Hugging Face
    Module(6, "mlp_4h_to_h", "row", ("down",)),
    Module(7, "mlp_gate", "column", ("up",)),  # what SiLU's side is multiplied with: up_proj
    Module(8, "cross_attn_qkv", "column", why=_CROSS),
    Module(9, "cross_attn_q", "column", why=_CROSS),
    Module(10, "cross_attn_k", "column", why=_CROSS),
    Module(11, "cross_attn_v", "column", why=_CROSS),
    Module(12, "cross_attn_dense", "row", why=_CROSS),
    Module(13, "moe_h_to_4h", "column", why=_EXPERTS),
    Module(14, "moe_4h_to_h", "row", why=_EXPERTS),
    Module(15, "moe_gate", "column", why=_EXPERTS),
    Module(16, "moe_router", "none", why=_EXPERTS),
    Module(17, "mlp_router", "none", why="a router beside the MLP, which no supported model has"),
    Module(18, "mlp_gate_up", "column", ("up", "gate")),  # the order depends: see `parts_of`
)
BY_ID: Mapping[int, Module] = {m.id: m for m in MODULES}
MODULE_OF: Mapping[Projection, Module] = {m.parts[0]: m for m in MODULES if len(m.parts) == 1}
GATE_UP = BY_ID[18]


@dataclass(frozen=True)
class Shape:
    """Of one module's factors: in [r, k], out [sum(parts), r]. `units`: what each cut dimension
    consists of and must not be divided, heads or features; one number for each part of a column
    cut, one number for a row cut's k."""

    k: int
    parts: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.parts)


def parts_of(module: Module, gate_up: GateUpOrder | None) -> tuple[Projection, ...]:
    """The projections in the order of out's rows. The two halves of mlp_gate_up lie as
    `swap_gate_up_proj_lora_b_weight` had it when the file was made, so it must be said."""
    if module is GATE_UP and gate_up == "gate-up":
        return ("gate", "up")
    return module.parts


def shape_of(module: Module, decoder: DecoderSpec, gate_up: GateUpOrder | None) -> Shape:
    """For a module that has parts."""
    parts = parts_of(module, gate_up)
    k = decoder.in_features(parts[0])
    if module.cut == "row":
        units: tuple[int, ...] = (decoder.heads if parts[0] == "o" else k,)
    else:
        units = tuple(_units(p, decoder) for p in parts)
    return Shape(k, tuple(map(decoder.out_features, parts)), units)


def local_shape(module: Module, shape: Shape, tp_size: int) -> Shape:
    """Of what one rank keeps. Raises AdapterInvalid as `check_cut`."""
    check_cut(module, shape, tp_size)
    if module.cut == "none":
        return shape
    units = tuple(u // tp_size for u in shape.units)
    if module.cut == "row":
        return Shape(shape.k // tp_size, shape.parts, units)
    return Shape(shape.k, tuple(n // tp_size for n in shape.parts), units)


def check_cut(module: Module, shape: Shape, tp_size: int) -> None:
    """Raises AdapterInvalid when `tp_size` ranks cannot share what the module consists of."""
    if module.cut != "none" and any(units % tp_size for units in shape.units):
        worst = next(units for units in shape.units if units % tp_size)
        raise AdapterInvalid(
            f"{module.name} consists of {worst} heads or features, which {tp_size} ranks cannot "
            "share evenly"
        )


def _units(projection: Projection, decoder: DecoderSpec) -> int:
    if projection == "q":
        return decoder.heads
    return decoder.kv_heads if projection in ("k", "v") else decoder.out_features(projection)
