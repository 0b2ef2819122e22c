"""The runtime on a built ONNX Runtime engine, from real checkpoint and PEFT files, held against
transformers' and peft's own generation."""

import warnings
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime import speculation
from remora_agent.runtime.api import AdapterRef, FinishReason, SamplingParams
from remora_agent.runtime.embedding import EmbeddingRequest, Pooling
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint
from tests.support.runtime import Listener, request

COUNT = 12
MIXES = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 1.5}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoint, PEFT adapters and an open runtime whose bank holds one adapter at a time, or
    both."""
    root = tmp_path_factory.mktemp("world")
    checkpoint = make_checkpoint(root / "checkpoint", "qwen3", seed=5)
    peft = {
        "a": make_peft_adapter(checkpoint, root / "peft_a", seed=1, r=4),
        "b": make_peft_adapter(checkpoint, root / "peft_b", seed=2, r=8),
    }
    bundle_dir = root / "bundle"
    options = ExportOptions(dtype="float32", max_context=96, max_bank_rank=12, golden=False)
    export_checkpoint(checkpoint, bundle_dir, options)
    bundle = load_bundle(bundle_dir)
    directory = AdapterDirectory(bundle)
    for name, path in peft.items():
        convert_adapter(path, root / name, base=bundle_dir)
        directory.register(name, "r1", root / name)
    engine = open_engine(
        bundle_dir, EngineCache(root / "engines", 1 << 40), EngineOptions(rows=3, threads=1)
    )
    runtime = ModelRuntime.open(
        engine, bundle, bundle_dir, directory, RuntimeOptions(prefill_chunk=8)
    )
    yield checkpoint, peft, runtime
    runtime.close()


def their_model(checkpoint: Path, peft: dict[str, Path], mix):
    """transformers with peft, weights as peft combines adapters."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if mix:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, *rest = mix
            model = PeftModel.from_pretrained(model, peft[first], adapter_name=first)
            for name in rest:
                model.load_adapter(peft[name], adapter_name=name)
            model.base_model.set_adapter(list(mix))
        for module in model.modules():
            for name, weight in mix.items():
                if hasattr(module, "lora_B") and name in module.lora_B:
                    module.scaling[name] *= weight
    return model


def theirs(checkpoint: Path, peft: dict[str, Path], prompt, mix) -> tuple[int, ...]:
    """Greedy tokens."""
    import torch

    model, tokens = their_model(checkpoint, peft, mix), list(prompt)
    with torch.no_grad():
        for _ in range(COUNT):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def test_a_mixed_batch_answers_as_transformers_and_peft_do(world):
    checkpoint, peft, runtime = world
    cases = [
        (tuple(range(3 + i, 3 + i + length)), mix)
        for i, (length, mix) in enumerate(zip([5, 30, 9, 17], MIXES, strict=True))
    ]
    heard = []
    for i, (prompt, mix) in enumerate(cases):
        heard.append(Listener())
        runtime.submit(request(f"{i}", prompt, COUNT, mix), heard[-1])
    for listener, (prompt, mix) in zip(heard, cases, strict=True):
        assert listener.wait(60).tokens == theirs(checkpoint, peft, prompt, mix), mix
    assert len({h.tokens for h in heard}) == len(MIXES)


def test_text_goes_in_and_comes_out_as_text(world):
    _, _, runtime = world
    prompt = runtime.text.encode("The fish").token_ids
    heard = Listener()
    runtime.submit(request("t", prompt, COUNT), heard)
    tokens = heard.wait(60).tokens
    whole = runtime.text.decode((*prompt, *tokens))
    assert ("The fish" + heard.text).rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert heard.finished.reason is FinishReason.LENGTH


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("mix", MIXES)
def test_embeddings_are_transformers_states_pooled(world, mix, pooling):
    import torch

    checkpoint, peft, runtime = world
    prompts = ((5,), tuple(range(3, 30)), (7, 8, 9), tuple(range(40, 95)))
    asked = EmbeddingRequest(
        f"{pooling} {mix}",
        prompts,
        tuple(AdapterRef(n, None, w) for n, w in mix.items()),
        pooling,
        normalize=False,
    )
    heard = Future()
    runtime.embed(asked, heard.set_result)
    found = heard.result(60).vectors
    model = their_model(checkpoint, peft, mix)
    with torch.no_grad():
        for vector, prompt in zip(found, prompts, strict=True):
            out = model(torch.tensor([prompt]), output_hidden_states=True)
            states = out.hidden_states[-1][0].numpy()  # after the final norm
            wanted = states[-1] if pooling is Pooling.LAST else states.mean(axis=0)
            assert np.abs(vector - wanted).max() <= 1e-4


def test_the_states_of_transformers_are_after_the_final_norm(world):
    """What the test before rests on."""
    import torch

    checkpoint, peft, _ = world
    model, tokens = their_model(checkpoint, peft, {}), torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(states, model.model(tokens).last_hidden_state)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(0.7, top_k=8, top_p=0.95, seed=11)]
)
@pytest.mark.parametrize("mix", MIXES)
def test_drafts_change_no_token_of_a_float32_engine(world, monkeypatch, mix, sampling):
    """Every guess is proven, and text that repeats itself gives many."""
    _, _, runtime = world
    prompts = [(9, 8, 7) * 5, tuple(range(20)) * 2, (30, 31) * 3]

    def answers(name: str) -> list[tuple[int, ...]]:
        heard = []
        for i, prompt in enumerate(prompts):
            heard.append(Listener())
            runtime.submit(request(f"{name} {i}", prompt, 50, mix, sampling), heard[-1])
            heard[-1].wait(60)
        return [h.tokens for h in heard]

    drafted = runtime.metrics()["drafted_tokens"]
    monkeypatch.setattr(speculation, "best_length", lambda rate, seconds, most: 0)
    plain = answers("plain")
    assert runtime.metrics()["drafted_tokens"] == drafted
    monkeypatch.setattr(speculation, "best_length", lambda rate, seconds, most: max(0, most))
    assert answers("eager") == plain
    assert runtime.metrics()["drafted_tokens"] > drafted
