import math

import pytest
import torch

from gatebook.data.synthetic import (
    IGNORE,
    drifting_lexicon,
    lag_copy,
    lag_copy_hits,
    lag_copy_loss,
    markov_text,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_lag_copy_targets_are_the_earlier_symbols():
    tokens, targets = lag_copy(3, 9, 16, (2, 5), seeded())
    assert tokens.shape == (3, 9)
    assert targets.shape == (3, 9, 2)
    for i, lag in enumerate((2, 5)):
        for t in range(9):
            expected = tokens[:, t - lag] if t >= lag else torch.full((3,), IGNORE)
            assert torch.equal(targets[:, t, i], expected)


def test_lag_copy_symbols_are_uniform_and_independent():
    tokens, _ = lag_copy(4000, 10, 4, (1,), seeded())
    pairs = torch.bincount((4 * tokens[:, 3] + tokens[:, 7]), minlength=16) / 4000
    assert (pairs - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 * 15 / 16 / 4000)


def test_one_seed_gives_one_data_set():
    first, again = (lag_copy(2, 9, 16, (2,), seeded(3))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, lag_copy(2, 9, 16, (2,), seeded(4))[0])


def test_markov_pairs_are_stationary():
    chain = markov_text(5, 0.7, seeded())
    assert torch.allclose(chain.transition.sum(-1), torch.ones(5, 5, dtype=torch.double))
    after = torch.einsum("ab,abc->bc", chain.pairs, chain.transition)
    assert torch.allclose(after, chain.pairs, rtol=0, atol=1e-13)
    assert torch.allclose(chain.pairs.sum(0), chain.pairs.sum(1), rtol=0, atol=1e-13)


def test_entropies_equal_those_of_counts_in_a_long_text():
    chain = markov_text(3, 0.7, seeded())
    tokens = chain.sample(20_000, 30, seeded(1))
    code = (9 * tokens[:, :-2] + 3 * tokens[:, 1:-1] + tokens[:, 2:]).flatten()
    joint = (torch.bincount(code, minlength=27).double() / code.numel()).view(3, 3, 3)
    for order, counted in ((0, joint.sum((0, 1))), (1, joint.sum(0)), (2, joint)):
        conditional = counted / counted.sum(-1, keepdim=True)
        assert chain.entropy(order) == pytest.approx(
            float(-(counted * conditional.log()).sum()), abs=2e-3
        )


def test_entropies_fall_with_the_order():
    chain = markov_text(8, 0.7, seeded())
    assert math.log(8) > chain.entropy(0) > chain.entropy(1) > chain.entropy(2) > 0


def test_an_order_that_the_chain_does_not_have_is_refused():
    with pytest.raises(ValueError, match="order must be 0, 1 or 2, got 3"):
        markov_text(2, 1.0, seeded()).entropy(3)


def test_next_symbol_is_the_row_of_the_last_two():
    chain = markov_text(4, 1.0, seeded())
    tokens = chain.sample(2, 6, seeded(1))
    rows = chain.next_symbol(tokens)
    assert rows.shape == (2, 5, 4)
    assert torch.equal(rows[1, 3], chain.transition[tokens[1, 3], tokens[1, 4]])


def test_samples_start_stationary():
    chain = markov_text(3, 0.5, seeded())
    tokens = chain.sample(50_000, 3, seeded(1))
    expected = chain.pairs.sum(0)
    for t in range(3):
        share = torch.bincount(tokens[:, t], minlength=3) / 50_000
        assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / 50_000)


def test_lag_copy_loss_weighs_lags_equally():
    _, targets = lag_copy(2, 8, 4, (1, 6), seeded())
    logits = torch.randn(2, 8, 2, 4, generator=seeded(1))
    by_lag = []
    for i in range(2):
        own = [
            -logits[b, t, i].log_softmax(-1)[targets[b, t, i]].item()
            for b in range(2)
            for t in range(8)
            if targets[b, t, i] != IGNORE
        ]
        by_lag.append(sum(own) / len(own))
    assert lag_copy_loss(logits, targets).item() == pytest.approx(sum(by_lag) / 2, abs=1e-6)


def test_lag_copy_hits_count_answers_to_asked_positions():
    _, targets = lag_copy(2, 8, 4, (1, 6), seeded())
    perfect = torch.nn.functional.one_hot(targets.clamp(min=0), 4).float()
    right, asked = lag_copy_hits(perfect, targets)
    assert asked.tolist() == [14, 4]
    assert right.tolist() == [14, 4]
    assert lag_copy_hits(-perfect, targets)[0].tolist() == [0, 0]


def test_lexicon_text_with_no_share_is_the_chain():
    chain = markov_text(6, 0.5, seeded())
    tokens = drifting_lexicon(chain, 4000, 12, seeded(1), share=0.0)
    last = tokens[:, -3:]
    seen = torch.bincount((last * torch.tensor([36, 6, 1])).sum(-1), minlength=216) / 4000
    expected = (chain.pairs[..., None] * chain.transition).flatten()
    assert (seen - expected).abs().max() < 5 * math.sqrt(expected.max() / 4000)


def test_a_lexicon_that_stays_allows_its_symbols_alone():
    tokens = drifting_lexicon(
        markov_text(8, 0.5, seeded()), 50, 60, seeded(1), share=1.0, drift=0.0
    )
    kinds = torch.tensor([len(row[2:].unique()) for row in tokens])
    assert kinds.max() == 3
    assert (
        len({tuple(row[2:].unique().tolist()) for row in tokens}) > 20
    )  # a set of its own for each


def test_a_lexicon_that_drifts_always_leaves_no_memory():
    chain = markov_text(8, 0.5, seeded())
    tokens = drifting_lexicon(chain, 4000, 6, seeded(1), share=1.0, drift=1.0)
    same = (tokens[:, 4] == tokens[:, 5]).float().mean()
    assert same == pytest.approx(1 / 8, abs=5 * math.sqrt(7 / 64 / 4000))
    kept = drifting_lexicon(chain, 4000, 6, seeded(1), share=1.0, drift=0.0)
    assert (kept[:, 4] == kept[:, 5]).float().mean() == pytest.approx(1 / 3, abs=0.04)
