"""Masked tokens: what is hidden, what is asked, and how often."""

import pytest
import torch

from gatebook.data.text import mask_tokens


@pytest.fixture(scope="module")
def drawn():
    tokens = torch.randint(50, (400, 100), generator=torch.Generator().manual_seed(0))
    return tokens, *mask_tokens(tokens, 50, torch.Generator().manual_seed(1))


def test_asked_tokens_are_the_targets_and_others_stay(drawn):
    tokens, inputs, targets = drawn
    asked = targets != -100
    assert torch.equal(targets[asked], tokens[asked])
    assert torch.equal(inputs[~asked], tokens[~asked])


def test_shares_of_asked_masked_random_and_kept(drawn):
    """Within five standard errors of 15 %, and of 80, 10 and 10 % of these."""
    tokens, inputs, targets = drawn
    asked = targets != -100
    assert asked.float().mean().item() == pytest.approx(0.15, abs=0.009)
    masked = (inputs == 50)[asked].float().mean().item()
    kept = (inputs == tokens)[asked].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.026)
    assert kept == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    assert inputs.max() == 50


def test_one_seed_masks_one_way():
    tokens = torch.arange(60).view(2, 30)
    first, again, other = (
        mask_tokens(tokens, 60, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
