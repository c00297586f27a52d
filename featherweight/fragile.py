"""Which layers int8 harms most, for the search to leave them in floats when int8 as a whole loses too much.

    g_l = D(f_8) − D(f_8 with layer l in floats),   D(f) = ‖f(x) − f_32(x)‖² / ‖f_32(x) − mean f_32‖²

over calibration data, one layer at a time. That gains add up is an assumption; how many layers are put back, artifacts
decide.

Source: Nvidia 2020, arXiv:2004.09602, section 5.1, for layers judged one by one, there by the score; by the outputs,
for a score is too coarse to tell layers apart and may need labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from featherweight.damage import damage, examples_to_compare, floating_outputs
from featherweight.surgery import input_quantizer, replace
from featherweight.workload import Workload


def worst_first(rounded: nn.Module, exact: nn.Module, workload: Workload) -> list[str]:
    """The layers of `rounded` without which it would be nearer to `exact`, by how much, the most first.

    Args:
        rounded: a network some of whose layers read inputs in int8.
        exact: the same in floats, with the same names.
        workload: whose calibration data are run.

    Raises:
        LayerError: the network returns nothing that can be compared.
    """
    batch = examples_to_compare(exact, workload, "the search")
    wanted = floating_outputs(exact, batch, "the search")
    whole = damage(floating_outputs(rounded, batch, "the search"), wanted)
    gains = {}
    for name in [name for name, module in rounded.named_modules() if input_quantizer(module) is not None]:
        with _put_back(rounded, name, exact):
            gains[name] = whole - damage(floating_outputs(rounded, batch, "the search"), wanted)
    return sorted((name for name in gains if gains[name] > 0), key=lambda name: -gains[name])


@contextlib.contextmanager
def _put_back(model: nn.Module, name: str, exact: nn.Module) -> Iterator[None]:
    """Inside the block the layer called `name` is that of `exact`."""
    before = model.get_submodule(name)
    replace(model, name, exact.get_submodule(name))
    try:
        yield
    finally:
        replace(model, name, before)
