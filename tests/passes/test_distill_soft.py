"""Distillation: it recovers what compression broke, through rounding too, and leaves everything else alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from featherweight.encodings import Affine, affine_scale
from featherweight.errors import LayerError, WorkloadError
from featherweight.losses import label_loss, soft_loss
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.surgery import encode, encoding_of, recording
from featherweight.testing import Depthwise, networks, run, state
from featherweight.workload import Batch, Workload, call, outputs, tensors


def workload_of(model: nn.Module, batches: list[Batch], **more) -> Workload:
    return Workload(model.eval(), batches[0], batches, lambda predict: 0.0, **more)


def damaged(model: nn.Module, size: float = 0.5) -> nn.Module:
    """A copy with noise on every weight, a share of its own size."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += size * p.square().mean().sqrt() * torch.randn_like(p)
    return model


def divergence(student: nn.Module, workload: Workload, batch: Batch) -> float:
    with torch.no_grad():
        return float(soft_loss(call(student, batch), call(workload.model, batch), 1.0))


# ------------------------------------------------------------------------------------------------ what it is for


@pytest.mark.parametrize("name", list(networks()))
def test_it_recovers_what_was_broken_with_one_default_rate(name):
    workload = networks()[name]
    student = damaged(workload.model)
    before = divergence(student, workload, workload.calibration[0])
    after = divergence(DistillSoft(epochs=20).apply(student, workload), workload, workload.calibration[0])
    assert after < 0.6 * before


def test_it_trains_through_rounding_where_rounding_alone_is_worse():
    """Quantization-aware training: codes stay codes, and the outputs come closer."""
    workload = networks()["mlp"]
    rounded = QuantizeWeights(bits=4).apply(copy.deepcopy(workload.model), workload)
    scales = [encoding_of(layer).scale.clone() for layer in rounded if isinstance(layer, nn.Linear)]
    before = divergence(rounded, workload, workload.calibration[0])
    trained = DistillSoft(epochs=30).apply(rounded, workload)
    after = divergence(trained, workload, workload.calibration[0])
    assert after < 0.5 * before
    found = [encoding_of(layer) for layer in trained if isinstance(layer, nn.Linear)]
    assert all(isinstance(encoding, Affine) and encoding.bits == 4 for encoding in found)
    assert all(torch.equal(encoding.scale, scale) for encoding, scale in zip(found, scales, strict=True))


def test_soft_targets_teach_more_than_hard_ones():
    """What the teacher says of the classes it rejects is worth having, when the student is judged by divergence."""
    workload = networks()["residual"]
    student = damaged(workload.model)

    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 50.0 * nn.functional.one_hot(workload.model(x).argmax(-1), 5).float()

    hard = Workload(Certain().eval(), workload.example, workload.calibration, workload.score)
    soft = DistillSoft(epochs=15).apply(copy.deepcopy(student), workload)
    certain = DistillSoft(epochs=15, temperature=1.0).apply(copy.deepcopy(student), hard)
    batch = workload.calibration[0]
    assert divergence(soft, workload, batch) < 0.5 * divergence(certain, workload, batch)


def test_true_labels_mend_what_the_teacher_gets_wrong():
    """A teacher that takes every second example for the next class, and data that knows better."""
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    true = x[:, :3].argmax(1)

    class Mistaken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.layer.weight.data = torch.eye(3, 6).roll(1, 0) * 3

        def forward(self, x):
            return self.layer(x)

    pairs = [((a,), b) for a, b in zip(x.split(32), true.split(32), strict=True)]
    workload = workload_of(Mistaken(), [(x[:32],)], train=pairs)

    def right(alpha: float) -> float:
        student = DistillSoft(alpha=alpha, epochs=40, lr=0.05).apply(copy.deepcopy(workload.model), workload)
        return float((student(x).argmax(1) == true).float().mean())

    assert right(0.0) < 0.1 and right(1.0) > 0.9


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_share_of_the_labels_is_their_share(alpha):
    batch, labels = (torch.randn(16, 4),), torch.randint(0, 3, (16,))
    workload = workload_of(nn.Linear(4, 3), [batch], train=[(batch, labels)])
    student = damaged(workload.model)
    found, wanted = student(*batch).detach(), workload.model(*batch).detach()
    soft, true = soft_loss(found, wanted, 2.0), label_loss(found, labels)
    with recording() as coverage:
        DistillSoft(steps=1, alpha=alpha).apply(student, workload)
    said = coverage.done[0][1]
    assert said.startswith("distilled 1 steps (kl and labels), loss ")
    assert float(said.split()[-1]) == pytest.approx(float((1 - alpha) * soft + alpha * true), rel=1e-2)


