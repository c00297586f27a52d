from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import damage, damage_table
from featherweight.allocation import Option, least_harmful, total_cost
from featherweight.damage_table import FLOAT, WAYS, damages, steps_of
from featherweight.damage_table import damage_table as table_in
from featherweight.errors import ArtifactError
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import encoding_of
from featherweight.testing import networks, relative_error, run, state
from featherweight.workload import Workload

KEY = {"fingerprint": "0", "versions": {"torch": "2"}}


def table_of(model: nn.Module, workload: Workload, path: Path, key: dict) -> list[Option]:
    """The whole table, measured here."""
    return table_in(model, path, key, functools.partial(damages, model, workload))


class Uneven(nn.Module):
    """A layer in the middle that hardly matters, between two that do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hardly, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.last(h + 0.01 * self.hardly(h))


@pytest.fixture
def workload() -> Workload:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 32),) for _ in range(4)]
    return Workload(Uneven().eval(), (batches[0][0][:2],), batches, lambda predict: 0.0)


def test_every_layer_has_every_way_and_bytes_are_those_of_the_encoding(workload, tmp_path):
    before = state(workload.model)
    table = table_of(workload.model, workload, tmp_path / "d.json", KEY)
    assert {(o.layer, o.choice) for o in table} == {(n, w) for n in ("first", "hardly", "last") for w in (FLOAT, *WAYS)}
    assert state(workload.model) == before
    for way in WAYS:
        chosen = {o.layer: o for o in table if o.choice == way}
        stored, _ = compress_model(Recipe(steps_of(chosen), "torch"), workload)
        found = dict.fromkeys(chosen, 0)
        for name, layer in stored.named_modules():
            if isinstance(layer, nn.Linear):  # a factor may be too thin for scales
                tensors = [layer.weight] if (encoding := encoding_of(layer)) is None else encoding.buffers()
                found[name.split(".")[0]] += sum(tensor.nbytes for tensor in tensors)
        assert found == {o.layer: o.cost for o in chosen.values()}


@pytest.mark.parametrize(("values", "count"), [(1 << 24, 64), (1600, 40), (10, damage.FEWEST)])
def test_fewer_examples_are_compared_where_each_returns_much(values, count, monkeypatch):
    workload = Workload(nn.Linear(32, 40), (torch.randn(2, 32),), [(torch.randn(64, 32),)] * 2, lambda predict: 0.0)
    monkeypatch.setattr(damage, "VALUES", values)
    assert len(damage.examples_to_compare(workload.model, workload, "here")[0]) == count


@pytest.mark.parametrize(
    ("there", "values", "compared", "others"),
    [(200, 1 << 24, 64, 64), (100, 1 << 24, 50, 50), (200, 400, 10, 40), (7, 1 << 24, 3, 4), (1, 1 << 24, 1, 1)],
)
def test_what_is_compared_and_what_others_are_fitted_to_lie_apart(there, values, compared, others, monkeypatch):
    rows = torch.arange(32.0 * there).reshape(there, 32)
    workload = Workload(nn.Linear(32, 40), (rows[:2],), [(part,) for part in rows.split(30)], lambda predict: 0.0)
    monkeypatch.setattr(damage, "VALUES", values)
    (first,), (second,) = damage.examples_apart(workload.model, workload, "here")
    assert (len(first), len(second)) == (compared, others)
    together = torch.cat([first, second])[:there]
    assert torch.equal(together, rows[: len(together)])


def test_a_table_is_of_examples_to_which_nothing_was_fitted(tmp_path):
    """Of a table of 400 words those that are compared read eight, which factors of rank eight could meet exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 32), nn.Flatten(), nn.Linear(64, 8)).eval()
    ids = [(torch.randint(first, first + 8, (30, 2)),) for first in (0, 8)]
    workload = Workload(model, (ids[0][0][:2],), ids, lambda predict: 0.0)
    way = "half of the weights, 4 bits"
    (option,) = [o for o in table_of(model, workload, tmp_path / "d.json", KEY) if (o.layer, o.choice) == ("0", way)]
    whole, _ = compress_model(
        Recipe(steps_of({"0": option}), "torch"), dataclasses.replace(workload, calibration=ids[:1])
    )
    fitted, unseen = (
        damage.damage(*(damage.floating_outputs(net, (words,), "here") for net in (whole, model)))
        for words in (ids[0][0], torch.randint(16, 400, (500, 2)))
    )
    assert fitted < 0.1 * unseen and option.damage > 0.5 * unseen


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_entries_are_those_of_networks_that_are_computed_whole(kind, tmp_path, monkeypatch):
    made = networks()[kind]
    table = table_of(made.model, made, tmp_path / "d.json", KEY)
    monkeypatch.setattr(damage_table, "replaying", lambda *_, **__: contextlib.nullcontext())
    assert table == table_of(made.model, made, tmp_path / "whole.json", KEY)


