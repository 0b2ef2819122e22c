"""Which module of the checkpoint a linear layer was, told by the names that an exporter left.

Three witnesses: the module scope that torch.onnx's dynamo exporter records, the name of the
weight's initializer, the path of the node. Where two speak they must agree.
Pure. What no name tells is `structure`'s business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from remora_build.insert.patterns import Linear
from remora_build.insert.shown import shown
from remora_build.insert.view import GraphView
from remora_contract.decoder import MAX_LAYERS
from remora_contract.errors import InvalidInput, Refused, RemoraError
from remora_contract.targets import Projection

Parts = tuple[Projection, ...]

# A layer's modules by the last word of their path. Fused ones hold their parts side by side.
_LEAVES: dict[str, Parts] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "qkv_proj": ("q", "k", "v"),
    "qkv_proj_fused": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    "gate_up_proj_fused": ("gate", "up"),
    "wq": ("q",),
    "wk": ("k",),
    "wv": ("v",),
    "wo": ("o",),
}
# Meta's names for the MLP mean something else elsewhere: only below feed_forward.
_META_MLP: dict[str, Parts] = {"w1": ("gate",), "w3": ("up",), "w2": ("down",)}
# Below these the same words name other modules.
_ELSEWHERE = ("experts", "expert", "shared_expert", "shared_experts", "router", "cross_attn")
_HEADS = ("lm_head", "embed_out")

_LAYER = re.compile(
    r"(?:(?P<stack>.*?)\.)?(?:layers|blocks|h)\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)"
)
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True)
class Module:
    """`parts` is empty for a module that is known and not one of a layer's seven projections.
    `stack` tells decoders from encoders in one model: `model`, `vision_tower.encoder`."""

    path: str
    layer: int | None = None
    parts: Parts = ()
    stack: str = ""


def parse_module(path: str) -> Module | None:
    """A module, tensor or node path, with dots or slashes; None when it names no module."""
    words = [w for w in re.split(r"[./]", path.replace("::", ".")) if w]
    if any(w.startswith("lora_") for w in words):
        raise Refused(
            f"{shown(path)} belongs to an adapter: the model carries one already; "
            "merge it into the weights, or export the model without it"
        )
    match = _LAYER.fullmatch(".".join(words))
    if match is None:
        known = any(w in _HEADS for w in words) or (len(words) > 1 and "model" in words)
        return Module(".".join(words)) if known else None
    layer = int(match["layer"])
    if layer >= MAX_LAYERS:
        raise InvalidInput(f"{shown(path)} would be layer {layer}; {MAX_LAYERS} are allowed")
    rest = match["rest"].split(".")
    leaf = next((i for i, w in enumerate(rest) if w in _LEAVES or _is_meta(rest, i)), None)
    if leaf is None or any(w in _ELSEWHERE for w in rest[:leaf]):
        return Module(".".join(words), layer, (), match["stack"] or "")
    parts = _LEAVES.get(rest[leaf]) or _META_MLP[rest[leaf]]
    stem = ".".join(words[: len(words) - len(rest) + leaf + 1])
    return Module(stem, layer, parts, match["stack"] or "")


def _is_meta(rest: Sequence[str], i: int) -> bool:
    return rest[i] in _META_MLP and "feed_forward" in rest[:i]


@dataclass(frozen=True)
class Mapped:
    """Linear layers by node number, as far as they are known, and why some are not."""

    modules: dict[int, Module]
    problems: tuple[RemoraError, ...] = ()


def named_modules(view: GraphView, linears: Sequence[Linear]) -> Mapped:
    """What the names tell; witnesses that disagree are a problem. Raises Refused when the model
    carries adapters already."""
    shared = _shared_weights(view, linears)
    found: dict[int, Module] = {}
    problems: list[RemoraError] = []
    for linear in linears:
        node = view.nodes[linear.node]
        paths = [*_scope(node), *_weight(view, linear, shared), *_path(node)]
        modules = [m for m in map(parse_module, paths) if m is not None]
        telling = [m for m in modules if m.parts] or modules
        if len({(m.layer, m.parts) for m in telling}) > 1:
            problems.append(_contradiction(node, telling))
        elif telling:
            found[linear.node] = telling[0]
    return Mapped(found, tuple(problems))


def _shared_weights(view: GraphView, linears: Iterable[Linear]) -> frozenset[str]:
    """Main initializers of more than one linear layer: exporters keep equal tensors once, under
    the name of the first."""
    count = Counter(_main_leaf(view, linear) for linear in linears)
    return frozenset(name for name, uses in count.items() if name and uses > 1)


def _main_leaf(view: GraphView, linear: Linear) -> str:
    """The initializer with most elements that the weight is made of: the others are scales."""
    return (*view.constant_leaves(linear.weight), "")[0]


def _scope(node: Any) -> Iterator[str]:
    """The innermost module of "['', 'model.layers.0.mlp', 'model.layers.0.mlp.down_proj', ..]"."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    scopes = [s for s in _QUOTED.findall(text) if "." in s or s in _HEADS]
    yield from scopes[-1:]


def _weight(view: GraphView, linear: Linear, shared: frozenset[str]) -> Iterator[str]:
    name = _main_leaf(view, linear)
    if "." in name and name not in shared:
        yield name


def _path(node: Any) -> Iterator[str]:
    if "/" in node.name or "." in node.name:
        yield node.name


def _contradiction(node: Any, modules: Sequence[Module]) -> InvalidInput:
    said = " and ".join(dict.fromkeys(shown(m.path) for m in modules))
    return InvalidInput(
        f"node {shown(node.name)} is {said} by its names: write the attach points down with "
        "--write-attach, correct them and give them back with --attach"
    )
