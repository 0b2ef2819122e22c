"""An adapter whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA), made plain.

Training began by moving the adapter's first product out of the base weights. So on the unchanged
base W the trained adapter is

    W - s B0 A0 + s B A  =  W + s [B | -B0] [A ; A0]

a plain LoRA of twice the rank, as PEFT's own `path_initial_model_for_weight_conversion` makes it.
A0 and B0 are the adapter as it was saved before training. With DoRA the magnitudes stay what they
are: the norm is of the same sum. PEFT cannot convert use_rslora beside patterns, for which its
config has no numbers; here the scaling is in the factors, so that they are no exception.
"""

from __future__ import annotations

import numpy as np

from remora_build.adapters.assemble import Branches, Tensors, folded_tensors
from remora_build.adapters.bound import Binding, Bound
from remora_build.adapters.fields import MERGE
from remora_build.adapters.fold import Folded
from remora_build.adapters.settings import LoraSettings
from remora_contract.errors import AdapterInvalid, Unsupported

_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def check_initial(
    trained: LoraSettings, initial: LoraSettings | None, where: str, initial_where: str
) -> None:
    """Whether an initial state is needed, given and the trained adapter's own. Raises Unsupported
    naming the next step, AdapterInvalid."""
    if trained.mutated_init is None:
        if initial is not None:
            raise AdapterInvalid(
                f"{where}: init_lora_weights says that the base was left unchanged, so there is "
                "no initial state to take into account; leave --initial out"
            )
        return
    if initial is None:
        raise Unsupported(
            f"{where}: init_lora_weights = {trained.mutated_init!r}: training changed the base "
            "weights; give the adapter as it was saved before training with --initial, or save it "
            "with path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )
    if trained.invocation_tokens:
        raise Unsupported(
            f"{where}: alora_invocation_tokens beside init_lora_weights = "
            f"{trained.mutated_init!r}: before the invocation it was trained on the changed base, "
            f"which no adapter that acts from there on can bring back; {MERGE}"
        )
    if initial.mutated_init not in (None, trained.mutated_init):  # PEFT advises to save it as true
        raise AdapterInvalid(
            f"{initial_where}: init_lora_weights = {initial.mutated_init!r}, but {where} was "
            f"initialised by {trained.mutated_init!r}: it is no initial state of it"
        )
    for name in _SCALING:
        if getattr(trained, name) != getattr(initial, name):
            raise AdapterInvalid(
                f"{initial_where}: {name} is not what {where} says: it is no initial state of it"
            )


def minus_initial(
    bound: Bound, tensors: Tensors, initial: Bound, initial_tensors: Tensors
) -> Branches:
    """Branches of the trained adapter less those of its initial state. Raises AdapterInvalid when
    the two adapt different modules."""
    by_name = {b.place.name: b for b in initial.factors}
    names = {b.place.name for b in bound.factors}
    if set(by_name) != names:
        odd = sorted(set(by_name) ^ names)[0]
        raise AdapterInvalid(f"the adapter and its initial state differ in adapting {odd}")
    _check_moved(bound, tensors, initial, initial_tensors)
    now, first = folded_tensors(tensors), folded_tensors(initial_tensors)

    def branches(binding: Binding, experts: int) -> Folded:
        return now(binding, experts).minus(first(by_name[binding.place.name], experts))

    return branches


def _check_moved(bound: Bound, tensors: Tensors, initial: Bound, initial_tensors: Tensors) -> None:
    """Whether the initial state took something out of the base, and training then changed it: what
    a wrong directory betrays itself by. Single modules may lack either. Raises AdapterInvalid."""
    if not any(initial_tensors.float32(b.tensor_b).any() for b in initial.factors):
        raise AdapterInvalid(
            "every B of the initial state is zero, so it took nothing out of the base weights: it "
            "is no state before the training of this adapter"
        )
    trained = {b.place.name: b for b in bound.factors}
    for first in initial.factors:
        now = trained[first.place.name]
        pairs = ((now.tensor_a, first.tensor_a), (now.tensor_b, first.tensor_b))
        if not all(
            np.array_equal(tensors.float32(a), initial_tensors.float32(b)) for a, b in pairs
        ):
            return
    raise AdapterInvalid(
        "the adapter and its initial state are the same: together they change nothing. Give the "
        "trained adapter first, and the one saved before training with --initial"
    )
