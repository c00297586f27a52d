"""The teacher answers each question once, and anew when it has changed."""

import torch
from torch import nn

from featherweight import teacher
from featherweight.teacher import teacher_of
from featherweight.workload import Batch, tensors


def test_the_teacher_is_asked_once_about_a_batch_and_anew_after_it_changed(monkeypatch):
    asked = []
    model = nn.Linear(4, 2)
    model.register_forward_hook(lambda *_: asked.append(1))
    batches: list[Batch] = [(torch.randn(3, 4),), {"input": torch.randn(3, 4)}]
    for batch in batches * 2:
        assert torch.equal(teacher_of(model)(batch)[0], model(tensors(batch)[0]))
    assert len(asked) == 2 + 4  # the teacher, and the comparison
    with torch.no_grad():
        model.bias.add_(1.0)
    assert torch.equal(teacher_of(model)(batches[0])[0], model(batches[0][0]))
    assert len(asked) == 8

    monkeypatch.setattr(teacher, "MEMORY", 3 * 2 * 4)  # room for one answer
    other = nn.Linear(4, 2)
    other.register_forward_hook(lambda *_: asked.append(1))
    for batch in batches * 2:
        teacher_of(other)(batch)
    assert len(asked) == 8 + 3
