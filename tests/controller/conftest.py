"""A controller for each test."""

from __future__ import annotations

import pytest

from tests.controller.harness import fleet, make_home


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path / "controller")


@pytest.fixture
def world(home):
    with fleet(home) as made:
        yield made
