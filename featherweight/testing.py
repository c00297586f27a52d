"""What every pass and every target must keep to, as test classes: for ours, and for yours.

    from featherweight.testing import PassContract

    class TestMyPass(PassContract):
        @pytest.fixture
        def kind(self):
            return MyPass

pytest collects the tests from the class. `networks` are small workloads that cover the common kinds of layers; a
pass need not treat them all, but what it treats must stay whole.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int64
from torch import Tensor, nn

from featherweight import hooks, passes, surgery, targets
from featherweight.encodings import (
    Affine,
    Codebook,
    Companded,
    DynamicQuantizer,
    Encoding,
    InputQuantizer,
    Scaled,
    affine_scale,
    fitting_block,
    grouped,
    in_parts,
    spanning_grid,
)
from featherweight.errors import LayerError, SettingError, TargetError
from featherweight.passes import Pass
from featherweight.recipe import Recipe, compress_model
from featherweight.settings import Choice, Range, Setting, check, settings_of
from featherweight.surgery import Coverage
from featherweight.targets import Target
from featherweight.workload import Batch, Predict, Workload, call, input_names, like, outputs, tensors

SOURCE = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})|doi:10\.\d{4,}/\S+|ISBN[ -]?[\d-]{9,}", re.IGNORECASE)
BATCHES = (1, 2, 5)

# ------------------------------------------------------------------------------------------------ networks


class Residual(nn.Module):
    """(n, 3, 12, 12) to (n, 5): a residual block with batch norms and a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Float[Tensor, "n 3 12 12"]) -> Float[Tensor, "n 5"]:
        x = self.stem(x)
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.relu(y + self.shortcut(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """(n, 3, 12, 12) to (n, 5): an inverted bottleneck, whose middle convolution has a group per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU6())
        self.middle = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.BatchNorm2d(48), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Float[Tensor, "n 3 12 12"]) -> Float[Tensor, "n 5"]:
        x = self.stem(x)
        return self.head(self.pool(x + self.narrow(self.middle(self.expand(x)))).flatten(1))


def mlp() -> nn.Sequential:
    """(n, 16) to (n, 5): three linear layers."""
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5))


class TransformerBlock(nn.Module):
    """(n, t, 32) and its mask (n, t) int64 to (n, t, 32): attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Float[Tensor, "n t 32"], mask: Int64[Tensor, "n t"]) -> Float[Tensor, "n t 32"]:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(2, (-1, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None, :])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens and mask, (n, t) int64 both, t <= 7, to (n, 5): embeddings, and two alike blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 32), nn.Embedding(7, 32)
        self.blocks = nn.ModuleList(TransformerBlock() for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Int64[Tensor, "n t"], mask: Int64[Tensor, "n t"]) -> Float[Tensor, "n 5"]:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(1))


class StackedBlock(nn.Module):
    """(n, 16) to (n, 16): a norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Float[Tensor, "n 16"]) -> Float[Tensor, "n 16"]:
        return self.down(F.gelu(self.up(self.norm(x))))


class Stacked(nn.Module):
    """(n, 16) to (n, 5): three alike blocks, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StackedBlock() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Float[Tensor, "n 16"]) -> Float[Tensor, "n 5"]:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _images(n: int) -> Batch:
    return (torch.randn(n, 3, 12, 12),)


def _rows(n: int) -> Batch:
    return (torch.randn(n, 16),)


def _sentences(n: int) -> Batch:
    mask = torch.arange(7) < torch.randint(3, 8, (n, 1))
    return {"ids": torch.randint(0, 40, (n, 7)), "mask": mask.long()}


@cache
def networks() -> dict[str, Workload]:
    """Small workloads by name: `residual`, `depthwise`, `mlp`, `transformer`, `stacked`; their data is noise.

    >>> {name: sum(p.numel() for p in workload.model.parameters()) for name, workload in networks().items()}
    {'residual': 15157, 'depthwise': 2805, 'mlp': 3333, 'transformer': 18757, 'stacked': 3397}
    """
    makers = {
        "residual": (Residual, _images),
        "depthwise": (Depthwise, _images),
        "mlp": (mlp, _rows),
        "transformer": (Transformer, _sentences),
        "stacked": (Stacked, _rows),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: _workload(model(), batch) for name, (model, batch) in makers.items()}


