"""Every pass in `featherweight/passes` keeps the contract. There is no list: a new file is tested by being there."""

import pytest

from featherweight import passes
from featherweight.passes import Pass
from featherweight.testing import PassContract


class TestEveryPass(PassContract):
    @pytest.fixture(params=passes.names())
    def kind(self, request: pytest.FixtureRequest) -> type[Pass]:
        return passes.find(request.param)
