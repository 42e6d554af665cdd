"""SI-SDR and its permutation-invariant forms, against numpy and brute force."""

import itertools

import numpy as np
import pytest
import torch

from gatebook.measure.audio import (
    best_order,
    reorder,
    separation_loss,
    si_sdr,
    si_sdr_improvement,
)


def si_sdr_oracle(estimate, source):
    e, s = (np.asarray(x, dtype=np.float64) for x in (estimate, source))
    e, s = e - e.mean(), s - s.mean()
    t = (e @ s) / (s @ s) * s
    return 10 * np.log10((t @ t) / ((e - t) @ (e - t)))


@pytest.fixture
def signals():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(4, 3, 500, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 3, 500, generator=generator, dtype=torch.float64)
    return sources + 0.3 + 0.5 * noise, sources


def test_equals_numpy(signals):
    estimates, sources = signals
    for b, c in itertools.product(range(4), range(3)):
        expected = si_sdr_oracle(estimates[b, c], sources[b, c])
        assert si_sdr(estimates, sources)[b, c] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-2, 3.0, -5.0])
def test_ignores_the_scale_of_the_estimate(signals, scale):
    estimates, sources = signals
    torch.testing.assert_close(si_sdr(scale * estimates, sources), si_sdr(estimates, sources))


def test_ignores_a_constant_offset(signals):
    estimates, sources = signals
    torch.testing.assert_close(si_sdr(estimates + 2.0, sources - 1.0), si_sdr(estimates, sources))


def test_silence_gets_zero_decibels():
    """As the module says: torchmetrics' guard turns 0 / 0 into 1."""
    assert si_sdr(torch.zeros(100), torch.randn(100)).abs() < 1e-3


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_order_of_the_estimates_does_not_matter(signals, order):
    estimates, sources = signals
    mixture = sources.sum(dim=1)
    shuffled = estimates[:, list(order)]
    torch.testing.assert_close(
        si_sdr_improvement(shuffled, sources, mixture),
        si_sdr_improvement(estimates, sources, mixture),
    )
    restored = reorder(shuffled, best_order(shuffled, sources)[1])
    torch.testing.assert_close(restored, estimates)


@pytest.mark.parametrize("speakers", [2, 3])
def test_best_order_equals_brute_force(speakers):
    generator = torch.Generator().manual_seed(1)
    estimates, sources = torch.randn(2, 8, speakers, 50, generator=generator, dtype=torch.float64)
    for b in range(8):
        scores = {
            order: np.mean(
                [si_sdr_oracle(estimates[b, order[c]], sources[b, c]) for c in range(speakers)]
            )
            for order in itertools.permutations(range(speakers))
        }
        value, order = best_order(estimates[b : b + 1], sources[b : b + 1])
        assert value.item() == pytest.approx(max(scores.values()), abs=1e-9)
        assert tuple(order[0].tolist()) == max(scores, key=scores.get)


def test_one_order_holds_for_the_whole_utterance():
    """Estimates that swap halfway are not rescued by swapping the order halfway."""
    generator = torch.Generator().manual_seed(2)
    sources = torch.randn(1, 2, 400, generator=generator)
    swapped = torch.cat((sources[..., :200], sources.flip(1)[..., 200:]), dim=-1)
    assert best_order(swapped, sources)[0].item() < 3.0


def test_improvement_of_the_mixture_itself_is_zero(signals):
    _, sources = signals
    mixture = sources.sum(dim=1)
    unchanged = mixture[:, None].expand_as(sources)
    torch.testing.assert_close(
        si_sdr_improvement(unchanged, sources, mixture), torch.zeros(4, dtype=torch.float64)
    )


def test_loss_has_the_gradient_of_the_best_order():
    generator = torch.Generator().manual_seed(3)
    sources = torch.randn(2, 2, 60, generator=generator)
    estimates = (
        sources.flip(1) + 0.1 * torch.randn(2, 2, 60, generator=generator)
    ).requires_grad_()
    loss = separation_loss(estimates, sources)
    expected = -si_sdr(estimates.flip(1), sources).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    (found,) = torch.autograd.grad(loss, estimates)
    (wanted,) = torch.autograd.grad(expected, estimates)
    torch.testing.assert_close(found, wanted)


def test_floor_drops_utterances_that_are_good_enough():
    generator = torch.Generator().manual_seed(4)
    sources = torch.randn(2, 2, 400, generator=generator)
    noise = torch.randn(2, 2, 400, generator=generator) * torch.tensor([1e-3, 0.5])[:, None, None]
    each = -best_order(sources + noise, sources)[0]
    assert each[0] < -50 < -30 < each[1]
    assert separation_loss(sources + noise, sources, floor_db=-30.0) == pytest.approx(
        each[1].item()
    )
    assert separation_loss(sources + noise, sources, floor_db=0.0) == 0


def test_loss_is_float32_under_autocast():
    sources = torch.randn(1, 2, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert separation_loss(sources.bfloat16(), sources).dtype == torch.float32
