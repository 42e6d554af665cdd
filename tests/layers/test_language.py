"""Parts of language models: rotary positions, attention, convolution, block, decoder."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook.kernels import naive_softmax_attention
from gatebook.layers.language import (
    Attention,
    Block,
    Decoder,
    RMSNorm,
    ShortConv,
    llama_width,
    rotate,
)


def decoder(**changes):
    torch.manual_seed(0)
    mixers = [Attention(16, 4, n_kv_heads=2) for _ in range(2)]
    settings = {"vocab_size": 11, "d_model": 16, "mixers": mixers, "d_ff": 32}
    return Decoder(**(settings | changes)).double()


def test_norm_is_torchs_without_autocast():
    torch.manual_seed(0)
    norm, plain, x = RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-5), torch.randn(3, 16)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_under_autocast_is_in_its_type_and_correctly_rounded(dtype):
    """One rounding each of input, weight and output: three half-steps of 2^-8."""
    torch.manual_seed(0)
    norm, x = RMSNorm(64), 30 * torch.randn(9, 64).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    exact = F.rms_norm(x.double(), (64,), norm.weight.double(), norm.eps)
    error = (y.double() - exact).abs() / exact.abs()
    assert error.max() < 3.5 * 2**-8
    y.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 9, 1, 8)
    turned_q, turned_k = rotate(q, 10_000.0), rotate(k, 10_000.0)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = torch.einsum("bihd,bjhd->ij", turned_q, turned_k)
    for lag in range(9):
        diagonal = scores.diagonal(lag)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert scores[0].std() > 0.01


def test_rotation_of_later_tokens_starts_at_their_position():
    x = torch.randn(1, 9, 2, 8)
    torch.testing.assert_close(rotate(x[:, 4:], 10_000.0, start=4), rotate(x, 10_000.0)[:, 4:])


def test_first_pair_of_channels_turns_by_one_radian_a_token():
    x = torch.zeros(1, 3, 1, 4)
    x[..., 0] = 1.0  # channel 0 turns towards channel 0 + D/2 = 2
    turned = rotate(x, 10_000.0)[0, :, 0]
    angles = torch.arange(3.0)
    torch.testing.assert_close(turned[:, 0], angles.cos())
    torch.testing.assert_close(turned[:, 2], angles.sin())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_its_equations(groups):
    torch.manual_seed(0)
    layer = Attention(16, 4, n_kv_heads=groups, d_head=6).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = layer.qkv.weight.split([24, 6 * groups, 6 * groups])
    q, k, v = ((x @ w.T).unflatten(-1, (-1, 6)) for w in (q, k, v))
    q, k = rotate(q, 10_000.0), rotate(k, 10_000.0)
    o = naive_softmax_attention(q, k, v, causal=True)
    torch.testing.assert_close(layer(x)[0], o.flatten(-2) @ layer.out.weight.T)


def test_attention_without_positions_ignores_the_order_of_what_was():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 16)
    other = x[:, [2, 0, 1, 3, 4, 5]]
    last = [Attention(16, 2, rope_base=base).eval() for base in (0.0, 10_000.0)]
    torch.testing.assert_close(last[0](x)[0][:, -1], last[0](other)[0][:, -1])
    assert (last[1](x)[0][:, -1] - last[1](other)[0][:, -1]).abs().max() > 1e-4


def test_heads_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="got 4, 3 and 16"):
        Attention(16, 4, n_kv_heads=3)
    with pytest.raises(ValueError, match="got 3, 3 and 16"):
        Attention(16, 3)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_equals_torchs_and_may_be_cut(width):
    torch.manual_seed(0)
    layer, x = ShortConv(5, width).double(), torch.randn(2, 9, 5, dtype=torch.float64)
    padded = F.pad(x.mT, (width - 1, 0))
    expected = F.conv1d(padded, layer.conv.weight, groups=5).mT
    whole, last = layer(x)
    torch.testing.assert_close(whole, expected)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert state.shape == (2, width - 1, 5)
    assert torch.equal(state, last)


def test_block_adds_the_feed_forward_to_what_the_mixer_gave():
    torch.manual_seed(0)
    block = Block(16, Attention(16, 2), 32).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    y = x + block.mixer(block.mixer_norm(x))[0]
    z = block.ffn_norm(y)
    ffn = block.ffn.down(F.silu(block.ffn.gate(z)) * block.ffn.up(z))
    torch.testing.assert_close(block(x)[0], y + ffn)


def test_width_of_the_feed_forward_network():
    assert [llama_width(d) for d in (64, 1024, 2048)] == [256, 2816, 5632]


def test_decoder_does_not_see_the_future_and_may_be_cut():
    model = decoder()
    x = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model(x)
    first, states = model.continue_from(x[:, :5], None)
    second, _ = model.continue_from(x[:, 5:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    other = x.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 11
    torch.testing.assert_close(model(other)[:, :8], whole[:, :8], atol=0, rtol=0)


def test_decoder_ties_its_head_if_asked():
    free, tied = (sum(p.numel() for p in decoder(tied=t).parameters()) for t in (False, True))
    assert free - tied == 11 * 16


def test_a_mixer_may_start_where_it_likes():
    class Slow(nn.Linear):
        def reset(self):
            nn.init.constant_(self.bias, 7.0)

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.gate = nn.Linear(256, 256), Slow(256, 2)

    model = Decoder(vocab_size=5, d_model=256, mixers=[Mixer()], init_std=0.03)
    mixer = model.blocks[0].mixer
    assert mixer.gate.bias.tolist() == [7.0, 7.0]
    assert mixer.map.bias.abs().max() == 0
    assert mixer.map.weight.std().item() == pytest.approx(0.03, rel=0.05)


def test_biases_stand_where_they_are_asked_for():
    def biases(**changes):
        return {name for name, _ in decoder(**changes).named_parameters() if "bias" in name}

    block = {f"blocks.{i}.ffn.{name}.bias" for i in range(2) for name in ("gate", "up", "down")}
    assert biases() == set()
    assert biases(biases=True) == block | {"head.bias"}
    attention = Attention(16, 4, out_bias=True)
    assert [name for name, _ in attention.named_parameters() if "bias" in name] == ["out.bias"]


def test_decoder_without_a_final_norm_reads_the_last_block():
    model = decoder(final_norm=False)
    x = torch.tensor([[1, 2, 3]])
    y = model.embedding(x)
    for block in model.blocks:
        y, _ = block(y)
    torch.testing.assert_close(model(x), y @ model.head.weight.T)


def test_decoder_may_keep_torchs_initial_weights():
    model = decoder(init_std=None, d_model=16)
    assert model.head.weight.abs().max() <= 16**-0.5
    assert model.embedding.weight.std() > 0.5
