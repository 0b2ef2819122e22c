"""transformers in float32 as the reference for exported graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


def load_reference(checkpoint: Path) -> torch.nn.Module:
    """The checkpoint's weights in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def reference_logits(model: torch.nn.Module, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """[rows, tokens, vocab]"""
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(tokens))).logits.numpy()


def reference_states(model: torch.nn.Module, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """[rows, tokens, hidden] after the final norm."""
    found: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0])
    )
    reference_logits(model, tokens)
    hook.remove()
    return found[0].numpy()
