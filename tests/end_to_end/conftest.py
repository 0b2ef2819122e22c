"""One set of artifacts for all tests; a fleet of its own for each."""

from __future__ import annotations

import pytest

from tests.end_to_end.stage import make_artifacts, open_stage


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    return make_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def stage(tmp_path, artifacts):
    with open_stage(tmp_path, artifacts) as opened:
        yield opened
