"""Adapters whose initialisation changed the base: converted with --initial they answer as PEFT's
live model, whose base weights were changed, and as PEFT's own conversion."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from remora_build.adapters.convert import Help, convert_adapter
from remora_build.cli import build_app
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.adapter import load_adapter
from remora_contract.bundle import load_bundle
from remora_contract.errors import AdapterInvalid, Unsupported
from tests.support.bank_feed import feed
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(5).integers(0, 320, (1, 12))
PROMPT = 6
PATTERNS: dict[str, Any] = {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"up_proj": 3}}
# rsLoRA beside patterns is what PEFT's own conversion refuses; its live model is the truth.
KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_fast": {"init_lora_weights": "pissa_niter_4", "lora_alpha": 3},
    "olora_stable": {"init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 5},
    "pissa_patterns": {"init_lora_weights": "pissa", **PATTERNS},
    "olora_stable_patterns": {"init_lora_weights": "olora", "use_rslora": True, **PATTERNS},
    "pissa_dora": {"init_lora_weights": "pissa", "use_dora": True},
    "corda": {"init_lora_weights": "corda", "target_modules": ["q_proj", "down_proj"]},
    "lora_ga": {"init_lora_weights": "lora_ga", "target_modules": ["v_proj", "up_proj"]},
}
BEYOND_PEFT = {"olora_stable_patterns"}


@dataclass(frozen=True)
class Saved:
    """What PEFT wrote, and the logits [1, s, vocab] of the live model it was written from."""

    initial: Path
    trained: Path
    converted: Path | None  # by PEFT itself
    live: np.ndarray


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("c"), "qwen3", layers=2, hidden=32, head_dim=8)


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "base"
    options = ExportOptions(
        dtype="float32", max_context=32, max_bank_rank=32, golden=False, dora=True
    )
    export_checkpoint(checkpoint, out, options)
    return out


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("peft")
    return {name: trained(checkpoint, root / name, name, KINDS[name]) for name in KINDS}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT's advice on these initialisations, which the tests follow or knowingly do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(checkpoint: Path, root: Path, name: str, settings: dict[str, Any]) -> Saved:
    """Initialises as PEFT does, saves, takes three steps of a real optimizer, saves both ways."""
    import torch

    torch.manual_seed(11)
    torch.set_num_threads(1)
    saving = {"save_embedding_layers": False}
    with quiet():
        model = initialised(checkpoint, settings)
        config = model.peft_config["default"]
        kind, config.init_lora_weights = config.init_lora_weights, True  # as PEFT's guide has it
        model.save_pretrained(root / "initial", **saving)
        config.init_lora_weights = kind
        steps(model)
        model.save_pretrained(root / "trained", **saving)
        with torch.no_grad():
            live = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
        converted = None if name in BEYOND_PEFT else root / "converted"
        if converted is not None:
            shutil.copytree(root / "initial", root / "for_peft")  # PEFT rewrites its config
            model.save_pretrained(
                converted,
                path_initial_model_for_weight_conversion=str(root / "for_peft"),
                **saving,
            )
    return Saved(root / "initial", root / "trained", converted, live)


def initialised(checkpoint: Path, settings: dict[str, Any]) -> Any:
    import peft
    import torch
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **settings}
    kind = settings["init_lora_weights"]
    if kind == "corda":
        settings["corda_config"] = CordaConfig(corda_method="kpm")
    if kind == "lora_ga":
        settings["lora_ga_config"] = LoraGAConfig()
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    seen = torch.from_numpy(TOKENS)
    if kind == "corda":
        decompose(model, settings["target_modules"], settings["r"])
    if kind == "lora_ga":
        from peft.tuners.lora import preprocess_loraga

        preprocess_loraga(model, config, lambda: model(seen, labels=seen).loss.backward())
    return peft.get_peft_model(model, config)


def decompose(model: Any, targets: list[str], rank: int) -> None:
    """Leaves in each target what peft's preprocess_corda does, which needs a package (attrs) that
    peft does not require: W C = U S V', and V taken back through C, C being a covariance."""
    import torch

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            weight = module.weight.detach()
            seen = torch.randn(4 * weight.shape[1], weight.shape[1])
            covariance = seen.T @ seen / len(seen)
            u, s, v = torch.linalg.svd(weight @ covariance, full_matrices=False)
            back = torch.linalg.solve(covariance, v[:rank].T)
            module.eigens = SimpleNamespace(U_WC=u[:, :rank], S_WC=s[:rank], V_WC=back)


