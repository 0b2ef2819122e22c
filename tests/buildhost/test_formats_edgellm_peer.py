"""Beside tensorrt-edgellm-process-lora 0.11 itself, where it is installed: equal where it is right,
and wrong where docs/adapter-formats.md says so.

It is found on the PATH, or beside the Python that REMORA_EDGELLM_PYTHON names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from remora_build.adapters.convert import read_peft
from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.edgellm import WEIGHTS, write_edgellm
from remora_contract.bundle import Bundle
from remora_contract.errors import AdapterInvalid
from tests.buildhost.documents import decoder_spec, write_bundle
from tests.support.adapters import make_peft_adapter

TOOL = "tensorrt-edgellm-process-lora"
Tensors = dict[str, np.ndarray]

pytestmark = pytest.mark.slow  # each run of the tool imports torch


def tool_path() -> str | None:
    python = os.environ.get("REMORA_EDGELLM_PYTHON")
    beside = None if python is None else shutil.which(TOOL, path=str(Path(python).parent))
    return beside or shutil.which(TOOL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if tool_path() is None:
        pytest.skip(f"{TOOL} is not installed: set REMORA_EDGELLM_PYTHON to a Python that has it")
    from tests.support.checkpoints import make_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(directory, "qwen3", hidden=32, head_dim=8)


@pytest.fixture
def convert(checkpoint: Path, tmp_path: Path) -> Any:
    """(ours, theirs) for a PEFT adapter of the given settings."""
    bundle: Bundle = write_bundle(tmp_path / "base", decoder_spec(checkpoint))

    def run(**settings: Any) -> tuple[Tensors, Tensors]:
        peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=3, **settings)
        given = ["--input_dir", str(peft_dir), "--output_dir", str(tmp_path / "theirs")]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([str(tool_path()), *given], check=True, env=environment, timeout=300)
        theirs = load_file(tmp_path / "theirs" / WEIGHTS)
        (tmp_path / "ours").mkdir()
        write_edgellm(tmp_path / "ours", Carried(*read_peft(peft_dir, bundle)))
        return load_file(tmp_path / "ours" / WEIGHTS), theirs

    return run


def bits(tensors: Tensors) -> dict[str, tuple[Any, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in tensors.items()}


def differing(ours: Tensors, theirs: Tensors) -> set[str]:
    return {name for name in ours if bits(ours)[name] != bits(theirs)[name]}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 6, "dtype": "float16"},
        {"r": 3, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 16, "dtype": "bfloat16"},
        {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
)
def test_plain_lora_is_the_very_tensors_of_the_tool(convert: Any, settings: Any) -> None:
    ours, theirs = convert(**settings)
    assert bits(ours) == bits(theirs)


def test_a_bfloat16_factor_is_rounded_once_not_twice(convert: Any) -> None:
    """The tool multiplies in bfloat16: with alpha / r = 1.5 its B has seven bits left, ours ten."""
    ours, theirs = convert(r=4, lora_alpha=6, dtype="bfloat16")
    different = differing(ours, theirs)
    assert different and all("lora_B" in name for name in different)
    for name in different:
        assert np.allclose(ours[name], theirs[name], rtol=2**-8, atol=0)


def test_the_tool_scales_rslora_as_if_it_were_plain(convert: Any) -> None:
    ours, theirs = convert(r=4, lora_alpha=8, use_rslora=True)
    name = "model.layers.0.self_attn.q_proj.lora_B.weight"
    assert np.allclose(ours[name], 2 * theirs[name].astype(np.float32), rtol=1e-3)


def test_the_tool_scales_every_module_alike(convert: Any) -> None:
    ours, theirs = convert(
        r=4, lora_alpha=8, alpha_pattern={"q_proj": 2}, rank_pattern={"v_proj": 2}
    )
    different = {n.split(".")[4] for n in differing(ours, theirs)}
    assert different == {"q_proj", "v_proj"}


def test_the_tool_stores_infinity_where_float16_ends(convert: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="more than float16 holds"):
        convert(r=4, lora_alpha=4_000_000)
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)
    assert any(np.isinf(t).any() for t in theirs.values())


def test_the_tool_leaves_a_square_factor_untransposed(convert: Any) -> None:
    ours, theirs = convert(r=32, lora_alpha=32, target_modules=["q_proj"])
    for name, tensor in ours.items():
        assert np.array_equal(tensor, theirs[name].T)
        assert not np.array_equal(tensor, theirs[name])
