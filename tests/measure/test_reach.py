import pytest
import torch

from gatebook.measure.reach import gradient_reach, perturbation_reach


def one_hot(tokens):
    return torch.nn.functional.one_hot(tokens, 5).double()


FUNCTIONS = {
    "identity": (lambda x: x, torch.eye(8)),
    "cumulative sum": (lambda x: x.cumsum(1), torch.ones(8, 8).triu()),
    "previous": (lambda x: x.roll(1, 1), torch.eye(8).roll(1, 1)),
    "mean": (lambda x: x.mean(1, keepdim=True).expand_as(x), torch.ones(8, 8)),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_perturbation_finds_the_inputs_that_are_read(name):
    function, expected = FUNCTIONS[name]
    tokens = torch.arange(8) % 5
    change = perturbation_reach(lambda t: function(one_hot(t)), tokens, 5)
    assert torch.equal(change > 0, expected > 0)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("position", [0, 5])
def test_gradient_finds_the_inputs_that_are_read(name, position):
    function, expected = FUNCTIONS[name]
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    size = gradient_reach(function, x, position, torch.Generator().manual_seed(1))
    assert torch.equal(size > 0, expected[:, position] > 0)


def test_gradient_survives_a_final_normalisation():
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    norm = torch.nn.LayerNorm(6).double()
    size = gradient_reach(norm, x, 2, torch.Generator().manual_seed(1))
    assert size[2] > 1e-3