def _workload(model: nn.Module, batch_of: Any) -> Workload:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for _ in range(20):  # batch norms learn their statistics
            call(model, batch_of(32))
    model.eval()
    held_out = batch_of(64)
    with torch.no_grad():
        labels = call(model, held_out).argmax(-1)

    def accuracy(predict: Predict) -> list[float]:
        return (call(predict, held_out).argmax(-1) == labels).float().tolist()

    return Workload(
        model=model,
        example=batch_of(2),
        calibration=[batch_of(16) for _ in range(4)],
        score=accuracy,
        train=[(batch_of(16), torch.zeros(16)) for _ in range(4)],
    )


# ------------------------------------------------------------------------------------------------ helpers


def resized(batch: Batch, size: int) -> Batch:
    """`batch` with its examples repeated, or cut, to `size`."""
    values = [v.repeat(-(-size // len(v)), *[1] * (v.dim() - 1))[:size] for v in tensors(batch)]
    return like(batch, values)


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that a pass could have changed in a network: tensors, flags, modes and hooks, comparable with `==`."""
    found: list[tuple[Any, ...]] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.append((name, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, tensor.grad is None, raw))
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found.append((name, type(module).__name__, module.training, hooks))
    return found


def relative_error(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The norm of the difference over the norm of what was wanted; the largest over all outputs."""
    assert [a.shape for a in found] == [b.shape for b in wanted]
    errors = [np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30) for a, b in zip(found, wanted, strict=True)]
    return float(max(errors))


def run(model: nn.Module, batch: Batch) -> list[np.ndarray]:
    """The outputs of `model` on `batch` as arrays."""
    with torch.no_grad():
        return [tensor.numpy() for tensor in outputs(call(model, batch))]


def check_export(target: Target, model: nn.Module, workload: Workload, folder: Path) -> None:
    """Fails unless `target`, fed with batches of 1, 2 and 5, says what `model` says within its tolerance."""
    target.export(model, workload, folder)
    runner = target.load(folder, 1)
    for size in BATCHES:
        batch = resized(workload.calibration[0], size)
        found = runner([tensor.numpy() for tensor in tensors(batch)])
        error = relative_error(found, run(model, batch))
        assert error <= target.tolerance, f"batch {size}: the outputs of {target.name()} are off by {error:.2g}"


@cache
def compressed(step: Pass, network: str) -> tuple[nn.Module, Coverage] | None:
    """The network after one step, or None where the step has nothing to treat there."""
    try:
        return compress_model(Recipe((step,), "torch"), networks()[network])
    except LayerError:
        return None


def variants(kind: type[Pass]) -> list[Pass]:
    """The pass with its defaults, and with every other option of each setting that is a choice, one at a time."""
    found = [kind()]
    for setting in settings_of(kind).values():
        options = setting.limits.options if isinstance(setting.limits, Choice) else ()
        options = (True, False) if setting.type is bool else options
        found += [kind(**{setting.name: option}) for option in options if option != setting.default]
    return found


def values_out_of_range(setting: Setting) -> list[Any]:
    """Values that a setting must refuse: beyond its limits, not finite, of another type."""
    if isinstance(setting.limits, Range):
        low, high = setting.type(setting.limits.low), setting.type(setting.limits.high)
        return [low - 1, high + 1, "many", None] + ([math.nan, math.inf] if setting.type is float else [0.5])
    return [object(), None] if isinstance(setting.limits, Choice) else [object()]


# ------------------------------------------------------------------------------------------------ passes


class PassContract:
    """What every pass must keep to. Override the fixture `kind` to return the class of yours."""

    @pytest.fixture
    def kind(self) -> type[Pass]:
        raise NotImplementedError("override the fixture `kind` to return your subclass of Pass")

    @pytest.fixture(params=list(networks()))
    def network(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_cites_its_source(self, kind: type[Pass]) -> None:
        text = inspect.getdoc(sys.modules[kind.__module__]) or ""
        assert "Source:" in text, "the file's docstring must say where the technique comes from: 'Source: …'"
        assert SOURCE.search(text.partition("Source:")[2]), "a source has an arXiv number, a DOI or an ISBN"

    def test_documents_its_settings(self, kind: type[Pass]) -> None:
        assert not (kind.__doc__ or "").startswith(f"{kind.__name__}("), "the class needs a docstring"
        text = "\n".join(base.__doc__ or "" for base in kind.__mro__)
        for name in settings_of(kind).keys() - settings_of(Pass).keys():
            assert re.search(rf"^\s+{name}: ", text, re.MULTILINE), f"the docstring's Args do not explain {name!r}"

    def test_has_defaults_within_limits(self, kind: type[Pass]) -> None:
        assert kind() == kind(**{name: setting.default for name, setting in settings_of(kind).items()})

    def test_survives_yaml(self, kind: type[Pass]) -> None:
        for step in variants(kind):
            values = yaml.safe_load(yaml.safe_dump(step.settings()))
            assert kind(**check(kind, values, "step 1")) == step
            if kind.name() in passes.names():
                recipe = Recipe((step,), targets.names()[0])
                assert Recipe.from_yaml(recipe.to_yaml()) == recipe

    def test_refuses_values_out_of_range(self, kind: type[Pass]) -> None:
        for setting in settings_of(kind).values():
            for value in values_out_of_range(setting):
                with pytest.raises(SettingError, match=setting.name):
                    check(kind, {setting.name: value}, "step 1")

    def test_does_something_to_one_network_at_least(self, kind: type[Pass]) -> None:
        for step in variants(kind):
            treated = [name for name in networks() if compressed(step, name) is not None]
            assert treated, f"{step} changed none of {', '.join(networks())}"

    def test_names_layers_that_there_are(self, kind: type[Pass], network: str) -> None:
        for step in variants(kind):
            if (result := compressed(step, network)) is not None:
                before = dict(networks()[network].model.named_modules())
                assert {layer for layer, _ in [*result[1].done, *result[1].left]} <= before.keys()

    def test_refuses_a_pattern_that_matches_nothing(self, kind: type[Pass], network: str) -> None:
        with pytest.raises(LayerError):
            compress_model(Recipe((kind(where="no.such.layer"),), "torch"), networks()[network])

    def test_leaves_the_workload_as_it_was_and_never_scores(self, kind: type[Pass], network: str) -> None:
        def score(predict: Predict) -> float:
            raise AssertionError("a pass called score")

        workload = replace(networks()[network], score=score, test_score=score)
        before, data = state(workload.model), [t.clone() for batch in workload.calibration for t in tensors(batch)]
        with suppress(LayerError):  # what has nothing to treat here is seen elsewhere
            compress_model(Recipe((kind(),), "torch"), workload)
        assert state(workload.model) == before
        assert all(map(torch.equal, data, [t for batch in workload.calibration for t in tensors(batch)]))

    def test_is_deterministic_under_a_seed(self, kind: type[Pass], network: str) -> None:
        if (result := compressed(kind(), network)) is None:
            return
        again, coverage = compress_model(Recipe((kind(),), "torch"), networks()[network])
        assert state(again) == state(result[0])
        assert coverage == result[1]

    def test_leaves_a_network_ready_to_run(self, kind: type[Pass], network: str) -> None:
        for step in variants(kind):
            if (result := compressed(step, network)) is None:
                continue
            model, batch = result[0], networks()[network].calibration[0]
            assert not any(module.training for module in model.modules())
            assert all(p.grad is None for p in model.parameters())
            assert not any(name.endswith(".latent") for name, _ in model.named_parameters())
            original = run(networks()[network].model, batch)
            for size in BATCHES:
                found = run(model, resized(batch, size))
                assert [a.shape for a in found] == [(size, *b.shape[1:]) for b in original]
                assert all(np.isfinite(array).all() for array in found)

    def test_exports_with_outputs_that_agree(self, kind: type[Pass], network: str, tmp_path: Path) -> None:
        """Each network goes to one target, in turn, so that every target sees some; all of them would take minutes."""
        if (result := compressed(kind(), network)) is not None:
            installed = targets.installed()
            turn = sum(map(ord, kind.name())) + list(networks()).index(network)
            target = installed[turn % len(installed)]
            check_export(targets.find(target), result[0], networks()[network], tmp_path)


# ------------------------------------------------------------------------------------------------ targets


def _with_offsets(weight: Tensor, bits: int, block: int) -> Affine:
    block = fitting_block(weight[0].numel(), block)
    found = in_parts(grouped(weight, block) if block else weight.flatten(1), partial(spanning_grid, bits=bits))
    return Affine(weight, found[..., 0], bits=bits, axis=0, block=block, offset=found[..., 1])


def _affine(weight: Tensor, bits: int, block: int = 0) -> Affine:
    block = block if block and weight[0].numel() % block == 0 else 0
    return Affine(weight, affine_scale(weight, bits, 0, block), bits=bits, axis=0, block=block)


def _codebook(weight: Tensor, values: int) -> Codebook:
    return Codebook(weight, weight.flatten().quantile(torch.linspace(0, 1, values)))


def _codebooks(weight: Tensor, values: int) -> Codebook:
    return Codebook(weight, weight.flatten(1).quantile(torch.linspace(0, 1, values), dim=1).T.half())


def _codebook_of_halves(weight: Tensor, values: int) -> Codebook:
    tables = weight.reshape(2, -1).quantile(torch.linspace(0, 1, values), dim=1).T
    scale = tables.abs().amax(1, keepdim=True) / 127
    return Codebook(weight, (tables / scale).round().to(torch.int8), scale)


def _companded(weight: Tensor, bits: int, curve: str, strength: float) -> Companded:
    return Companded(weight, weight.abs().flatten(1).amax(1), bits=bits, curve=curve, strength=strength)


def _scaled(weight: Tensor, narrow: str, most: float) -> Scaled:
    return Scaled(weight, weight.abs().flatten(1).amax(1) / most, narrow=narrow)


# Every stored form by a name, with the share of the bytes of a dense file that it may take.
FORMS: dict[str, tuple[float, Callable[[Tensor], Encoding]]] = {
    **{f"int{b}": (0.2 if b <= 4 else 0.3, partial(_affine, bits=b)) for b in range(2, 9)},
    **{f"int{b} blocks": (0.25 if b <= 4 else 0.35, partial(_affine, bits=b, block=16)) for b in (3, 4, 6)},
    "int4 blocks, offsets": (0.35, lambda weight: _with_offsets(weight, 4, 16)),
    "codebook of 16": (0.2, lambda weight: _codebook(weight, 16)),
    "codebook of 200": (0.3, lambda weight: _codebook(weight, 200)),
    "codebook per channel": (0.2, lambda weight: _codebooks(weight, 16)),
    "codebook of 16 per half": (0.2, lambda weight: _codebook_of_halves(weight, 16)),
    "codebook of 20 per channel": (0.35, lambda weight: _codebooks(weight, 20)),
    "int8 on log": (0.3, lambda weight: _companded(weight, 8, "log", 7.0)),
    "int8 on power": (0.3, lambda weight: _companded(weight, 8, "power", 1.5)),
    "int4 on mu": (0.2, lambda weight: _companded(weight, 4, "mu", 20.0)),
    "float16": (0.55, lambda weight: _scaled(weight, "float16", 3e4)),
    "bfloat16": (0.55, lambda weight: _scaled(weight, "bfloat16", 1.0)),
    "float8": (0.3, lambda weight: _scaled(weight, "float8", 300.0)),
    "scaled int8": (0.3, lambda weight: _scaled(weight, "int8", 127.0)),
}


def _encoded(network: str, what: str) -> nn.Module:
    """The network with all its weights, and its linear and convolutional layers' inputs, encoded as `what` says.

    That is `int` and the bits, then nothing or `blocks`, `static` or `dynamic`.
    """
    model, workload = copy.deepcopy(networks()[network].model), networks()[network]
    weighted = surgery.select(model, "*", (nn.Conv2d, nn.Linear))
    ranges: dict[str, tuple[float, float]] = {}
    hooks.watch_inputs(
        model, weighted, workload.calibration, lambda name, x: ranges.update({name: (float(x.min()), float(x.max()))})
    )
    names = list(FORMS) if what == "one of each form" else [what if what in FORMS else what.split()[0]]
    layers = surgery.select(model, "*", (nn.Conv2d, nn.Linear, nn.Embedding))
    for (name, layer), form in zip(layers.items(), cycle(names)):
        weight = layer.weight.detach()  # type: ignore[operator]
        surgery.encode(layer, FORMS[form][1](weight))
        if what.endswith("static") and name in weighted:
            surgery.quantize_input(layer, InputQuantizer(*ranges[name]))
        if what.endswith("dynamic") and isinstance(layer, nn.Linear):
            surgery.quantize_input(layer, DynamicQuantizer())
    return model


class TargetContract:
    """What every target must keep to. Override the fixture `target` to return an instance of yours."""

    @pytest.fixture
    def target(self) -> Target:
        raise NotImplementedError("override the fixture `target` to return an instance of your Target")

    @pytest.fixture(params=list(networks()))
    def network(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_runs_floats_as_torch_does(self, target: Target, network: str, tmp_path: Path) -> None:
        workload = networks()[network]
        check_export(target, workload.model, workload, tmp_path)
        batch = workload.calibration[0]
        found = target.load(tmp_path, 1)([tensor.numpy() for tensor in tensors(batch)])
        assert relative_error(found, run(workload.model, batch)) < 1e-4

    @pytest.mark.parametrize("what", ["int8", "int4", "int4 blocks", "int8 static", "int8 dynamic", "one of each form"])
    def test_runs_encoded_networks_as_torch_does(self, target: Target, network: str, what: str, tmp_path: Path) -> None:
        check_export(target, _encoded(network, what), networks()[network], tmp_path)

    @pytest.mark.parametrize("what", ["int2", "int3 blocks", "int6 blocks", "int7", "int5 static", "int6 dynamic"])
    def test_runs_other_widths_as_torch_does(self, target: Target, what: str, tmp_path: Path) -> None:
        check_export(target, _encoded("residual", what), networks()["residual"], tmp_path)

    @pytest.mark.parametrize("what", FORMS)
    def test_stores_what_is_stored(self, target: Target, what: str, tmp_path: Path) -> None:
        largest_share, form = FORMS[what]
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
        dense_bytes = sum(4 * p.numel() for p in model.parameters())
        for layer in surgery.select(model, "*", (nn.Linear,)).values():
            surgery.encode(layer, form(layer.weight.detach()))  # type: ignore[operator]
        x = torch.randn(2, 512)
        target.export(model, Workload(model, (x,), [], lambda _: 0.0), tmp_path)
        written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert written < largest_share * dense_bytes
        assert relative_error(target.load(tmp_path, 1)([x.numpy()]), run(model, (x,))) <= target.tolerance

    def test_profiles_what_it_runs(self, target: Target, network: str, tmp_path: Path) -> None:
        workload = networks()[network]
        target.export(workload.model, workload, tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        kernels = target.profile(tmp_path, [tensor.numpy() for tensor in tensors(workload.example)], 1)
        assert kernels, "no operator is reported"
        assert all(kernel.latency_ms >= 0 and kernel.kind and kernel.precision for kernel in kernels)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_what_it_returned_stays_as_it_was(self, target: Target, tmp_path: Path) -> None:
        workload = networks()["mlp"]
        target.export(workload.model, workload, tmp_path)
        load = target.load(tmp_path, 1)
        for size in BATCHES:
            batch = resized(workload.example, size)
            inputs = [tensor.numpy() for tensor in tensors(batch)]
            (first,) = load(inputs)
            kept, given = first.copy(), [array.copy() for array in inputs]
            load([array + 1 for array in inputs])
            assert np.array_equal(first, kept) and all(map(np.array_equal, inputs, given))

    def test_names_the_extra_where_its_runtime_is_missing(
        self, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if target.name() not in targets.names():
            pytest.skip("only targets in featherweight/targets are found by name")
        monkeypatch.setattr(type(target), "requires", ("no_such_runtime",))
        with pytest.raises(TargetError, match=re.escape(f"featherweight[{target.extra}]")):
            targets.find.__wrapped__(target.name())

    def test_runs_in_a_process_without_torch(self, target: Target) -> None:
        if "torch" in target.requires or target.name() not in targets.names():
            pytest.skip("it is torch itself, or no target of ours")
        workload = networks()["mlp"]
        script = (
            "import sys, numpy as np; from featherweight import targets; from pathlib import Path\n"
            f"run = targets.find({target.name()!r}).load(Path(sys.argv[1]), 1)\n"
            "np.save(Path(sys.argv[1]) / 'found.npy', run([np.load(Path(sys.argv[1]) / 'x.npy')])[0])\n"
            "assert 'torch' not in sys.modules, 'torch was imported'\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            target.export(workload.model, workload, Path(folder))
            (x,) = tensors(workload.example)
            np.save(Path(folder) / "x.npy", x.numpy())
            done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            found = np.load(Path(folder) / "found.npy")
        assert relative_error([found], run(workload.model, workload.example)) < 1e-4

    def test_takes_inputs_in_the_order_of_the_workload(self, target: Target, tmp_path: Path) -> None:
        workload = networks()["transformer"]
        assert isinstance(workload.example, Mapping)
        assert input_names(workload.model, workload.example) == ("ids", "mask")
        swapped = replace(workload, example=dict(reversed(list(workload.example.items()))))
        target.export(workload.model, swapped, tmp_path)
        found = target.load(tmp_path, 1)([tensor.numpy() for tensor in tensors(swapped.example)])
        assert relative_error(found, run(workload.model, workload.example)) < 1e-4
