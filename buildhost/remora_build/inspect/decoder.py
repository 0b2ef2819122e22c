"""Explains a decoder's shape: the plain numbers, then whatever sets it apart from the plain one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from remora_build.inspect.render import ranges
from remora_contract.decoder import DecoderSpec, RopeSpec

Fact = tuple[str, str]

_BLOCKS = {
    "pre": "before each block",
    "post": "behind each block",
    "sandwich": "before and behind each block",
    "parallel": "one for both blocks of a layer",
}
_QK_NORMS = {
    "head": "queries and keys by head",
    "full": "queries and keys at full width",
    "heads": "queries and keys by head, a weight for each",
}


def decoder_facts(decoder: DecoderSpec) -> Iterator[Fact]:
    yield (
        "decoder",
        f"{decoder.family}, {decoder.layers} layers, hidden {decoder.hidden}, "
        f"intermediate {decoder.intermediate}, {decoder.activation}",
    )
    if decoder.experts is not None:
        yield "experts", _experts(decoder)
    yield "attention", _attention(decoder)
    yield from _windows(decoder)
    yield "vocabulary", f"{decoder.vocab}, {'tied' if decoder.tied_embeddings else 'not tied'}"
    yield from _ropes(decoder)
    yield "norms", _norms(decoder)
    if scales := _scales(decoder):
        yield "scales", scales


def _experts(decoder: DecoderSpec) -> str:
    experts = decoder.experts
    if experts is None:
        return "none"
    mixing = [layer for layer in range(decoder.layers) if decoder.kind(layer).experts]
    shared = f", and a shared one of {experts.shared_intermediate}"
    return (
        f"{experts.count} of width {experts.intermediate}, {experts.active} for a token"
        f"{shared if experts.shared_intermediate else ''}; in layers {ranges(mixing)}"
    )


def _attention(decoder: DecoderSpec) -> str:
    text = f"{decoder.heads} heads, {decoder.kv_heads} for keys, {decoder.head_dim} each"
    if decoder.attention_softcap is not None:
        text += f", scores capped at {decoder.attention_softcap:g}"
    if decoder.query_scale is not None:
        text += f", queries grow beyond position {decoder.query_scale.original_context}"
    return text


def _windows(decoder: DecoderSpec) -> Iterator[Fact]:
    found: defaultdict[int, list[int]] = defaultdict(list)
    for layer in range(decoder.layers):
        window = decoder.kind(layer).window
        if window is not None:
            found[window].append(layer)
    for window, layers in found.items():
        yield "window", f"{window} tokens in layers {ranges(layers)}"


def _ropes(decoder: DecoderSpec) -> Iterator[Fact]:
    layers: defaultdict[str, list[int]] = defaultdict(list)
    for layer in range(decoder.layers):
        layers[decoder.kind(layer).rope].append(layer)
    yield "rope", _rope(decoder.rope, decoder.head_dim)
    if decoder.local_rope is not None:
        where = ranges(layers["local"])
        yield "local rope", f"{_rope(decoder.local_rope, decoder.head_dim)}; in layers {where}"
    if layers["none"]:
        yield "no rope", f"in layers {ranges(layers['none'])}"


def _rope(rope: RopeSpec, head_dim: int) -> str:
    text = f"theta {rope.theta:g}, scaling {rope.scaling}"
    if rope.factor is not None:
        text += f" by {rope.factor:g}"
    if rope.original_context is not None:
        text += f" from {rope.original_context} tokens"
    if rope.dims is not None:
        text += f", {rope.dims} of {head_dim} dimensions"
    return f"{text}, interleaved" if rope.interleaved else text


def _norms(decoder: DecoderSpec) -> str:
    text = f"{decoder.norm}, {_BLOCKS[decoder.block]}"
    if decoder.qk_norm != "none":
        text += f"; {_QK_NORMS[decoder.qk_norm]}"
    return text


def _scales(decoder: DecoderSpec) -> str:
    numbers = {
        "embedding": decoder.embedding_scale,
        "scores": decoder.attention_scale,
        "residuals": decoder.residual_scale,
        "logits": decoder.logit_scale,
        "logits' cap": decoder.logit_softcap,
    }
    plain = (None, 1.0)
    return ", ".join(f"{name} {n:g}" for name, n in numbers.items() if n not in plain)
