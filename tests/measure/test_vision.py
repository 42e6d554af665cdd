"""Scores of a classifier, against numbers worked by hand."""

import math

import pytest
import torch
from torch import nn

from gatebook.measure import vision


def test_scores_are_means_over_images_not_over_batches():
    logits = torch.log(torch.tensor([[0.5, 0.5 + 1e-6], [0.9, 0.1], [0.25, 0.75]]))
    labels = torch.tensor([1, 1, 1])
    batches = [(logits[:1], labels[:1]), (logits[1:], labels[1:])]
    scores = vision.score(nn.Identity().train(), batches)
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.images == 3
    expected = -(math.log(0.5) + math.log(0.1) + math.log(0.75)) / 3
    assert scores.cross_entropy == pytest.approx(expected, abs=1e-5)


def test_a_model_is_scored_in_evaluation_mode():
    x = torch.ones(4, 3)
    model = nn.Dropout(0.5).train()
    vision.score(model, [(x, torch.zeros(4, dtype=torch.long))])
    assert not model.training


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no images"):
        vision.score(nn.Identity(), [])


def test_head_similarity_equals_loops_over_pairs():
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 5).softmax(-1)
    found = [
        torch.cosine_similarity(weights[b, i, n], weights[b, j, n], dim=0)
        for b in range(2)
        for n in range(4)
        for i in range(3)
        for j in range(i)
    ]
    expected = torch.stack(found).mean().item()
    assert vision.head_similarity(weights) == pytest.approx(expected, abs=1e-6)


def test_head_similarity_of_equal_and_of_disjoint_heads():
    same = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    assert vision.head_similarity(same) == pytest.approx(1)
    apart = torch.eye(4)[None, :2, None].expand(1, 2, 3, 4)
    assert vision.head_similarity(apart) == pytest.approx(0)
    with pytest.raises(ValueError, match="1 head has no other"):
        vision.head_similarity(same[:, :1])
