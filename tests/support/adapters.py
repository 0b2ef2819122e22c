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
from remora_contract.adapter import WEIGHTS_FILE, Adapter, load_adapter
from remora_contract.bundle import Bundle, bank_groups
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import (
    PARTS,
    PROJECTIONS,
    AdapterTarget,
    Group,
    Projection,
    lora_a,
    lora_b,
    lora_gate,
)

Tensors = Mapping[AdapterTarget, tuple[np.ndarray, np.ndarray]]

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
    save_embedding_layers: bool = False,
    **lora_config: Any,
) -> Path:
    """Saves an adapter for the checkpoint as `peft` itself saves it; returns `out_dir`.

    Whatever it trains is drawn from a normal distribution (seeded), so the adapter visibly changes
    the model. `target_modules` defaults to all seven projections; any further LoraConfig field may
    be given. `dtype` is that of the saved tensors: float32, float16 or bfloat16.
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
        _save(checkpoint_dir, out_dir, config, seed, getattr(torch, dtype), save_embedding_layers)
    return out_dir


@contextmanager
def peft_quiet() -> Iterator[None]:
    """peft calls what the installed transformers deprecates, and gives advice on merging; tests
    turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # it looks for patterns in modules only
        yield


def _save(
    checkpoint_dir: Path,
    out_dir: Path,
    config: Any,
    seed: int,
    dtype: Any,
    save_embedding_layers: bool,
) -> None:
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
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                drawn = parameter * (1 + 0.2 * noise)
            elif "lora_" in name:
                drawn = noise * 0.1
            elif "trainable_tokens_delta" in name:
                drawn = noise * 0.5
            elif parameter.requires_grad:  # biases and whole modules
                drawn = parameter + 0.3 * noise
            else:
                continue
            if dtype is parameter.dtype:
                parameter.copy_(drawn)  # in place: tied parameters share their memory
            else:
                parameter.data = drawn.to(dtype)
    model.save_pretrained(out_dir, save_embedding_layers=save_embedding_layers)


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
    tensors: Tensors,
    *,
    dtype: Dtype = "float32",
    scaling: float = 1.0,
    source_config: Mapping[str, Any] | None = None,
    invocation_tokens: tuple[int, ...] = (),
) -> Adapter:
    """Writes a sidecar with the product's writer; b is taken as it is (scale already in it)."""
    factors = {t: Factor(a, b, scaling) for t, (a, b) in tensors.items()}
    return write_adapter(
        out_dir,
        factors,
        base_digest=base_digest,
        dtype=dtype,
        source_config=source_config or {"peft_type": "LORA"},
        invocation_tokens=invocation_tokens,
    )


def load_tensors(directory: Path) -> Tensors:
    """A sidecar's (a, b) by target."""
    from safetensors.numpy import load_file

    stored = load_file(directory / WEIGHTS_FILE)
    targets = [t.target for t in load_adapter(directory).targets]
    return {t: (stored[t.tensor_a()], stored[t.tensor_b()]) for t in targets}


def bank_feed(
    bundle: Bundle, resident: Sequence[Tensors], weights: Sequence[Sequence[float]]
) -> dict[str, np.ndarray]:
    """The portable graph's adapter inputs, packed the plain way docs/graph.md describes.

    `weights[row][i]` is how much of resident adapter i that row takes. An adapter's columns lie
    side by side for each part of a group, B is zero outside its part, and layers that an adapter
    leaves alone hold zeros.
    """
    feed: dict[str, np.ndarray] = {}
    decoder, layers = bundle.decoder, range(bundle.decoder.layers)
    groups = {layer: bank_groups(decoder, bundle.graph, layer) for layer in layers}
    for group in dict.fromkeys(g for found in groups.values() for g in found):
        widths = [[_width(tensors, p) for p in PARTS[group]] for tensors in resident]
        gate = [np.repeat(row, [sum(w) for w in widths]) for row in weights]
        feed[lora_gate(group)] = np.array(gate, bundle.graph.dtype)[:, None, :]
        for layer in (n for n in layers if group in groups[n]):
            blocks = [
                _block(bundle, t, w, layer, group) for t, w in zip(resident, widths, strict=True)
            ]
            feed[lora_a(layer, group)] = np.concatenate([a for a, _ in blocks], axis=1)
            feed[lora_b(layer, group)] = np.concatenate([b for _, b in blocks], axis=0)
    return feed


def _width(tensors: Tensors, projection: Projection) -> int:
    return max(
        (a.shape[1] for t, (a, _) in tensors.items() if t.projection == projection), default=0
    )


def _block(
    bundle: Bundle, tensors: Tensors, widths: Sequence[int], layer: int, group: Group
) -> tuple[np.ndarray, np.ndarray]:
    """One adapter's columns of one group: a [k, sum(widths)], b [sum(widths), n]."""
    decoder, dtype = bundle.decoder, bundle.graph.dtype
    parts = PARTS[group]
    outs = [decoder.out_features(p) for p in parts]
    a = np.zeros((decoder.in_features(parts[0]), sum(widths)), dtype)
    b = np.zeros((sum(widths), sum(outs)), dtype)
    for i, part in enumerate(parts):
        pair = tensors.get(AdapterTarget(layer, part))
        if pair is not None:
            column, first, rank = sum(widths[:i]), sum(outs[:i]), pair[0].shape[1]
            a[:, column : column + rank] = pair[0]
            b[column : column + rank, first : first + outs[i]] = pair[1]
    return a, b
