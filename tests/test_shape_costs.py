"""What shapes would cost: on a made-up table, where a layer takes as long as it has weights."""

from __future__ import annotations

import dataclasses

import pytest

from featherweight import shape_costs
from featherweight.candidates import Facts, Shape
from featherweight.cost_table import CostTable, candidates, shapes_of
from featherweight.errors import ArtifactError
from featherweight.testing import networks

TARGET = "onnxruntime"
FACTS = Facts((TARGET,), folds=False, linear=True, epochs=1.0, blocks=3, multiples={TARGET: 8})


@pytest.fixture
def stacked():
    return networks()["stacked"]


@pytest.fixture
def table(stacked):
    own = [shape for shapes in shapes_of(stacked.model, stacked).values() for shape in shapes]
    entries = {("int8", s): s.inputs * s.outputs / 1000 for shape in own for s in candidates(shape, 8)}
    return CostTable(TARGET, 1, 1, own, entries)


def test_shapes_cost_what_their_layers_do_in_proportion_to_what_the_whole_network_took(stacked, table):
    found = shape_costs.predicted(stacked, FACTS, table, "int8", 2 * (3 * 2 * 16 * 32 + 16 * 5) / 1000)
    whole = found[Shape(0.0)]
    assert whole == pytest.approx(2 * (3 * 2 * 16 * 32 + 16 * 5) / 1000, rel=0.05)
    assert found[Shape(0.4)] < found[Shape(0.2)] < whole  # 24 and 32 of 32 features stay where 8 go at a time
    saved = [found[Shape(0.0, dropped)] - found[Shape(0.0, dropped + 1)] for dropped in (0, 1)]
    assert saved[0] == pytest.approx(saved[1]) and saved[0] > 0.3 * whole
    assert found[Shape(0.8, 2)] == min(found.values()) > 0


def test_without_blocks_there_are_shares_alone(stacked, table):
    found = shape_costs.predicted(stacked, dataclasses.replace(FACTS, blocks=0), table, "int8", 6.0)
    assert [shape.dropped for shape in found] == [0] * (shape_costs.PARTS + 1)


def test_predictions_are_read_again_for_the_same_search_only(tmp_path):
    path, found = tmp_path / "shapes.json", {Shape(0.0): 2.0, Shape(0.2, 1): 1.5}
    assert shape_costs.stored(path, {"target": TARGET}) == {}
    shape_costs.store(path, {"target": TARGET, "versions": {"a": "1"}}, found)
    assert shape_costs.stored(path, {"target": TARGET, "versions": {"a": "1"}}) == found
    assert shape_costs.stored(path, {"target": TARGET, "versions": {"a": "2"}}) == {}
    for broken in ("{", '{"key": {}}', '{"key": {}, "shapes": [[1]]}', "[]"):
        path.write_text(broken)
        with pytest.raises(ArtifactError, match=r"shapes.json holds no predictions of this version.*Delete it"):
            shape_costs.stored(path, {})
