"""Losses of sequence models, on logits whose loss is known."""

import math

import torch
from torch import nn

from gatebook.measure.sequence import IGNORE, loss_by_position, sequence_loss


class Uniform(nn.Module):
    """Equal logits for 4 tokens, except that position 0 puts all weight on token 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 4) + self.weight
        logits[:, 0, 0] = 1000.0
        return logits


def test_mean_loss_leaves_out_ignored_targets():
    targets = torch.tensor([[IGNORE, 1, 2], [IGNORE, IGNORE, 3]])
    loss = sequence_loss(Uniform(), (torch.zeros(2, 3, dtype=torch.long), targets))
    torch.testing.assert_close(loss.item(), math.log(4), atol=1e-6, rtol=0)


def test_loss_by_position_averages_over_sequences_and_batches():
    batches = [
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, IGNORE], [0, IGNORE, IGNORE]])),
        (torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 3, IGNORE]])),
    ]
    found = loss_by_position(Uniform(), batches)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, math.log(4)]))
    assert found[2].isnan()


def test_classes_leave_the_other_logits_out():
    targets = torch.tensor([[IGNORE, 1, 0]])
    batch = (torch.zeros(1, 3, dtype=torch.long), targets)
    loss = sequence_loss(Uniform(), batch, classes=2)
    torch.testing.assert_close(loss.item(), math.log(2), atol=1e-6, rtol=0)
    found = loss_by_position(Uniform(), [batch], classes=2)
    torch.testing.assert_close(found[1:], torch.full((2,), math.log(2)))
