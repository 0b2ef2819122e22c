"""How prompts are computed: the choice a person has, and which bundles can have it. Pure.

plain   as decoding computes
int8    8-bit products in chunks, beside the decoding model; the build fails where it cannot be
auto    int8 where the bundle can have it, the golden prompts allow it and memory permits it
"""

from __future__ import annotations

from typing import Literal, get_args

from remora_contract.bundle import Bundle
from remora_contract.errors import Incompatible, Refusal, RequestInvalid

PrefillChoice = Literal["auto", "int8", "plain"]
CHOICES: tuple[PrefillChoice, ...] = get_args(PrefillChoice)
PREFILL_HELP = (
    "How prompts are computed: plain (as answers), int8 (faster, rounded), or auto (int8 where the "
    "bundle's golden prompts and the memory allow it)."
)
FAST_LEVEL = 4  # the accuracy level that already rounds activations to int8
_INTEGERS = ("int4", "int8")


def check_choice(choice: str, accuracy_level: int = FAST_LEVEL) -> PrefillChoice:
    """Raises RequestInvalid for an unknown one, or one that contradicts the accuracy level."""
    for known in CHOICES:
        if choice == known:
            if known == "int8" and accuracy_level != FAST_LEVEL:
                raise RequestInvalid(
                    f"prefill int8 rounds activations, accuracy level {accuracy_level} forbids it; "
                    f"give prefill plain or accuracy level {FAST_LEVEL}"
                )
            return known
    raise RequestInvalid(f"prefill must be one of {', '.join(CHOICES)}, not {choice!r}")


def chosen(choice: PrefillChoice, bundle: Bundle, accuracy_level: int) -> PrefillChoice:
    """What is built: where int8 cannot be, `auto` is plain and `int8` raises Incompatible."""
    refusals = int8_refusals(bundle, accuracy_level) if choice != "plain" else []
    if refusals and choice == "int8":
        raise Incompatible(refusals)
    return "plain" if refusals else choice


def int8_refusals(bundle: Bundle, accuracy_level: int) -> list[Refusal]:
    """Why prompts of this bundle cannot be computed in int8; empty when they can."""
    quant, refusals = bundle.graph.quant, []
    if accuracy_level != FAST_LEVEL:
        refusals.append(Refusal("prefill int8: accuracy level", "4", str(accuracy_level)))
    if quant.kind not in _INTEGERS:
        have = bundle.graph.dtype if quant.kind == "none" else quant.kind
        refusals.append(Refusal("prefill int8: weights", "int4 or int8", have))
    if quant.activations != "none":
        refusals.append(Refusal("prefill int8: activations", "float", quant.activations))
    if bundle.decoder.experts is not None:
        refusals.append(Refusal("prefill int8: decoder", "dense", "a mixture of experts"))
    return refusals
