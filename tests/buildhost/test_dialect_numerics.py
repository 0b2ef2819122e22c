"""The legacy graph answers what transformers and the native graph answer, family by family."""

from __future__ import annotations

import numpy as np
import pytest

from tests.buildhost.test_export_numerics import FORMS, compared, export


@pytest.mark.parametrize("form", FORMS)
def test_the_float32_legacy_graph_equals_transformers(tmp_path, form):
    have, want = compared(*export(tmp_path, form, dtype="float32", dialect="legacy"))
    assert np.abs(have - want).max() <= 1e-4
    assert (have.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_float16_legacy_graph_stays_close_to_transformers(tmp_path, form):
    have, want = compared(*export(tmp_path, form, dtype="float16", dialect="legacy"))
    assert np.abs(have - want).max() <= 2e-2