def steps(model: Any) -> None:
    import torch

    tokens = torch.from_numpy(TOKENS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def answers(base: Path, adapter: Path) -> np.ndarray:
    """Logits [1, s - PROMPT + 1, vocab] of the graph with the adapter."""
    model = PortableModel(base, rows=1)
    model.adapter_feed = feed(model.bundle, [adapter], [[1.0]])
    return model.forced(TOKENS, PROMPT)


@pytest.mark.parametrize("name", KINDS)
def test_it_answers_as_the_live_model_whose_base_was_changed(
    saved: dict[str, Saved], base: Path, tmp_path: Path, name: str
) -> None:
    kind = saved[name]
    convert_adapter(kind.trained, tmp_path / "a", base=base, help=Help(initial=kind.initial))
    ours = answers(base, tmp_path / "a")
    assert np.abs(ours - kind.live[:, PROMPT - 1 :]).max() <= TOLERANCE


@pytest.mark.parametrize("name", sorted(set(KINDS) - BEYOND_PEFT - {"pissa_dora"}))
def test_it_is_what_peft_itself_converts_it_to(
    saved: dict[str, Saved], base: Path, tmp_path: Path, name: str
) -> None:
    kind = saved[name]
    assert kind.converted is not None
    mine = convert_adapter(kind.trained, tmp_path / "a", base=base, help=Help(initial=kind.initial))
    theirs = convert_adapter(kind.converted, tmp_path / "b", base=base)
    for ours, other in zip(mine.targets, theirs.targets, strict=True):
        assert (ours.target, ours.rank) == (other.target, other.rank)
        assert ours.scaling == pytest.approx(other.scaling, rel=1e-6)
    assert np.abs(answers(base, tmp_path / "a") - answers(base, tmp_path / "b")).max() <= 1e-5


def test_the_trained_adapter_alone_is_far_from_the_truth(
    saved: dict[str, Saved], base: Path, tmp_path: Path
) -> None:
    """What carrying it as plain LoRA, which the refusal prevents, would answer."""
    kind = saved["pissa"]
    as_plain(kind.trained, tmp_path / "plain")
    convert_adapter(tmp_path / "plain", tmp_path / "a", base=base)
    wrong = answers(base, tmp_path / "a")
    assert np.abs(wrong - kind.live[:, PROMPT - 1 :]).max() > 100 * TOLERANCE


def as_plain(source: Path, out: Path, **fields: Any) -> Path:
    shutil.copytree(source, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config.update({"init_lora_weights": True, **fields})
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), ["adapter", *map(str, arguments)])


def test_the_command_names_the_option_and_takes_it(
    saved: dict[str, Saved], base: Path, tmp_path: Path
) -> None:
    kind, out = saved["pissa"], tmp_path / "a"
    refused = run(kind.trained, out, "--base", base)
    assert isinstance(refused.exception, Unsupported)
    assert "--initial" in str(refused.exception)
    assert not out.exists()
    assert run(kind.trained, out, "--base", base, "--initial", kind.initial).exit_code == 0
    again = tmp_path / "b"
    run(kind.trained, again, "--base", base, "--initial", kind.initial)
    assert load_adapter(out).digest == load_adapter(again).digest
    assert load_adapter(out).rank == 8 <= load_bundle(base).graph.max_bank_rank


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 5}, "r is not what"),
        ({"lora_alpha": 4}, "lora_alpha is not what"),
        ({"use_rslora": True}, "use_rslora is not what"),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern is not what"),
        ({"init_lora_weights": "olora"}, "'olora'.*initialised by 'pissa'"),
        ({"init_lora_weights": "pissa_niter_2"}, "'pissa_niter_2'.*initialised by 'pissa'"),
        ({"target_modules": ["q_proj"]}, "does not select"),
    ],
)
def test_another_config_is_no_initial_state(
    saved: dict[str, Saved], base: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    kind = saved["pissa"]
    other = as_plain(kind.initial, tmp_path / "other", **fields)
    with pytest.raises(AdapterInvalid, match=message):
        convert_adapter(kind.trained, tmp_path / "a", base=base, help=Help(initial=other))


def test_an_adapter_of_other_modules_is_no_initial_state(
    saved: dict[str, Saved], base: Path, tmp_path: Path
) -> None:
    pissa, corda = saved["pissa"], saved["corda"]
    with pytest.raises(AdapterInvalid, match="differ in adapting"):
        convert_adapter(pissa.trained, tmp_path / "a", base=base, help=Help(initial=corda.initial))


def test_an_initial_state_that_took_nothing_out_is_seen(
    saved: dict[str, Saved], base: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    kind = saved["pissa"]
    other = as_plain(kind.initial, tmp_path / "other") / "adapter_model.safetensors"
    zeros = {n: t * np.float32("lora_A" in n) for n, t in load_file(other).items()}
    save_file(zeros, other)
    with pytest.raises(AdapterInvalid, match="every B of the initial state is zero"):
        convert_adapter(kind.trained, tmp_path / "a", base=base, help=Help(initial=other.parent))


def test_the_trained_adapter_is_not_its_own_initial_state(
    saved: dict[str, Saved], base: Path, tmp_path: Path
) -> None:
    kind = saved["pissa"]
    with pytest.raises(AdapterInvalid, match="are the same"):
        convert_adapter(kind.trained, tmp_path / "a", base=base, help=Help(initial=kind.trained))


def test_an_adapter_that_left_the_base_alone_takes_no_initial_state(
    saved: dict[str, Saved], base: Path, tmp_path: Path
) -> None:
    kind = saved["pissa"]
    plain = as_plain(kind.trained, tmp_path / "plain")
    with pytest.raises(AdapterInvalid, match="leave --initial out"):
        convert_adapter(plain, tmp_path / "a", base=base, help=Help(initial=kind.initial))


@pytest.mark.parametrize("init", ["loftq", "pissa_niter_x", "new_thing"])
def test_what_subtracting_does_not_undo_is_refused_by_name(
    saved: dict[str, Saved], base: Path, tmp_path: Path, init: str
) -> None:
    kind = saved["pissa"]
    other = as_plain(kind.trained, tmp_path / "other", init_lora_weights=init)
    with pytest.raises(Unsupported, match=f"init_lora_weights = '{init}'.*remora-build merge"):
        convert_adapter(other, tmp_path / "a", base=base, help=Help(initial=kind.initial))
