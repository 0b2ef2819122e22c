"""Which steps of ONNX Runtime's engine are equal bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime.options import MAX_DRAFT_TOKENS
from remora_agent.runtime.step_forms import forms_agree
from tests.agent.engine.portable import INT4, LLAMA, QWEN2, random_bundle


@pytest.mark.parametrize("spec", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize("level", [1, 4])
def test_where_the_forms_agree_every_other_step_gives_the_same_bits(tmp_path, spec, level):
    random_bundle(tmp_path / "b", replace(spec, layers=4), INT4)
    options = EngineOptions(rows=1, threads=1, accuracy_level=level, prefill="plain")
    engine = open_engine(tmp_path / "b", EngineCache(tmp_path / "e", 1 << 40), options)
    if not forms_agree(engine, MAX_DRAFT_TOKENS):
        pytest.skip("this machine's kernels have more forms: exact drafts are off here")
    tokens = np.random.default_rng(3).integers(0, spec.vocab, 40)
    whole = engine.score(0, tokens, 0)
    for at in range(0, 40, 8):
        assert np.array_equal(engine.score(0, tokens[at : at + 8], at), whole[at : at + 8])
    engine.close()
