"""Real PEFT adapters and Remora sidecars with random, non-zero weights.

    peft_dir = make_peft_adapter(checkpoint_dir, tmp_path / "peft", seed=1, r=4)
    tensors = random_tensors(bundle.decoder, seed=1)
    adapter = write_sidecar(tmp_path / "a", bundle.base_digest, tensors)

The first needs torch, transformers and peft; the others only numpy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from remora_build.adapters.sidecar import Dtype, Factor, write_adapter
from remora_contract.adapter import Adapter
from remora_contract.bundle import DecoderSpec
from remora_contract.targets import PROJECTIONS, AdapterTarget, Projection

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_peft_adapter(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    seed: int,
    r: int = 8,
    lora_alpha: int = 16,
    target_modules: list[str] | str | None = None,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    layers_to_transform: list[int] | int | None = None,
    dtype: str = "float32",
    **lora_config: Any,
) -> Path:
    """Saves an adapter for the checkpoint as `peft` itself saves it; returns `out_dir`.

    A and B are drawn from a normal distribution (seeded), so the adapter visibly changes the
    model. `target_modules` defaults to all seven projections; any further LoraConfig field may be
    given. `dtype` is that of the saved tensors: float32, float16 or bfloat16.
    """
    import peft
    import torch

    torch.set_num_threads(1)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=ALL_SEVEN if target_modules is None else target_modules,
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=layers_to_transform,
        task_type=lora_config.pop("task_type", "CAUSAL_LM"),
        **lora_config,
    )
    with peft_quiet():
        _save(checkpoint_dir, out_dir, config, seed, getattr(torch, dtype))
    return out_dir


@contextmanager
def peft_quiet() -> Iterator[None]:
    """peft calls what the installed transformers deprecates; tests turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _save(checkpoint_dir: Path, out_dir: Path, config: Any, seed: int, dtype: Any) -> None:
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint_dir, dtype=torch.float32, local_files_only=True
    )
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = (noise * 0.1).to(dtype)
    model.save_pretrained(out_dir, save_embedding_layers=False)


def random_tensors(
    decoder: DecoderSpec,
    *,
    seed: int,
    r: int = 4,
    projections: Iterable[Projection] = PROJECTIONS,
    layers: Sequence[int] | None = None,
    scale: float = 0.1,
) -> dict[AdapterTarget, tuple[np.ndarray, np.ndarray]]:
    """Random (a [k, r], b [r, n]) float32 for the given projections of the given layers (all)."""
    rng = np.random.default_rng(seed)
    shapes = {p: (decoder.in_features(p), decoder.out_features(p)) for p in projections}
    return {
        AdapterTarget(layer, p): (
            (rng.standard_normal((k, r)) * scale).astype(np.float32),
            (rng.standard_normal((r, n)) * scale).astype(np.float32),
        )
        for layer in (range(decoder.layers) if layers is None else layers)
        for p, (k, n) in shapes.items()
    }


def write_sidecar(
    out_dir: Path,
    base_digest: str,
    tensors: Mapping[AdapterTarget, tuple[np.ndarray, np.ndarray]],
    *,
    dtype: Dtype = "float32",
    scaling: float = 1.0,
    source_config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Writes a sidecar with the product's writer; b is taken as it is (scale already in it)."""
    factors = {t: Factor(a, b, scaling) for t, (a, b) in tensors.items()}
    return write_adapter(
        out_dir,
        factors,
        base_digest=base_digest,
        dtype=dtype,
        source_config=source_config or {"peft_type": "LORA"},
    )