def test_labels_are_asked_for_where_there_are_none():
    batch = (torch.randn(16, 4),)
    for train, message in (
        (None, "train yields batches without targets"),
        ([(batch, torch.zeros(16))], "train yields targets of float32"),
        ([(batch, torch.zeros(16, 1, dtype=torch.long))], r"train yields targets of shape \(16, 1\)"),
    ):
        workload = workload_of(nn.Linear(4, 3), [batch], train=train)
        with pytest.raises(WorkloadError, match=f"distill_soft: alpha asks for the true labels, but {message}"):
            DistillSoft(alpha=0.5).apply(copy.deepcopy(workload.model), workload)
    workload = workload_of(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), [batch], train=[(batch, torch.zeros(16).long())])
    with pytest.raises(WorkloadError, match=r"distill_soft with alpha=0.5 needs logits.*\(16, 3\) of float32"):
        DistillSoft(alpha=0.5).apply(copy.deepcopy(workload.model), workload)


def test_batch_norms_take_their_statistics_anew_and_dropout_stays_off():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 3)
            self.seen = []

        def forward(self, x):
            self.seen.append((self.norm.training, self.drop.training))
            return self.head(self.drop(self.norm(x)))

    batches = [(3 * torch.randn(32, 4) + 5,) for _ in range(8)]
    workload = workload_of(Net(), batches)
    student = copy.deepcopy(workload.model)
    DistillSoft(epochs=5).apply(student, workload)
    assert set(student.seen) == {(True, False)}
    # the mean over the last ten batches of forty, which are all eight, two of them twice
    last = [batches[index % 8][0] for index in range(30, 40)]
    assert torch.allclose(student.norm.running_mean, torch.stack([x.mean(0) for x in last]).mean(0), atol=1e-4)
    assert student.norm.momentum == 0.1
    assert not any(module.training for module in student.modules())
    # a batch too small to normalise by, and a norm that where leaves out, keep the statistics
    single = workload_of(Net(), [(torch.randn(1, 4),)])
    for settings, data in (({}, single), ({"where": "head"}, workload)):
        student = copy.deepcopy(data.model)
        DistillSoft(**settings).apply(student, data)
        assert set(student.seen) == {(False, False)}
        assert torch.equal(student.norm.running_mean, torch.zeros(4))


# ------------------------------------------------------------------------------------------------ what it leaves alone


def test_only_the_chosen_layers_move_and_flags_stay():
    workload = networks()["mlp"]
    student = damaged(workload.model)
    student[2].bias.requires_grad_(False)
    encode(student[4], Affine(student[4].weight, affine_scale(student[4].weight, 8, 0), bits=8))
    before = copy.deepcopy(student)
    with recording() as coverage:
        DistillSoft(where="2").apply(student, workload)
    assert [layer for layer, _ in coverage.done] == ["2"]
    assert "distilled 4 steps (kl), loss" in coverage.done[0][1]
    moved = [
        name
        for (name, a), (_, b) in zip(student.named_parameters(), before.named_parameters(), strict=True)
        if not a.equal(b)
    ]
    assert moved == ["2.weight"]
    assert torch.equal(student[4].weight, before[4].weight)
    flags = [(name, p.requires_grad, p.grad) for name, p in student.named_parameters()]
    assert flags == [(name, p.requires_grad, None) for name, p in before.named_parameters()]


def test_the_same_seed_gives_the_same_network_and_the_teacher_is_untouched():
    workload = networks()["residual"]
    before = state(workload.model)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(state(DistillSoft().apply(damaged(workload.model), workload)))
    assert found[0] == found[1]
    assert state(workload.model) == before


# ------------------------------------------------------------------------------------------------ data


