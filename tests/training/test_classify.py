"""Training a classifier."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook.training import Recipe, fit
from gatebook.training.classify import fit_classifier


@pytest.mark.parametrize("shares", [False, True])
def test_it_is_fit_with_cross_entropy(shares: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (8,), generator=draw)
    labels = F.one_hot(labels, 3).float() if shares else labels
    batches = [(torch.randn(8, 1, 4, 4, generator=draw), labels)] * 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    other, recipe = copy.deepcopy(model), Recipe(steps=5, lr=0.1)
    history = fit_classifier(model, batches, recipe)
    fit(other, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), recipe)
    assert history.loss[-1] < history.loss[0]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
