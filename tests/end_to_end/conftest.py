"""One set of artifacts for all tests; a fleet of its own for each."""

from __future__ import annotations

import pytest

from tests.end_to_end.deep import publish_deep
from tests.end_to_end.stage import make_artifacts, open_stage


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    return make_artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def deep_artifacts(tmp_path_factory, artifacts):
    """The same, and a second, slower model beside them (`deep.DEEP`)."""
    publish_deep(tmp_path_factory.mktemp("deep"), artifacts)
    return artifacts


@pytest.fixture
def stage(tmp_path, artifacts):
    with open_stage(tmp_path, artifacts) as opened:
        yield opened


@pytest.fixture
def deep_stage(tmp_path, deep_artifacts):
    """With both models, and a controller that soon takes a silent device for away."""
    with open_stage(tmp_path, deep_artifacts, offline_after_s=3.0) as opened:
        yield opened
