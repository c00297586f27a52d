from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra.numpy import arrays

from featherweight.combining import check_way, combined
from featherweight.errors import SettingError

SCORES = arrays(np.float32, (5, 3), elements=some.floats(-10, 10, width=32))


@given(some.lists(SCORES, min_size=1, max_size=4))
def test_the_mean_is_that_of_numpy(outputs):
    found = combined("mean", outputs, [1.0] * len(outputs))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.mean(np.stack(outputs).astype(np.float64), axis=0), atol=1e-5)


@given(SCORES, SCORES)
def test_weights_that_are_alike_change_nothing(a, b):
    assert np.array_equal(combined("mean", [a, b], [1, 1]), combined("mean", [a, b], [7, 7]))


@given(SCORES)
def test_a_network_of_twice_the_weight_counts_as_two(a):
    b = a[::-1].copy()
    np.testing.assert_allclose(combined("mean", [a, b], [2, 1]), combined("mean", [a, a, b], [1, 1, 1]), atol=1e-5)
    assert np.array_equal(combined("vote", [a, b], [2, 1]), combined("vote", [a, a, b], [1, 1, 1]))


def test_a_majority_outvotes_the_loudest():
    quiet, loud = np.array([[0.1, 0.2]]), np.array([[9.0, 0.0]])
    assert combined("vote", [quiet, loud, quiet], [1, 1, 1]).tolist() == [1]
    assert combined("mean", [quiet, loud, quiet], [1, 1, 1]).argmax() == 0


def test_a_tie_goes_to_the_higher_mean():
    a, b = np.array([[3.0, 0.0, 2.0]]), np.array([[0.0, 1.0, 0.5]])
    assert combined("vote", [a, b], [1, 1]).tolist() == [0]  # not to the third, which nobody chose


@pytest.mark.parametrize(
    ("way", "weights", "message"),
    [
        ("median", [1, 1], "no way 'median' .* There are: mean, vote"),
        ("mean", [1], "1 weights for 2 networks"),
        ("mean", [1, 0], "not all above zero"),
        ("mean", [1, float("nan")], "not all above zero"),
    ],
)
def test_what_makes_no_sense_is_refused(way, weights, message):
    with pytest.raises(SettingError, match=message):
        check_way(way, weights, networks=2)
