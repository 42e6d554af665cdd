import pytest
import torch

from gatebook.measure.reach import gradient_reach, input_gradient, perturbation_reach


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


def test_a_place_of_a_convolution_reads_its_neighbours():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 6, generator=draw).requires_grad_()
    y = torch.nn.Conv2d(3, 4, 3, padding=1)(x)
    size = input_gradient(y[:, :, 1, 4], x, draw)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[0:3, 3:6] = True
    assert torch.equal(size > 0, expected)


def test_a_map_with_its_channels_last_has_the_same_gradient():
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first, last = x.clone().requires_grad_(), x.movedim(1, -1).clone().requires_grad_()
    weight = torch.arange(16.0).view(4, 4)
    one = input_gradient((first * weight).sum((2, 3)), first, torch.Generator().manual_seed(1))
    two = input_gradient(
        (last * weight[..., None]).sum((1, 2)), last, torch.Generator().manual_seed(1), channels=3
    )
    assert torch.equal(one, two)


def test_what_is_no_place_or_no_channel_is_refused():
    x = torch.randn(1, 3, 4, 4).requires_grad_()
    draw = torch.Generator()
    with pytest.raises(ValueError, match=r"one place of the output, \[B, E\]"):
        input_gradient(x[..., 0], x, draw)
    with pytest.raises(ValueError, match="channels must be in 1 to 3, got 4"):
        input_gradient(x[..., 0, 0], x, draw, channels=4)