def test_layers_are_factorized_first_and_their_factors_stored_with_layers_in_the_same_bits():
    chosen = {"a": "half of the weights, 4 bits", "b": "4 bits in blocks of 32", "c": "16 shared values"}
    steps = steps_of({layer: Option(layer, way, 0.1, 1.0) for layer, way in chosen.items()})
    assert [(step.name(), step.where) for step in steps] == [
        ("factorize_svd", "a"),
        ("quantize_weights", "a, a.0, a.1, b"),
        ("cluster_kmeans", "c"),
    ]


def test_factors_do_less_harm_where_the_weight_is_of_low_rank(workload, tmp_path):
    with torch.no_grad():
        thin = torch.randn(64, 4) @ torch.randn(4, 64) / 16
        workload.model.hardly.weight.copy_(thin)
        workload.model.first.weight.copy_(torch.randn(64, 32) / 6)
    table = table_of(workload.model, workload, tmp_path / "d.json", KEY)
    quarter = {o.layer: o for o in table if o.choice == "a quarter of the weights, 4 bits"}
    four = {o.layer: o for o in table if o.choice == "4 bits in blocks of 32"}
    assert quarter["hardly"].cost < 0.35 * four["hardly"].cost
    assert quarter["hardly"].damage < 3 * four["hardly"].damage
    assert quarter["first"].damage > 10 * four["first"].damage


def test_what_hardly_matters_is_stored_in_fewer_bits(workload, tmp_path):
    table = table_of(workload.model, workload, tmp_path / "d.json", KEY)
    four = {o.layer: o for o in table if o.choice == "4 bits, errors fed on"}
    assert four["hardly"].damage < 0.01 * min(four["first"].damage, four["last"].damage)
    eight = {o.layer: o for o in table if o.choice == "8 bits"}
    found = least_harmful(table, eight["first"].cost + four["hardly"].cost + eight["last"].cost)
    assert found["hardly"].cost <= four["hardly"].cost and found["first"].cost > 1.5 * four["first"].cost
    small, _ = compress_model(Recipe(steps_of(found), "torch"), workload)
    assert relative_error(run(small, workload.example), run(workload.model, workload.example)) < 0.02
    assert total_cost(found) < sum(o.cost for o in table if o.choice == FLOAT) / 2


def test_entries_that_lie_on_disk_are_not_measured_again(workload, tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    whole = table_of(workload.model, workload, path, KEY)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "options": stored["options"][:-3]}))
    asked = []
    real = damage_table.damage
    monkeypatch.setattr(damage_table, "damage", lambda *a: asked.append(a) or real(*a))
    assert table_of(workload.model, workload, path, KEY) == whole and len(asked) == 3
    table_of(workload.model, workload, path, {**KEY, "fingerprint": "another"})
    assert len(asked) == 3 + len(whole) - 3  # all but those that leave a layer as it is


def test_a_table_that_cannot_be_read_is_named(workload, tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"key": KEY, "options": [{"layer": "first"}]}))
    with pytest.raises(ArtifactError, match=r"d\.json holds no table of this version.*Delete it"):
        table_of(workload.model, workload, path, KEY)


@pytest.mark.parametrize("name", networks())
def test_all_kinds_of_networks_have_a_table(name, tmp_path):
    workload = networks()[name]
    table = table_of(workload.model, workload, tmp_path / "d.json", KEY)
    assert all(0 <= option.damage < 10 and option.cost > 0 for option in table)
    smallest = {o.layer: o for o in sorted(table, key=lambda o: -o.cost)}
    compress_model(Recipe(steps_of(smallest), "torch"), workload)