class Counted:
    """Re-iterable, without a length; counts what is taken from it."""

    def __init__(self, items):
        self.items, self.taken = items, 0

    def __iter__(self):
        for item in self.items:
            self.taken += 1
            yield item


def steps_of(workload: Workload, **settings) -> int:
    with recording() as coverage:
        DistillSoft(**settings).apply(copy.deepcopy(workload.model), workload)
    return int(coverage.done[0][1].split()[1])


def test_epochs_and_steps_bound_the_work():
    workload = networks()["mlp"]
    assert steps_of(workload) == 4
    assert steps_of(workload, epochs=2.5) == 10
    assert steps_of(workload, epochs=100.0, steps=7) == 7
    assert steps_of(workload, epochs=0.5, steps=7) == 2


def test_without_train_the_calibration_batches_are_used():
    model, batches = nn.Linear(3, 2), [(torch.randn(4, 3),) for _ in range(5)]
    assert steps_of(workload_of(model, batches)) == 5


@pytest.mark.parametrize("kind", ["batches", "pairs", "lists", "no length"])
def test_batches_and_pairs_are_told_apart(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    batch = (torch.randn(4, 3), torch.randn(4, 3))
    items = {"batches": [batch], "pairs": [(batch, torch.zeros(4))], "lists": [[list(batch), None]]}
    train = items.get(kind) or Counted([batch])
    assert steps_of(workload_of(Two(), [batch], train=train), epochs=3.0) == 3


def test_keyword_batches_and_pairs_of_them():
    workload = networks()["transformer"]
    assert steps_of(workload) == 4  # its train yields (dict, target)
    assert steps_of(Workload(workload.model, workload.example, workload.calibration, workload.score)) == 4


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "found no batches in train: it is empty"),
        (
            [(torch.randn(4, 3), torch.zeros(4))],
            r"no batch like example.*for one input and a label that is \(\(x,\), y\)",
        ),
        ([torch.randn(4, 3)], "train yields a Tensor"),
    ],
)
def test_data_that_is_no_data(train, message):
    workload = workload_of(nn.Linear(3, 2), [(torch.randn(4, 3),)], train=train)
    with pytest.raises(WorkloadError, match=message):
        DistillSoft().apply(copy.deepcopy(workload.model), workload)


def test_a_generator_that_runs_dry():
    workload = workload_of(nn.Linear(3, 2), [(torch.randn(4, 3),)], train=((torch.randn(4, 3),) for _ in range(3)))
    with pytest.raises(WorkloadError, match="can be iterated only once"):
        DistillSoft().apply(copy.deepcopy(workload.model), workload)


# ------------------------------------------------------------------------------------------------ outputs


