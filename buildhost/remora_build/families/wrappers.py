"""Multimodal models whose text part is a decoder of a supported family: where its config lies, and
which tensors are of images and left out. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from remora_build.families.fields import ConfigFields
from remora_build.families.gemma3 import DEFAULTS as GEMMA3_DEFAULTS

_OUTSIDE = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True)
class Wrapper:
    """One model_type. `text` maps the text_config's model_type to the family that computes it."""

    model_type: str
    title: str
    text: Mapping[str, str]
    ignored: tuple[str, ...]  # fields about images
    left_out: tuple[str, ...]  # beginnings of their tensors' names
    text_type: str  # where text_config does not say
    # Of fields it leaves out, in a text part of the usual family.
    text_defaults: Mapping[str, Any] = field(default_factory=dict)
    theta: float | None = None  # of the rope, where it is not the family's own default
    overlooked: tuple[str, ...] = ()  # fields that the text model computes, but not inside this one

    def text_fields(self, fields: ConfigFields) -> tuple[str, ConfigFields]:
        """(family, fields of the text part), taken out of the wrapper's own.

        Raises CheckpointInvalid, Unsupported (a text part of another family).
        """
        fields.ignore("vision_config", *self.ignored)
        fields.only("is_causal", True, why="only causal attention is carried")
        fields.ignore("quantization_config")  # remora_build.quantized reads it, or it was refused
        text = fields.nested("text_config")
        if not text.left():  # the first Qwen2-VL kept them side by side
            text = fields.rest("text_config")
            text.ignore("model_type")
        tied = fields.take("tie_word_embeddings")
        if tied is not None:
            text.ignore("tie_word_embeddings")
            text.default("tie_word_embeddings", tied)
        found = text.take("model_type", self.text_type)
        if not isinstance(found, str) or found not in self.text:
            known = ", ".join(self.text)
            raise fields.unsupported("text_config's model_type", found, f"carried are {known}")
        if self.text[found] == self.text[self.text_type]:
            for key, value in self.text_defaults.items():
                text.default(key, value)
        for key in self.overlooked:
            text.only(key, None, why=f"transformers overlooks it inside a {self.model_type}")
        _equal_positions(text, self.theta)
        return self.text[found], text


def _equal_positions(text: ConfigFields, theta: float | None) -> None:
    """Qwen's mrope turns by three positions, which are one and the same for text. `theta` is for a
    config that gives none."""
    given = text.left().get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        table = text.nested(key)
        if "mrope_section" in table.left():
            table.ignore("mrope_section")
            kinds = [table.take(word) for word in ("rope_type", "type")]
            kind = next((k for k in kinds if k not in (None, "mrope")), "default")
            table.default("rope_type", kind)
        given = table.left().get("rope_theta", given)
        if table.left():
            text.default(key, table.left())
    if given is None and theta is not None:
        text.default("rope_theta", theta)


_QWEN_IMAGES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
_QWEN_DEFAULTS = {"num_key_value_heads": 8, "max_window_layers": 80}
_LLAVA_IMAGES = (
    "image_seq_length",
    "image_token_index",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}

WRAPPERS: dict[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper(
            "gemma3",
            "Gemma 3 (4B, 12B, 27B)",
            {"gemma3_text": "gemma3_text"},
            ("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
            (*_OUTSIDE, *(f"model.{name}" for name in _OUTSIDE)),
            "gemma3_text",
            GEMMA3_DEFAULTS,
            overlooked=("final_logit_softcapping",),
        ),
        Wrapper(
            "mistral3",
            "Mistral Small 3.1, Ministral 3",
            {"mistral": "mistral", "ministral": "ministral", "ministral3": "ministral3"},
            (*_LLAVA_IMAGES, "spatial_merge_size"),
            (*_OUTSIDE, *(f"model.{name}" for name in _OUTSIDE)),
            "mistral",
        ),
        Wrapper(
            "llava",
            "LLaVA 1.5",
            {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"},
            _LLAVA_IMAGES,
            (*_OUTSIDE, *(f"model.{name}" for name in _OUTSIDE)),
            "llama",
            _LLAMA_DEFAULTS,
        ),
        Wrapper(
            "qwen2_vl",
            "Qwen2-VL",
            {"qwen2_vl_text": "qwen2", "qwen2_vl": "qwen2"},
            _QWEN_IMAGES,
            ("visual.", "model.visual."),
            "qwen2_vl_text",
            _QWEN_DEFAULTS,
            theta=1e6,
        ),
        Wrapper(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            {"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"},
            _QWEN_IMAGES,
            ("visual.", "model.visual."),
            "qwen2_5_vl_text",
            _QWEN_DEFAULTS,
            theta=1e6,
        ),
    )
}
