"""MossFormer: equations, sizes and what one block lets through, against independent oracles."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gatebook.models.mossformer import (
    ATTENTION,
    MODELS,
    GlobalNorm,
    MossFormer,
    MossFormerBlock,
    MossFormerConfig,
    Rotary,
    ScaleNorm,
    SinusoidalPosition,
    across_attention,
    chunked_attention,
    depthwise,
    global_attention,
    local_attention,
    n_frames,
    token_shift,
)

TINY = MossFormerConfig(
    n_filters=12,
    d_model=8,
    n_layers=2,
    kernel_size=8,
    d_qk=6,
    chunk_size=5,
    rotary_dim=4,
    conv_kernel=3,
    dropout=0.0,
)


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def qkv(S, d=6, E=7, B=2):
    return torch.randn(B, S, d), torch.randn(B, S, d), torch.randn(B, S, E)


def make_block(**changes):
    """A block whose queries and keys are of order 1; the initial ones are of order 0.02."""
    config = dataclasses.replace(TINY, **changes)
    block = MossFormerBlock(config, Rotary(config.rotary_dim))
    with torch.no_grad():
        block.offset_scale.gamma.normal_()
        block.offset_scale.beta.normal_(std=0.1)
    return block


def local_oracle(q, k, v, P):
    """Entry by entry, in numpy."""
    q, k, v = (t.numpy() for t in (q, k, v))
    out = np.zeros_like(v)
    for b in range(len(v)):
        for i in range(v.shape[1]):
            for j in range(v.shape[1]):
                if i // P == j // P:
                    out[b, i] += max(0.0, q[b, i] @ k[b, j] / P) ** 2 * v[b, j]
    return torch.from_numpy(out)


def across_oracle(q, k, v, P):
    q, k, v = (t.numpy() for t in (q, k, v))
    out, H = np.zeros_like(v), -(-v.shape[1] // P)
    for b in range(len(v)):
        for i in range(v.shape[1]):
            for j in range(i % P, v.shape[1], P):
                out[b, i] += max(0.0, q[b, i] @ k[b, j] / H) ** 2 * v[b, j]
    return torch.from_numpy(out)


# ---------------------------------------------------------------- sizes


def test_large_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = MossFormer(MODELS["mossformer_l"][1])
    assert sum(p.numel() for p in model.parameters()) == 42_101_850
    fixed = [(n, p.numel()) for n, p in model.named_parameters() if not p.requires_grad]
    assert fixed == [("mask_net.blocks.0.rotary.freqs", 16)]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_named_model_builds_on_meta_and_keeps_the_length(name):
    with torch.device("meta"):
        kind, config = MODELS[name]
        out = kind(config)(torch.empty(2, 8003))
    assert out.shape == (2, config.n_speakers, 8003)


@pytest.mark.parametrize(
    "wrong", [{"attention": "softmax"}, {"kernel_size": 15}, {"rotary_dim": 5}, {"rotary_dim": 64}]
)
def test_impossible_configuration_raises(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(TINY, **wrong)


def test_unknown_field_raises():
    with pytest.raises(TypeError, match="width"):
        MossFormerConfig(n_filters=8, d_model=8, n_layers=1, width=3)


# ---------------------------------------------------------------- joint attention


@pytest.mark.parametrize("S", [1, 4, 5, 13])
def test_local_attention_equals_loops(S):
    q, k, v = qkv(S)
    torch.testing.assert_close(local_attention(q, k, v, 5), local_oracle(q, k, v, 5))


@pytest.mark.parametrize("chunk_size", [13, 16])
def test_one_chunk_is_full_quadratic_attention(chunk_size):
    q, k, v = qkv(13)
    dense = F.relu(torch.einsum("bid,bjd->bij", q, k) / chunk_size).square() @ v
    torch.testing.assert_close(local_attention(q, k, v, chunk_size), dense)


def test_masked_frames_after_the_end_change_nothing():
    """Within one chunk, zeroed keys and values after the end leave the local half as it was."""
    q, k, v = qkv(9)
    longer = [F.pad(t, (0, 0, 0, 4)) for t in (q, k, v)]
    longer[0][:, 9:] = torch.randn(2, 4, 6)
    torch.testing.assert_close(
        local_attention(*longer, 16)[:, :9], local_attention(q, k, v, 16), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("S", [1, 7, 64])
def test_linear_order_equals_dense_order(S):
    q, k, v = qkv(S)
    dense = (q @ k.mT) @ v / S
    torch.testing.assert_close(global_attention(q, k, v), dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("S", [5, 13])
def test_across_attention_equals_loops(S):
    q, k, v = qkv(S)
    torch.testing.assert_close(across_attention(q, k, v, 5), across_oracle(q, k, v, 5))


@pytest.mark.parametrize("S", [5, 13])
def test_chunked_attention_equals_dense_blocks(S):
    q, k, v = qkv(S)
    chunk = torch.arange(S) // 5
    dense = (q @ k.mT) * (chunk[:, None] == chunk) / 5
    torch.testing.assert_close(chunked_attention(q, k, v, 5), dense @ v)


@pytest.mark.parametrize("S", [10, 13])
def test_joint_attention_is_the_sum_and_divides_by_the_true_length(S):
    """Both halves from their definitions; S = 13 is no multiple of the chunk length 5."""
    block, z, values = make_block(), torch.randn(2, S, 6), torch.randn(2, S, 7)
    with torch.no_grad():
        gamma, beta = block.offset_scale.gamma, block.offset_scale.beta
        q, q_far, k, k_far = (rotary_oracle(z * gamma[i] + beta[i], 4) for i in range(4))
        expected = local_oracle(q, k, values, 5) + (q_far @ k_far.mT) @ values / S
        torch.testing.assert_close(block.attend(z, values), expected)


def test_attention_matrix_is_dropped_out_in_training_only():
    block = make_block(dropout=0.5, attention="local").train()
    z, values = torch.randn(1, 5, 6), torch.randn(1, 5, 7)
    assert not torch.equal(block.attend(z, values), block.attend(z, values))
    block.eval()
    assert torch.equal(block.attend(z, values), block.attend(z, values))


# ---------------------------------------------------------------- positions


def rotary_oracle(x, dim):
    """Pairs (2i, 2i + 1) as complex numbers times exp(i t theta), with t counted from frame 0."""
    x = x.detach().numpy().copy()
    for t in range(x.shape[-2]):
        for i in range(dim // 2):
            turn = np.exp(1j * t * 10000.0 ** (-2 * i / dim))
            z = (x[..., t, 2 * i] + 1j * x[..., t, 2 * i + 1]) * turn
            x[..., t, 2 * i], x[..., t, 2 * i + 1] = z.real, z.imag
    return torch.from_numpy(x)


def test_rotary_turns_by_the_absolute_frame_index():
    x = torch.randn(2, 4, 13, 6)
    torch.testing.assert_close(Rotary(4)(x), rotary_oracle(x, 4))


def test_sinusoidal_position_is_sine_half_then_cosine_half():
    found = SinusoidalPosition(6)(4).detach()
    t, w = np.arange(4)[:, None], 10000.0 ** (-2 * np.arange(3) / 6)
    expected = np.concatenate([np.sin(t * w), np.cos(t * w)], axis=1)
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_token_shift_delays_the_first_half():
    x = torch.arange(12.0).view(1, 3, 4)
    expected = torch.tensor([[[0, 0, 2, 3], [0, 1, 6, 7], [4, 5, 10, 11]]]).double()
    torch.testing.assert_close(token_shift(x), expected)


# ---------------------------------------------------------------- leaf modules


def test_scale_norm_has_unit_mean_square_and_a_floor():
    x = torch.randn(3, 8)
    torch.testing.assert_close(ScaleNorm(8)(x).square().mean(-1), torch.ones(3))
    tiny = torch.full((1, 8), 1e-9)
    torch.testing.assert_close(ScaleNorm(8)(tiny), tiny / 1e-5)


def test_global_norm_equals_group_norm():
    norm, oracle = GlobalNorm(6), torch.nn.GroupNorm(1, 6, eps=1e-8)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(oracle, name).copy_(getattr(norm, name).normal_())
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(norm(x), oracle(x.mT).mT)


def test_depthwise_equals_conv1d():
    x, weight = torch.randn(2, 20, 6), torch.randn(6, 1, 17)
    expected = F.conv1d(x.mT, weight, padding=8, groups=6).mT
    torch.testing.assert_close(depthwise(x, weight), expected)


@pytest.mark.parametrize("length", [40, 43])
def test_encoder_and_decoder_equal_convolutions(length):
    model, K = MossFormer(TINY), TINY.kernel_size
    x = torch.randn(2, length)
    X = F.relu(F.conv1d(x[:, None], model.encoder.weight[:, None], stride=K // 2)).mT
    torch.testing.assert_close(model.encode(x), X)
    weight = model.decoder.weight.T[:, None]  # (N, 1, K)
    wave = F.conv_transpose1d(X.mT, weight, stride=K // 2)[:, 0]
    expected = F.pad(wave, (0, length - wave.shape[-1]))
    torch.testing.assert_close(model.decode(X[:, None], length)[:, 0], expected)


def test_number_of_frames():
    assert n_frames(MODELS["mossformer_l"][1], 16000) == 1999
    assert MossFormer(TINY).encode(torch.randn(1, 43)).shape[1] == n_frames(TINY, 43)


# ---------------------------------------------------------------- the block


def test_gates_do_not_swap_v_and_u():
    v, u, v_mixed, u_mixed = torch.randn(4, 3)
    expected = (u_mixed * v) / (1 + torch.exp(-(v_mixed * u)))
    torch.testing.assert_close(make_block().gate(v, u, v_mixed, u_mixed), expected)


def test_without_queries_and_keys_only_the_bias_path_is_left():
    """gamma = beta = 0: both halves vanish, O = 0, and the block adds CM(0), the same everywhere
    away from the ends of the convolution; it is not the identity."""
    block = make_block()
    with torch.no_grad():
        block.offset_scale.gamma.zero_()
        block.offset_scale.beta.zero_()
    x = torch.randn(1, 11, 8)
    added = block(x) - x
    torch.testing.assert_close(added, block.to_out(torch.zeros(1, 11, 16)))
    torch.testing.assert_close(added[:, 1:-1], added[:, 1:2].expand(-1, 9, -1))
    assert added.abs().max() > 1e-3


def changed_frames(block, S, at):
    """Frames that feel a change, in at least one of 30 inputs: a squared ReLU may hide one."""
    x = torch.randn(30, S, 8)
    y = x.clone()
    y[:, at] += 1.0
    with torch.no_grad():
        difference = (block(x) - block(y)).abs().amax(dim=(0, 2))
    return set(torch.nonzero(difference > 1e-12).flatten().tolist())


@pytest.mark.parametrize(
    ("attention", "convolution", "expected"),
    [
        # frame 7, shifted to 8 as well: both in chunk 5…9
        ("local", False, set(range(5, 10))),
        # ±1 in Z and V carries it to 6…9; the chunk to 5…9; ±1 in the output to 4…10
        ("local", True, set(range(4, 11))),
        ("global", False, set(range(20))),
        ("chunked", False, set(range(5, 10))),
        ("joint", False, set(range(20))),
        # offsets 2 and 3 of every chunk
        ("dual", False, set(range(5, 10)) | {2, 3, 12, 13, 17, 18}),
    ],
)
def test_a_changed_frame_reaches_only_what_the_attention_allows(attention, convolution, expected):
    block = make_block(attention=attention, convolution=convolution)
    assert changed_frames(block, S=20, at=7) == expected


def test_ablations_keep_or_drop_the_parameters_they_claim():
    def count(**changes):
        return sum(p.numel() for p in make_block(**changes).parameters())

    assert {count(attention=kind) for kind in ATTENTION} == {count(gating=False)} == {count()}
    assert count() - count(convolution=False) == 3 * (4 * 8 + 6 + 8)


@pytest.mark.parametrize("changes", [{}, {"attention": "dual"}, {"gating": False}])
def test_every_trainable_parameter_gets_a_gradient(changes):
    model = MossFormer(dataclasses.replace(TINY, **changes))
    model(torch.randn(2, 200)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_model_ignores_dropout_in_evaluation():
    model = MossFormer(dataclasses.replace(TINY, dropout=0.3)).eval()
    x = torch.randn(2, 100)
    assert torch.equal(model(x), model(x))