class Several(nn.Module):
    """Class logits, logits for positions, a feature map, one number, and whole numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 3), nn.Linear(4, 3), nn.Conv2d(1, 2, 1), nn.Linear(4, 1)

    def forward(self, x):
        logits = self.a(x)
        return (
            logits,
            self.b(x[:, None].expand(-1, 5, -1)),
            {"map": self.c(x.view(-1, 1, 2, 2))},
            self.d(x),
            logits.argmax(-1),
        )


class Unit(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("loss", ["auto", "mse"])
def test_every_floating_output_is_learnt(loss):
    batches = [(torch.randn(32, 4),) for _ in range(4)]
    workload = workload_of(Several(), batches)
    student = damaged(workload.model)
    trained = DistillSoft(epochs=80, lr=0.03, loss=loss).apply(copy.deepcopy(student), workload)

    def errors(model: nn.Module) -> list[float]:
        found = outputs(call(model, batches[0]))
        wanted = outputs(call(workload.model, batches[0]))
        as_meant = [torch.softmax] * 2 + [lambda x, _: x] * 2  # logits are the same whatever is added to all of them
        return [(f(a, -1) - f(b, -1)).square().mean().item() for f, a, b in zip(as_meant, found, wanted, strict=False)]

    assert all(after < 0.2 * before for before, after in zip(errors(student), errors(trained), strict=True))


@pytest.mark.parametrize(("settings", "said"), [({}, "kl and mse"), ({"loss": "kl"}, "kl"), ({"loss": "mse"}, "mse")])
def test_it_says_which_loss_it_took(settings, said):
    workload = workload_of(Several(), [(torch.randn(32, 4),)])
    with recording() as coverage:
        DistillSoft(steps=1, **settings).apply(copy.deepcopy(workload.model), workload)
    assert all(what.startswith(f"distilled 1 steps ({said}), loss ") for _, what in coverage.done)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (nn.Identity(), "kl"),
        (nn.LayerNorm(3), "mse"),
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "mse"),
        (nn.Softmax(-1), "mse"),
        (Unit(), "mse"),
    ],
)
def test_hidden_states_and_embeddings_are_no_logits(last, said):
    workload = workload_of(nn.Sequential(nn.Linear(4, 3), last), [(torch.randn(32, 5, 4),)])
    with recording() as coverage:
        DistillSoft(steps=1).apply(copy.deepcopy(workload.model), workload)
    assert all(what.startswith(f"distilled 1 steps ({said}), loss ") for _, what in coverage.done)


def test_kl_and_mse_learn_different_things():
    """A constant added to all logits is nothing to a softmax, and everything to a regression."""
    workload = workload_of(nn.Linear(4, 3), [(torch.randn(32, 4),)])
    student = copy.deepcopy(workload.model)
    student.bias.data += 1.0
    kl = DistillSoft(epochs=50, lr=0.03, loss="kl").apply(copy.deepcopy(student), workload)
    mse = DistillSoft(epochs=50, lr=0.03, loss="mse").apply(copy.deepcopy(student), workload)
    shift = [(m.bias - workload.model.bias).mean().item() for m in (kl, mse)]
    assert shift[0] == pytest.approx(1.0, abs=0.05)
    assert shift[1] < 0.7


def test_nothing_to_compare():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x).argmax(-1)

    workload = workload_of(Whole(), [(torch.randn(4, 3),)])
    with pytest.raises(WorkloadError, match="nothing to compare: the model's 1 outputs are whole numbers"):
        DistillSoft().apply(copy.deepcopy(workload.model), workload)


def test_an_earlier_step_that_changed_the_shape():
    workload = workload_of(nn.Sequential(nn.Linear(3, 4)), [(torch.randn(4, 3),)])
    with pytest.raises(LayerError, match=r"returns \(4, 2\) where the original returns \(4, 4\)"):
        DistillSoft().apply(nn.Sequential(nn.Linear(3, 2)), workload)


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_no_number():
    workload = workload_of(nn.Linear(3, 2), [(torch.randn(4, 3),)])
    student = copy.deepcopy(workload.model)
    student.weight.data.fill_(math.inf)
    with pytest.raises(WorkloadError, match=r"NaN or infinite in step 1 with lr=0.01. Lower lr, to 0.001 say"):
        DistillSoft().apply(student, workload)
    broken = workload_of(nn.Linear(3, 2), [(torch.full((4, 3), math.nan),)])
    with pytest.raises(WorkloadError, match="the original model itself returned NaN"):
        DistillSoft().apply(copy.deepcopy(broken.model), broken)


def test_nothing_to_train():
    workload = networks()["mlp"]
    with pytest.raises(
        LayerError, match=r"matches none of the 3 layers of Sequential that can be trained. They are: 0, 2, 4"
    ):
        DistillSoft(where="5").apply(copy.deepcopy(workload.model), workload)
    frozen = copy.deepcopy(workload.model).requires_grad_(False)
    with pytest.raises(LayerError, match="Set requires_grad"):
        DistillSoft().apply(frozen, workload)


def test_it_is_quiet_where_nobody_watches(capsys):
    workload = networks()["mlp"]
    DistillSoft().apply(copy.deepcopy(workload.model), workload)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_images_and_depthwise_networks_do_not_depend_on_memory_layout():
    workload = networks()["depthwise"]
    trained = DistillSoft().apply(damaged(workload.model), workload)
    assert isinstance(trained, Depthwise)
    assert all(p.is_contiguous() for p in trained.parameters())
    (x,) = tensors(workload.example)
    (a,), (b,) = run(trained, (x,)), run(trained, (x.to(memory_format=torch.channels_last),))
    assert abs(a - b).max() < 1e-5
