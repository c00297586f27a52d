"""Every installed target keeps the contract. There is no list: a new file is tested by being there."""

import pytest

from featherweight import targets
from featherweight.targets import Target
from featherweight.testing import TargetContract


class TestEveryTarget(TargetContract):
    @pytest.fixture(params=targets.installed())
    def target(self, request: pytest.FixtureRequest) -> Target:
        return targets.find(request.param)
