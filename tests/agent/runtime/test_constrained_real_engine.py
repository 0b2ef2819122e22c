"""Constraints on a built ONNX Runtime engine with a trained byte-level BPE tokenizer, base model
and adapters, several answers in one batch."""

import json
import random
import re
from dataclasses import replace

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime.api import Constraint, ConstraintKind, FinishReason, SamplingParams
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.support.adapters import random_tensors, write_sidecar
from tests.support.checkpoints import make_checkpoint
from tests.support.runtime import Listener, request
from tests.support.schemas import matches, random_schema

MIXES = [None, {"a": 1.0}, {"b": 2.0}, {"a": 0.5, "b": 0.5}]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    root = tmp_path_factory.mktemp("constrained")
    checkpoint = make_checkpoint(root / "checkpoint", "llama", seed=5)
    options = ExportOptions(dtype="float32", max_context=512, max_bank_rank=16, golden=False)
    bundle = export_checkpoint(checkpoint, root / "bundle", options)
    directory = AdapterDirectory(bundle)
    for seed, name in enumerate("ab"):
        tensors = random_tensors(bundle.decoder, seed=seed)
        write_sidecar(root / name, bundle.base_digest, tensors)
        directory.register(name, "r1", root / name)
    engine = open_engine(
        root / "bundle", EngineCache(root / "engines", 1 << 40), EngineOptions(rows=4, threads=1)
    )
    runtime = ModelRuntime.open(engine, load_bundle(root / "bundle"), root / "bundle", directory)
    yield runtime
    runtime.close()


def submit(runtime, constraint, request_id, seed, mix):
    sampling = SamplingParams(1.0, seed=seed)
    made = request(request_id, (5, 6, 7), 500, mix, sampling, ignore_eos=False)
    listener = Listener()
    grammar = runtime.compile(constraint).result(20)
    runtime.submit(replace(made, constraint=constraint), listener, grammar)
    return listener


def test_answers_to_random_schemas_validate_with_any_adapters(runtime):
    rng = random.Random(8)
    cut = 0
    documents = [random_schema(rng, 2) for _ in range(40)]
    for start in range(0, 40, 4):
        heard = [
            submit(
                runtime,
                Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(document)),
                f"{start + i}",
                start + i,
                MIXES[i],
            )
            for i, document in enumerate(documents[start : start + 4])
        ]
        for document, listener in zip(documents[start:], heard, strict=False):
            text = listener.wait(120).text
            if listener.finished.reason is FinishReason.LENGTH:
                cut += 1
            else:
                assert matches(json.loads(text), document), (document, text)
    assert cut <= 4  # a model of random weights may fill the context with blanks


def test_expressions_grammars_and_choices_hold_beside_free_answers(runtime):
    free = Listener()
    runtime.submit(request("free", (5, 6, 7), 40), free)
    grammar = 'start: "π = " NUMBER ("," NUMBER)*\nNUMBER: /[0-9]{1,3}/'
    date = submit(runtime, Constraint(ConstraintKind.REGEX, r"\d{4}-\d\d"), "x", 1, MIXES[1])
    lark = submit(runtime, Constraint(ConstraintKind.LARK, grammar), "y", 2, MIXES[2])
    options = ("größer", "kleiner", "🐟")
    choice = submit(runtime, Constraint(ConstraintKind.CHOICE, options=options), "z", 3, MIXES[3])
    assert re.fullmatch(r"\d{4}-\d\d", date.wait(60).text)
    assert re.fullmatch(r"π = \d{1,3}(,\d{1,3})*", lark.wait(60).text)
    assert choice.wait(60).text in options
    alone = Listener()
    runtime.submit(request("alone", (5, 6, 7), 40), alone)
    assert free.wait(60).tokens == alone.wait(60).tokens


def test_text_of_several_bytes_a_character_is_never_broken_in_a_stream(runtime):
    constraint = Constraint(ConstraintKind.REGEX, "[äöü日本🐟é]{30}")
    heard = submit(runtime, constraint, "w", 4, None).wait(60)
    pieces = [e.text for e in heard.events[1:-1]]
    assert len("".join(pieces)) == 30
    assert all("\ufffd" not in piece for piece in pieces)
