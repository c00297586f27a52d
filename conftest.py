"""What holds in every test run, doctests included: shapes are checked, torch has one thread, and chance is seeded.

It lies at the root, not in tests/, so that it is read before any module of featherweight is imported, whichever
files pytest is asked to run.
"""

from __future__ import annotations

import random

import jaxtyping
import numpy as np
import pytest
import torch

# Only modules that import the names in their signatures at the top: the others would not resolve.
CHECKED = [
    f"featherweight.{name}"
    for name in (
        "encodings",
        "masks",
        "surgery",
        "gram",
        "rescaling",
        "coupling",
        "damage",
        "ensemble",
        "low_rank",
        "losses",
        "passes",
    )
]

# torch.library.custom_op reads annotations that are strings in the globals of the function it is given: here the
# checker's wrapper, which lacks the names.
vars(jaxtyping._decorator).update(torch=torch, Tensor=torch.Tensor)
jaxtyping.install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what we call may draw from it
    torch.manual_seed(0)
