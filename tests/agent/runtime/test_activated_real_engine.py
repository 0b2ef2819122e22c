"""Activated LoRA from PEFT's files to logits: the runtime on a built engine against PEFT's own
generate(), in a batch with the base model and plain adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.cli import build_app
from remora_agent.client import Client
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.hosting.engines import EngineSettings
from remora_agent.local_host import HostSettings
from remora_agent.runtime.activation import activation_start
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.address import parse_address
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_agent.serving.standalone import local_assignment
from remora_agent.text.pipeline import TextPipeline
from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.support.adapters import make_peft_adapter, peft_quiet
from tests.support.checkpoints import make_checkpoint
from tests.support.runtime import Listener, request

TOLERANCE = 1e-4
COUNT = 6
INVOKE, LATE = (7, 8, 7), (40, 41)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "act": {"r": 8, "use_rslora": True, "alora_invocation_tokens": list(INVOKE)},
    "late": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "alora_invocation_tokens": list(LATE),
    },
}
TEXT = tuple(range(100, 117))
# prompt, adapters
ALONE: dict[str, tuple[tuple[int, ...], dict[str, float]]] = {
    "base": (TEXT, {}),
    "plain": (TEXT[:9], {"plain": 1.0}),
    "middle": ((*TEXT[:11], *INVOKE, 120, 121), {"act": 1.0}),
    "start": ((*INVOKE, *TEXT[:9]), {"act": 1.0}),
    "absent": ((*TEXT[:5], *INVOKE[:2], 9), {"act": 1.0}),
    "twice": ((5, *INVOKE, *TEXT[:6], *INVOKE, 3), {"act": 1.0}),
    "overlapping": ((5, 7, 8, 7, 8, 7, 6), {"act": 1.0}),
    "end": ((*TEXT[:10], *LATE), {"late": 1.0}),
}
TOGETHER: dict[str, tuple[tuple[int, ...], dict[str, float]]] = {
    "with plain": ((*TEXT[:6], *INVOKE, 120), {"plain": 0.5, "act": 1.5}),
    "two starts": ((*TEXT[:4], *LATE, *TEXT[:7], *INVOKE), {"act": 1.0, "late": -0.5}),
    "one absent": ((*TEXT[:4], *LATE, 9), {"act": 1.0, "late": 1.0, "plain": 1.0}),
}


@dataclass(frozen=True)
class World:
    checkpoint: Path
    peft: dict[str, Path]
    bundle: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("activated")
    checkpoint = make_checkpoint(root / "checkpoint", "qwen3", seed=5)
    options = ExportOptions(dtype="float32", max_context=64, max_bank_rank=16, golden=False)
    export_checkpoint(checkpoint, root / "bundle", options)
    peft = {
        name: make_peft_adapter(checkpoint, root / "peft" / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    for name, path in peft.items():
        convert_adapter(path, root / name, base=root / "bundle")
    return World(checkpoint, peft, root / "bundle", {name: root / name for name in peft})


class Recorder:
    """An engine that keeps the logits each sequence's tokens are drawn from."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._current: dict[int, list[np.ndarray]] = {}  # row -> its sequence
        self.sequences: list[list[np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prefill(
        self, row: int, tokens: Any, start: int, mix: Any = (), length: int | None = None
    ) -> np.ndarray:
        got: np.ndarray = self._engine.prefill(row, tokens, start, mix, length)
        if start == 0:
            self._current[row] = []
            self.sequences.append(self._current[row])
        self._current[row][:] = [got.copy()]  # the last chunk's stay
        return got

    def decode(self, steps: Any) -> np.ndarray:
        got: np.ndarray = self._engine.decode(steps)
        for step, logits in zip(steps, got, strict=True):
            self._current[step.row].append(logits.copy())
        return got


@pytest.fixture
def recorded(world: World, tmp_path: Path) -> Iterator[tuple[ModelRuntime, Recorder]]:
    """A runtime with a row for every case and prefill chunks of 8."""
    bundle = load_bundle(world.bundle)
    directory = AdapterDirectory(bundle)
    for name, path in world.adapters.items():
        directory.register(name, "r1", path)
    options = EngineOptions(rows=8, threads=1)
    engine = Recorder(open_engine(world.bundle, EngineCache(tmp_path, 1 << 40), options))
    runtime = ModelRuntime.open(
        engine,  # type: ignore[arg-type]
        bundle,
        world.bundle,
        directory,
        RuntimeOptions(prefill_chunk=8),
    )
    yield runtime, engine
    runtime.close()


def answers(
    runtime: ModelRuntime,
    engine: Recorder,
    cases: Mapping[str, tuple[tuple[int, ...], dict[str, float]]],
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Tokens and logits [COUNT, vocab] of every case, all in flight together."""
    heard = {}
    for name, (prompt, mix) in cases.items():
        heard[name] = Listener()
        runtime.submit(request(name, prompt, COUNT, mix), heard[name])
    tokens = {name: listener.wait(60).tokens for name, listener in heard.items()}
    by_tokens = {tuple(np.argmax(s, -1)): np.array(s) for s in engine.sequences}
    assert len(by_tokens) == len(cases)  # so that a sequence is known by its tokens
    return {name: (found, by_tokens[found]) for name, found in tokens.items()}


def load(world: World, names: list[str], *, plain: bool, root: Path) -> Any:
    """transformers' model with these adapters; `plain`: their invocation tokens taken away."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(world.checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for i, name in enumerate(names):
        path = world.peft[name]
        if plain:
            path = root / name
            shutil.copytree(world.peft[name], path)
            config = json.loads((path / "adapter_config.json").read_text())
            config["alora_invocation_tokens"] = None
            (path / "adapter_config.json").write_text(json.dumps(config))
        if i:
            model.load_adapter(path, name)
        else:
            model = peft.PeftModel.from_pretrained(model, path, name)
    return model.eval()


def generated(world: World, prompt: tuple[int, ...], mix: dict[str, float]) -> np.ndarray:
    """Logits [COUNT, vocab] of PEFT's generate() with one adapter or none."""
    import torch

    with torch.no_grad(), peft_quiet():
        model = load(world, list(mix), plain=False, root=Path())
        tokens = torch.tensor([prompt])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=COUNT,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return np.stack([step[0].numpy() for step in out.logits])


def composed(
    world: World, prompt: tuple[int, ...], mix: dict[str, float], root: Path
) -> np.ndarray:
    """The same for several adapters, which PEFT gives but one start: token by token through
    transformers' cache, with those adapters switched on that have started."""
    import torch

    starts = {
        name: activation_start(prompt, ADAPTERS[name].get("alora_invocation_tokens", ()))
        for name in mix
    }
    logits, cache, tokens = [], None, list(prompt)
    with torch.no_grad(), peft_quiet():
        model = load(world, list(mix), plain=True, root=root)
        for module in model.modules():
            for name in set(mix) & set(getattr(module, "lora_B", ())):
                module.scaling[name] *= mix[name]
        for position in range(len(prompt) + COUNT - 1):
            active = [n for n, s in starts.items() if s is not None and s <= position]
            model.base_model.disable_adapter_layers()
            if active:
                model.base_model.enable_adapter_layers()
                model.base_model.set_adapter(active)
            token = torch.tensor([[tokens[position]]])
            out = model.base_model.model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if position >= len(prompt) - 1:
                logits.append(out.logits[0, -1].numpy())
                tokens.append(int(logits[-1].argmax()))
    return np.stack(logits)


def test_every_place_of_the_invocation_answers_as_peft_in_one_batch(
    world: World, recorded: tuple[ModelRuntime, Recorder]
):
    got = answers(*recorded, ALONE)
    for name, (prompt, mix) in ALONE.items():
        want = generated(world, prompt, mix)
        tokens, logits = got[name]
        assert np.abs(logits - want).max() <= TOLERANCE, name
        assert tokens == tuple(want.argmax(-1)), name


def test_an_adapter_on_from_the_first_token_would_answer_otherwise(world: World, tmp_path: Path):
    """What the batch above would give if the start were ignored is far from PEFT's."""
    prompt, mix = ALONE["middle"]
    want = generated(world, prompt, mix)
    import torch

    with torch.no_grad(), peft_quiet():
        model = load(world, ["act"], plain=True, root=tmp_path)
        always = model(input_ids=torch.tensor([prompt])).logits[0, -1].numpy()
    assert np.abs(always - want[0]).max() > 100 * TOLERANCE


def test_composed_adapters_each_begin_at_their_own_invocation(
    world: World, recorded: tuple[ModelRuntime, Recorder], tmp_path: Path
):
    got = answers(*recorded, TOGETHER)
    for name, (prompt, mix) in TOGETHER.items():
        want = composed(world, prompt, mix, tmp_path / name)
        tokens, logits = got[name]
        assert np.abs(logits - want).max() <= TOLERANCE, name
        assert tokens == tuple(want.argmax(-1)), name


def test_the_served_model_answers_as_peft_and_says_where_it_began(world: World, tmp_path: Path):
    settings = StackOptions(
        listen=parse_address("127.0.0.1:0"),
        engines=EngineSettings(cache_dir=tmp_path, options=EngineOptions(rows=2, threads=1)),
        host=HostSettings(),
    )
    stack = ServingStack(settings)
    address = stack.start().target()
    try:
        stack.host.switch(local_assignment(world.bundle, world.adapters, ()))
        with Client(address, timeout_s=60) as client:
            for case in ("middle", "absent"):
                prompt, mix = ALONE[case]
                result = client.generate(
                    list(prompt), adapter="act", max_tokens=COUNT, ignore_eos=True, temperature=0.0
                )
                want = tuple(generated(world, prompt, mix).argmax(-1))
                assert result.token_ids == want, case
                told = [a.active_from for a in result.provenance.adapters]
                assert told == [activation_start(prompt, INVOKE)]
            listed = {a.name: a.invocation_tokens for a in client.adapters().adapters}
            assert listed == {"plain": (), "act": INVOKE, "late": LATE}
    finally:
        stack.stop(5.0)


def test_a_file_of_requests_is_answered_as_peft_does(world: World, tmp_path: Path):
    """Text in, text out: the invocation is what the tokenizer makes of a word in the prompt."""
    text = TextPipeline.load(world.bundle)
    prompts = ["the fish swims", "the fish waits"]
    ids = [text.encode(p).token_ids for p in prompts]
    invocation = ids[0][-3:]
    assert activation_start(ids[0], invocation) and activation_start(ids[1], invocation) is None
    settings = {**ADAPTERS["act"], "alora_invocation_tokens": list(invocation)}
    peft_dir = make_peft_adapter(world.checkpoint, tmp_path / "peft", seed=1, **settings)
    convert_adapter(peft_dir, tmp_path / "swims", base=world.bundle)
    document = {
        "temperature": 0.0,
        "max_generate_length": COUNT,
        "batch_size": 2,
        "apply_chat_template": False,
        "available_lora_weights": {"swims": str(tmp_path / "swims")},
        "requests": [
            {"messages": [{"role": "user", "content": p}], "lora_name": "swims"} for p in prompts
        ],
    }
    (tmp_path / "in.json").write_text(json.dumps(document))
    arguments = [
        *("generate", "--bundle", str(world.bundle), "--threads", "1"),
        *("--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")),
        *("--cache-dir", str(tmp_path / "cache")),
    ]
    assert CliRunner().invoke(build_app(), arguments).exit_code == 0
    answered = json.loads((tmp_path / "out.json").read_text())["responses"]
    there = replace(world, peft={"swims": peft_dir})
    for prompt, response in zip(ids, answered, strict=True):
        tokens = tuple(generated(there, prompt, {"swims": 1.0}).argmax(-1).tolist())
        whole = text.decode((*prompt, *tokens))
        assert whole.removeprefix(text.decode(prompt)) == response["output_text"]
        (told,) = response["remora"]["provenance"]["adapters"]
        assert told.get("active_from") == activation_start(prompt, invocation)
