"""What a checkpoint calls the decoder's tensors, and PEFT its modules. Pure.

`Words` is a family's vocabulary inside one decoder layer, `Place` where a checkpoint keeps the
decoder (a multimodal model nests it), `Naming` both applied to one decoder. A projection may be
some rows of a fused tensor: projections whose word is the same lie in it one below the other, in
the order of `targets.PARTS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from remora_build.families.shape import Norm, has_bias, has_norm_bias, layer_norms
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import (
    PARTS,
    PROJECTIONS,
    AdapterTarget,
    Group,
    Projection,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """Module paths inside a decoder layer. In an expert's path `{expert}` stands for its number; a
    path without it is one parameter [experts, n, k] for all. In a norm's path `{head}` stands for a
    head's number."""

    projections: Mapping[Projection, str]
    norms: Mapping[Norm, str]
    router: str = ""
    shared_gate: str = ""

    def but(
        self,
        projections: Mapping[Projection, str] = MappingProxyType({}),
        norms: Mapping[Norm, str] = MappingProxyType({}),
        *,
        router: str | None = None,
        shared_gate: str | None = None,
    ) -> Words:
        """The same with some words of its own."""
        return Words(
            projections={**self.projections, **projections},
            norms={**self.norms, **norms},
            router=self.router if router is None else router,
            shared_gate=self.shared_gate if shared_gate is None else shared_gate,
        )


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint the decoder lies: the prefix of its modules, and its head."""

    prefix: str = "model."
    head: str = "lm_head"


# Inside a multimodal model, as transformers 5 and 4 name it.
NESTED_PLACES = (
    Place("model.language_model."),
    Place("language_model.model.", "language_model.lm_head"),
)
# As a model of its own, there, and saved as a model without a head (Qwen3-Embedding).
PLACES = (Place(), *NESTED_PLACES, Place(""))


@dataclass(frozen=True)
class Source:
    """Rows `begin` to `end` of a tensor [n, k] or [n]; of matrix `expert` of a stack [E, n, k]."""

    tensor: str
    begin: int
    end: int
    expert: int | None = None


@dataclass(frozen=True)
class ModulePart:
    """The projection that rows `begin` to `end` of a module's weight [n, k] are. `expert`: whose;
    None for a projection without experts and for a stack of all of them."""

    target: AdapterTarget
    begin: int
    end: int
    expert: int | None = None


@dataclass(frozen=True)
class Naming:
    """The names of one decoder's tensors and modules."""

    spec: DecoderSpec
    words: Words
    place: Place = field(default_factory=Place)

    @property
    def embedding(self) -> str:
        """[vocab, hidden]"""
        return f"{self.place.prefix}embed_tokens.weight"

    @property
    def head(self) -> str:
        """[vocab, hidden]; absent from a checkpoint that ties it to the embedding."""
        return f"{self.place.head}.weight"

    def module(self, layer: int, word: str) -> str:
        """`model.layers.3.self_attn.q_proj`"""
        return f"{self.place.prefix}layers.{layer}.{word}"

    def is_stacked(self, projection: Projection) -> bool:
        """Whether one parameter [E, n, k] holds this projection of all experts."""
        word = self.words.projections[projection]
        return projection.startswith("expert_") and "{expert}" not in word

    def weight(self, layer: int, projection: Projection, expert: int | None = None) -> Source:
        """Where the projection's weight [n, k] lies (an expert's one: give which)."""
        begin, end = self.rows(projection)
        word = self.words.projections[projection]
        if self.is_stacked(projection):
            return Source(self.module(layer, word), begin, end, expert)
        return Source(f"{self.module(layer, word.format(expert=expert))}.weight", begin, end)

    def bias(self, layer: int, projection: Projection) -> Source:
        """Where the projection's bias [n] lies."""
        word = self.words.projections[projection]
        return Source(f"{self.module(layer, word)}.bias", *self.rows(projection))

    def rows(self, projection: Projection) -> tuple[int, int]:
        """First and last + 1 of the rows that the projection takes of its tensor."""
        begin = 0
        for part in self._fused(projection):
            end = begin + self.spec.out_features(part)
            if part == projection:
                return begin, end
            begin = end
        raise KeyError(projection)

    def fused_rows(self, projection: Projection) -> int:
        """n of the tensor in which the projection lies."""
        return sum(self.spec.out_features(p) for p in self._fused(projection))

    def weights(self, layer: int, group: Group, expert: int | None = None) -> tuple[Source, ...]:
        """What the packed group's weight is made of, in packed order; a fused tensor once."""
        return _joined([self.weight(layer, p, expert) for p in PARTS[group]])

    def biases(self, layer: int, group: Group) -> tuple[Source, ...]:
        return _joined([self.bias(layer, p) for p in PARTS[group]])

    def norm(self, layer: int, norm: Norm) -> tuple[str, ...]:
        """The norm's weight, in one tensor for each head if the family keeps them apart."""
        word = self.words.norms[norm]
        heads = self.spec.heads if norm == "q_norm" else self.spec.kv_heads
        count = heads if "{head}" in word else 1
        return tuple(f"{self.module(layer, word.format(head=h))}.weight" for h in range(count))

    def norm_bias(self, layer: int, norm: Norm) -> str:
        return f"{self.module(layer, self.words.norms[norm])}.bias"

    @property
    def final_norm(self) -> str:
        return f"{self.place.prefix}norm.weight"

    @property
    def final_norm_bias(self) -> str:
        return f"{self.place.prefix}norm.bias"

    def router(self, layer: int) -> str:
        """[experts, hidden]"""
        return f"{self.module(layer, self.words.router)}.weight"

    def shared_gate(self, layer: int) -> str:
        """[1, hidden]"""
        return f"{self.module(layer, self.words.shared_gate)}.weight"

    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor that a checkpoint of this decoder holds."""
        spec = self.spec
        shapes: dict[str, Shape] = {self.embedding: (spec.vocab, spec.hidden)}
        for layer in range(spec.layers):
            shapes |= self._layer_tensors(layer)
        shapes[self.final_norm] = (spec.hidden,)
        if spec.norm_bias:
            shapes[self.final_norm_bias] = (spec.hidden,)
        if not spec.tied_embeddings:
            shapes[self.head] = (spec.vocab, spec.hidden)
        return shapes

    def modules(self) -> dict[str, tuple[ModulePart, ...]]:
        """Every linear module that the graph can adapt, by its path in the model, with the
        projections it holds; `embed_tokens` and the head too. Stacks of experts are no modules:
        see `parameters`."""
        found: dict[str, list[ModulePart]] = {}
        for layer in range(self.spec.layers):
            for projection in self.spec.projections(layer):
                if not self.is_stacked(projection):
                    for path, part in self._parts(layer, projection):
                        found.setdefault(path, []).append(part)
        embed, head = AdapterTarget(0, "embed"), AdapterTarget(0, "head")
        found[self.embedding.removesuffix(".weight")] = [ModulePart(embed, 0, self.spec.vocab)]
        found[self.place.head] = [ModulePart(head, 0, self.spec.vocab)]
        return {path: tuple(parts) for path, parts in found.items()}

    def parameters(self) -> dict[str, tuple[ModulePart, ...]]:
        """Every parameter [experts, n, k] by its path, with the projections it holds."""
        found: dict[str, list[ModulePart]] = {}
        for layer in range(self.spec.layers):
            for projection in self.spec.projections(layer):
                if self.is_stacked(projection):
                    path = self.module(layer, self.words.projections[projection])
                    target = AdapterTarget(layer, projection)
                    found.setdefault(path, []).append(ModulePart(target, *self.rows(projection)))
        return {path: tuple(parts) for path, parts in found.items()}

    def unadaptable(self) -> frozenset[str]:
        """Linear modules of the decoder for which the graph has no adapter input."""
        words = [w for w in (self.words.router, self.words.shared_gate) if w]
        layers = [i for i in range(self.spec.layers) if self.spec.kind(i).experts]
        return frozenset(self.module(layer, word) for layer in layers for word in words)

    def _parts(self, layer: int, projection: Projection) -> Iterator[tuple[str, ModulePart]]:
        word, target = self.words.projections[projection], AdapterTarget(layer, projection)
        if "{expert}" not in word:
            yield self.module(layer, word), ModulePart(target, *self.rows(projection))
            return
        for expert in range(self.spec.copies(projection)):
            part = ModulePart(target, *self.rows(projection), expert)
            yield self.module(layer, word.format(expert=expert)), part

    def _fused(self, projection: Projection) -> tuple[Projection, ...]:
        """The projections in this one's tensor, in its order."""
        word = self.words.projections[projection]
        group = AdapterTarget(0, projection).group
        return tuple(p for p in PARTS[group] if self.words.projections[p] == word)

    def _layer_tensors(self, layer: int) -> dict[str, Shape]:
        spec = self.spec
        shapes: dict[str, Shape] = {}
        for norm, shape in layer_norms(spec).items():
            names = self.norm(layer, norm)
            shapes |= dict.fromkeys(names, shape[-1:])
            if has_norm_bias(spec, norm):
                shapes[self.norm_bias(layer, norm)] = shape
        for projection in spec.projections(layer):
            shapes |= self._projection_tensors(layer, projection)
        if spec.kind(layer).experts and spec.experts is not None:
            shapes[self.router(layer)] = (spec.experts.count, spec.hidden)
            if spec.experts.shared_gate:
                shapes[self.shared_gate(layer)] = (1, spec.hidden)
        return shapes

    def _projection_tensors(self, layer: int, projection: Projection) -> dict[str, Shape]:
        n, k = self.fused_rows(projection), self.spec.in_features(projection)
        copies = self.spec.copies(projection)
        if self.is_stacked(projection):
            return {self.weight(layer, projection).tensor: (copies, n, k)}
        shapes: dict[str, Shape] = {
            self.weight(layer, projection, expert).tensor: (n, k) for expert in range(copies)
        }
        if has_bias(self.spec, projection):
            shapes[self.bias(layer, projection).tensor] = (n,)
        return shapes


def _joined(sources: list[Source]) -> tuple[Source, ...]:
    """Rows of one tensor that follow each other become one source."""
    joined: list[Source] = []
    for source in sources:
        last = joined[-1] if joined else None
        if last and (last.tensor, last.end, last.expert) == (
            source.tensor,
            source.begin,
            source.expert,
        ):
            joined[-1] = Source(last.tensor, last.begin, source.end, last.expert)
        else:
            joined.append(source)
    return tuple(joined)


PLAIN_PROJECTIONS: dict[Projection, str] = {
    p: f"{'mlp' if p in PARTS['gate_up'] + PARTS['down'] else 'self_attn'}.{p}_proj"
    for p in PROJECTIONS
}
PLAIN_NORMS: dict[Norm, str] = {
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
PLAIN = Words(PLAIN_PROJECTIONS, PLAIN_NORMS)
