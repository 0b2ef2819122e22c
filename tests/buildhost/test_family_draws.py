"""Random configurations of every family answer what transformers answers, or are refused by name:
both dialects' graphs as exported, and the device's engine built from them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.build import ignore
from remora_agent.engine.opening import EngineOptions, limits_of
from remora_agent.engine.ort import builder
from remora_agent.engine.ort.engine import EngineFiles, OrtEngine
from remora_agent.engine.protocol import Engine, RowStep
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.families import FAMILIES
from remora_contract.bundle import load_bundle
from remora_contract.errors import EngineFault
from tests.buildhost.family_draws import checkpoint
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.portable import PortableModel

PROMPT, STEPS, CONTEXT = 40, 24, 80
DRAWS = 20  # of each family, in the long run
ATTENTION_DIMS = 8  # ONNX Runtime's kernel takes heads of a multiple of it
OPTIONS = EngineOptions(rows=2, threads=1, accuracy_level=1)
TOKENS = np.random.default_rng(2).integers(0, 320, PROMPT + STEPS)


class Truth:
    """transformers' logits in double precision, and how far its own float32 is from them: a random
    model may be so steep that float32 says less than a model that was trained."""

    def __init__(self, directory: Path) -> None:
        self._single = load_reference(directory)
        self._double = load_reference(directory).double()
        for model in (self._single, self._double):
            # Their grouped products take float32 of whole vectors only.
            model.set_experts_implementation("eager")

    def check(self, tokens: np.ndarray, have: np.ndarray) -> None:
        """`have` [s, vocab]: logits after the last s tokens; the largest is the same one."""
        want = reference_logits(self._double, tokens[None])[0, -len(have) :]
        single = reference_logits(self._single, tokens[None])[0, -len(have) :]
        allowed = max(1e-4, 4 * float(np.abs(single - want).max()))
        assert np.abs(have - want).max() <= allowed
        chosen = np.take_along_axis(want, have.argmax(-1)[:, None], axis=-1)[:, 0]
        assert (want.max(-1) - chosen <= 2 * allowed).all()


def export(checkpoint: Path, out: Path, dialect: str) -> Path:
    options = ExportOptions(
        dtype="float32", dialect=dialect, max_context=CONTEXT, max_bank_rank=4, golden=False
    )
    export_checkpoint(checkpoint, out, options)
    return out


def check_draw(root: Path, family: str, number: int) -> None:
    made = checkpoint(root / "checkpoint", family, number)
    truth = Truth(made)
    for dialect in ("native", "legacy"):
        bundle = export(made, root / dialect, dialect)
        truth.check(TOKENS, PortableModel(bundle).forced(TOKENS[None], PROMPT)[0])
        if load_bundle(bundle).decoder.head_dim % ATTENTION_DIMS:
            with pytest.raises(EngineFault, match=f"multiple of {ATTENTION_DIMS}"):
                engine_of(bundle)
        else:
            truth.check(*greedy(engine_of(bundle)))


def engine_of(directory: Path) -> OrtEngine:
    """Built in this process, which is faster than a child."""
    bundle, out = load_bundle(directory), directory.parent / f"{directory.name}-built" / "engine"
    out.mkdir(parents=True)
    facts = builder.build_ort(directory, bundle, builder.recipe(1), out, ignore)
    files = EngineFiles(out, "", facts[builder.FACT_BASE] or None, facts.get(builder.FACT_PLAIN))
    return OrtEngine(files, bundle.decoder, limits_of(bundle, OPTIONS), 1, bundle.graph)


def greedy(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """What the device's engine says to the prompt, read in two chunks: (tokens, logits)."""
    tokens = TOKENS[:PROMPT].tolist()
    engine.prefill(1, TOKENS[:9], 0, (), PROMPT)
    logits = [engine.prefill(1, TOKENS[9:PROMPT], 9, (), PROMPT)]
    for _ in range(STEPS):
        tokens.append(int(logits[-1].argmax()))
        logits.append(engine.decode([RowStep(1, tokens[-1], len(tokens) - 1)])[0].copy())
    engine.close()
    return np.array(tokens), np.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_configuration_answers_what_transformers_answers(tmp_path, family):
    check_draw(tmp_path, family, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_configurations_answer_it(tmp_path, family, number):
    check_draw(tmp_path, family, number)
