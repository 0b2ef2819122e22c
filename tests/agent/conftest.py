"""What tests of the whole agent share."""

from __future__ import annotations

import pytest

from tests.support.real_bundles import RealBundles, make_real_bundles


@pytest.fixture(scope="session")
def real_bundles(tmp_path_factory: pytest.TempPathFactory) -> RealBundles:
    return make_real_bundles(tmp_path_factory.mktemp("real"))
