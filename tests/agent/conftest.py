"""What tests of the whole agent share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.real_bundles import RealBundles


@pytest.fixture(scope="session")
def real_bundles(tmp_path_factory: pytest.TempPathFactory) -> RealBundles:
    # Imported here: it needs torch, and most of the agent's tests do not.
    from tests.support.real_bundles import make_real_bundles

    return make_real_bundles(tmp_path_factory.mktemp("real"))
