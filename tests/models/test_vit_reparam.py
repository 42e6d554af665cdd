"""Branches that join and merge: every form against loops over branches, heads and tokens."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import measure, models
from gatebook.layers.vision import SelfAttention
from gatebook.models.vit import ViT, ViTConfig
from gatebook.models.vit_reparam import (
    MODELS,
    BranchedViT,
    BranchedViTConfig,
    MergedViT,
    ValueOutputAttention,
    absorb,
    concatenate,
    merge,
)
from gatebook.training import Recipe, fit

TINY = {"d_model": 8, "depth": 2, "n_heads": 2, "image_size": 6, "patch_size": 2, "n_classes": 5}
NEVER, ALWAYS = None, (0, 0)


def branched(join=ALWAYS, dtype=torch.float64, **changes):
    """A model whose every parameter is random; dropped paths are off in evaluation."""
    torch.manual_seed(0)
    model = BranchedViT(BranchedViTConfig(**(TINY | {"branches": 3} | changes), join=join))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def images(n=3):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def at(model, number):
    """Put λ of a model with `join=(1, 10)` at `number` / 10."""
    model.step.fill_(number)
    assert model.coefficient().item() == pytest.approx(number / 10)
    return model


def by_loops(block, x, share):
    """One block on the tokens `[T, D]`, a branch, head and token at a time, in NumPy."""

    def normed(norm, v):
        v = (v - v.mean()) / math.sqrt(v.var() + norm.eps)
        return v * norm.weight.detach().numpy() + norm.bias.detach().numpy()

    def through(linear, v):
        return linear.weight.detach().numpy() @ v + linear.bias.detach().numpy()

    branches, h = list(block.branches), block.n_heads
    b, (t, d) = len(branches), x.shape
    own = [[through(m.attention.qkv, normed(m.norm1, v)) for v in x] for m in branches]
    own = np.array(own).reshape(b, t, 3, h, d // h)
    mixed = (1 - share) * own + share * own.mean(0)
    if not block.join_values:
        mixed[:, :, 2] = own[:, :, 2]
    y = x.copy()
    for i, m in enumerate(branches):
        for query in range(t):
            heads = []
            for head in range(h):
                q, keys = mixed[i, query, 0, head], mixed[i, :, 1, head]
                weights = np.exp(keys @ q / math.sqrt(d // h))
                heads.append(weights / weights.sum() @ mixed[i, :, 2, head])
            y[query] += through(m.attention.out, np.concatenate(heads)) / math.sqrt(b)
    z = y.copy()
    for token in range(t):
        own = np.array([through(m.mlp[0], normed(m.norm2, y[token])) for m in branches])
        hidden = (1 - share) * own + share * own.mean(0)
        for m, units in zip(branches, hidden, strict=True):
            active = np.array([u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in units])
            z[token] += through(m.mlp[2], active) / math.sqrt(b)
    return z


@pytest.mark.parametrize("join_values", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_block_equals_loops(share, join_values):
    block = branched(join_values=join_values).blocks[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = block(x, torch.tensor(share, dtype=torch.float64)).detach().numpy()
    expected = [by_loops(block, tokens, share) for tokens in x.numpy()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("join_values", [True, False])
def test_merge_is_exact_at_one(join_values, qkv_bias, branches):
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = branched(join_values=join_values, qkv_bias=qkv_bias, branches=branches, dtype=dtype)
        merged, x = merge(model), images().to(dtype)
        assert type(merged) is MergedViT
        assert next(merged.parameters()).dtype == dtype
        expected = model(x)
        assert (merged(x) - expected).abs().max() < most * max(1, expected.abs().max())


def test_merge_of_a_is_a_plain_vit():
    merged = merge(branched())
    plain = ViT(ViTConfig(**TINY)).double()
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain(images()), merged(images()), rtol=0, atol=0)


def test_below_one_no_merged_model_has_the_same_outputs():
    model, x = branched((1, 10)), images()
    merged = merge(at(model, 10))
    for number in range(10):
        assert (at(model, number)(x) - merged(x)).abs().max() > 1e-4
    for number in (0, 5, 9):
        with pytest.raises(ValueError, match=f"joined to {number / 10:g}, and merging is exact"):
            merge(at(model, number))


@pytest.mark.parametrize("join_values", [True, False])
def test_concatenation_is_exact_at_zero(join_values):
    model = branched(NEVER, join_values=join_values)
    torch.testing.assert_close(concatenate(model)(images()), model(images()), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="side by side at 0 only"):
        concatenate(branched(ALWAYS))


def test_one_branch_is_a_plain_vit_at_every_share():
    model, plain = branched((1, 10), branches=1), ViT(ViTConfig(**TINY)).double().eval()
    names = {k.replace("branches.0.", ""): v for k, v in model.state_dict().items()}
    names.pop("step")
    plain.load_state_dict(names)
    for number in (0, 3, 10):
        found = at(model, number)(images())
        torch.testing.assert_close(found, plain(images()), rtol=0, atol=1e-12)
    torch.testing.assert_close(merge(at(model, 3))(images()), plain(images()), rtol=0, atol=1e-12)


def test_unjoined_branches_are_a_parallel_vit():
    """x + Σ attention(LN x), then x + Σ MLP(LN x): the parallel ViT of Touvron et al. (2022)."""
    block = branched(NEVER).blocks[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x + sum(b.attention(b.norm1(x)) for b in block.branches) / math.sqrt(3)
    y = y + sum(b.mlp(b.norm2(y)) for b in block.branches) / math.sqrt(3)
    torch.testing.assert_close(block(x, torch.zeros(())), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_the_affine_part_of_the_norm_moves_into_the_linear_layer(bias):
    torch.manual_seed(0)
    norm, linear, x = nn.LayerNorm(6), nn.Linear(6, 4, bias=bias), torch.randn(3, 6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    weight, shift = absorb(norm, linear)
    torch.testing.assert_close(F.linear(F.layer_norm(x, (6,)), weight, shift), linear(norm(x)))


def test_the_norm_is_absorbed_before_the_mean_is_taken():
    """The mean of products, not the product of means."""
    model = branched()
    b = model.blocks[0].branches
    found = merge(model).blocks[0].mlp[0].weight
    right = torch.stack([m.mlp[0].weight * m.norm2.weight for m in b]).mean(0)
    means = [torch.stack(ts).mean(0) for ts in
             ([m.mlp[0].weight for m in b], [m.norm2.weight for m in b])]  # fmt: skip
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    assert (found - means[0] * means[1]).abs().max() > 0.1


def test_joined_queries_and_keys_pair_every_branch_with_every_other():
    """Q̄ K̄ᵀ = 1/B² Σ_ij Q_i K_jᵀ, which is not the mean of the branches' own logits."""
    model = branched()
    block, x = model.blocks[0], torch.randn(1, 5, 8, dtype=torch.float64)
    heads = [b.attention._heads(b.norm1(x)) for b in block.branches]
    pairs = sum(qi @ kj.mT for qi, _, _ in heads for _, kj, _ in heads) / 9
    own = sum(q @ k.mT for q, k, _ in heads) / 3
    merged = merge(model).blocks[0]
    q, k, _ = merged.attention._heads(merged.norm1(x))
    torch.testing.assert_close(q @ k.mT, pairs, rtol=0, atol=1e-12)
    assert (pairs - own).abs().max() > 0.1


def test_value_output_attention_without_branches_is_plain_attention():
    torch.manual_seed(0)
    plain, free = SelfAttention(8, 2).double(), ValueOutputAttention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        free.qk.weight.copy_(plain.qkv.weight[:16])
        free.qk.bias.copy_(plain.qkv.bias[:16])
        for h in range(2):
            w_v, w_o = (
                plain.qkv.weight[16 + 4 * h : 20 + 4 * h],
                plain.out.weight[:, 4 * h : 4 * h + 4],
            )
            free.vo.weight[8 * h : 8 * h + 8] = w_o @ w_v
        free.bias.copy_(plain.out.bias + plain.out.weight @ plain.qkv.bias[16:])
    torch.testing.assert_close(free(x), plain(x), rtol=0, atol=1e-12)


def test_values_that_stay_apart_have_a_higher_rank():
    """W^VO of a head has rank d after variant A, and B d after variant B (here all of D = 8)."""
    a, b = (merge(branched(join_values=values, branches=2)) for values in (True, False))
    rows = b.blocks[0].attention.vo.weight.unflatten(0, (2, 8))
    assert torch.linalg.matrix_rank(rows).tolist() == [8, 8]
    attention = a.blocks[0].attention
    w_o, w_v = attention.out.weight[:, :4], attention.qkv.weight[16:20]
    assert torch.linalg.matrix_rank(w_o @ w_v) == 4


@pytest.mark.parametrize("accumulate", [1, 4])
def test_schedule_counts_optimiser_steps(accumulate):
    """However many batches make a step, and without passes that only evaluate."""
    torch.manual_seed(0)
    model = BranchedViT(BranchedViTConfig(**TINY, branches=3, join=(3, 6)))
    other, shares = BranchedViT(model.config), []
    batch = images().float(), torch.tensor([0, 1, 2])

    def loss(network, batch):
        shares.append(network.coefficient().item())
        network.eval()(batch[0])
        return F.cross_entropy(network.train()(batch[0]), batch[1])

    fit(model, [batch], loss, Recipe(steps=9, lr=1e-3, accumulate=accumulate))
    assert shares[::accumulate] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert shares == [share for share in shares[::accumulate] for _ in range(accumulate)]
    assert other.coefficient() == 0  # an optimiser of other parameters
    assert branched(ALWAYS).coefficient() == 1
    assert branched(NEVER).coefficient() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_counts_its_own_steps(copied):
    model = BranchedViT(BranchedViTConfig(**TINY, branches=3, join=(3, 6)))
    again = copied(model)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    for parameter in again.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (model.step, again.step) == (0, 1)


def test_branches_that_never_join_are_not_merged():
    with pytest.raises(ValueError, match=r"never join \(join=None\): concatenate them"):
        merge(branched(NEVER))


def test_the_place_in_the_schedule_is_saved(tmp_path):
    torch.manual_seed(0)
    model = models.create("vit_ti_6x2", **TINY, branches=3, join=(1, 10))
    at(model, 7)
    models.save(model, tmp_path / "w", name="vit_ti_6x2")
    again = models.load(tmp_path / "w")
    assert again.coefficient() == pytest.approx(0.7)
    x = images().float()
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)
    merged = merge(at(model, 10))
    models.save(merged, tmp_path / "m", name="vit_ti_6_a")
    torch.testing.assert_close(models.load(tmp_path / "m").eval()(x), merged(x), rtol=0, atol=0)


def test_dropped_paths_are_those_of_all_branches():
    """In training with one mask, a joined model still is its merged one."""
    model = branched(drop_path=0.5).train()
    merged = merge(model)
    assert merged.training
    found = []
    for network in (model, merged):
        torch.manual_seed(3)
        found.append(network(images(16)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)
    assert (found[0] - merged.eval()(images(16))).abs().max() > 0.1


def test_merging_leaves_the_model_as_it_is_and_shares_nothing():
    model, x = branched(), images()
    before, state = model(x), torch.get_rng_state()
    merged = merge(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("join_values", [True, False])
def test_every_parameter_gets_a_gradient(join_values):
    model = branched((1, 10), join_values=join_values)
    for number in (0, 4, 10):
        model.zero_grad()
        at(model, number)(images()).square().sum().backward()
        assert all(parameter.grad.any() for parameter in model.parameters())
    for network in (merge(model), concatenate(branched(NEVER))):
        network(images()).square().sum().backward()
        assert all(parameter.grad.any() for parameter in network.parameters())


def test_what_a_step_of_sgd_does_to_the_merged_matrices():
    """c Σ W²_i moves by c² B = 1 times its own step, the mean of W¹_i by 1 / B of its own."""

    def step(network):
        network(images()).square().mean().backward()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(("mlp.0.weight", "mlp.2.weight")):
                    parameter -= 0.1 * parameter.grad
        return network

    model = branched(depth=1)
    for norm in (b.norm2 for b in model.blocks[0].branches):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    old, own = merge(model).blocks[0].mlp, step(merge(model)).blocks[0].mlp
    new = merge(step(model)).blocks[0].mlp
    for place, rate in ((2, 1), (0, 1 / 3)):
        moved = new[place].weight - old[place].weight
        expected = rate * (own[place].weight - old[place].weight)
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-3


BLOCK, REST = 444_864, 379_048  # parameters of a block of ViT-Tiny and of all else, by the card


@pytest.mark.parametrize(("depth", "branches"), [(6, 2), (4, 3), (3, 4)])
def test_parameters_at_the_papers_size(depth, branches):
    def count(name):
        with torch.device("meta"):
            return measure.parameters(models.create(name))

    assert count("deit_ti") == 12 * BLOCK + REST == 5_717_416
    assert count(f"vit_ti_{depth}x{branches}") == 5_717_416
    merged = {6: 3_048_232, 4: 2_158_504, 3: 1_713_640}[depth]
    assert count(f"vit_ti_{depth}_a") == depth * BLOCK + REST == merged
    # W^VO instead of values, their biases and the output matrix: 3 D² for D² + D + D²
    assert count(f"vit_ti_{depth}_b") == merged + depth * (192**2 - 192)
    # one norm of each kind and one output bias of each kind where there were B
    fewer = depth * (branches - 1) * (2 * 2 * 192 + 2 * 192)
    assert count(f"vit_ti_{depth}_concat") == 5_717_416 - fewer


def test_multiply_adds_at_the_papers_size():
    """12 T D² + 2 T² D for a plain block, 13 T D² + 4 T² D for variant B (H = 3)."""
    t, d = 197, 192

    def macs(name):
        with torch.device("meta"):
            model = models.create(name).eval()
            return measure.flops(model, torch.empty(1, 3, 224, 224)) // 2

    rest = 196 * 768 * d + d * 1000
    plain, free = 12 * t * d**2 + 2 * t**2 * d, 13 * t * d**2 + 4 * t**2 * d
    assert round(plain / 1e6) == 102
    assert round(free / 1e6) == 124
    assert macs("deit_ti") == macs("vit_ti_6_concat") == 12 * plain + rest
    for depth in (6, 4, 3):
        assert macs(f"vit_ti_{depth}_a") == depth * plain + rest
        assert macs(f"vit_ti_{depth}_b") == depth * free + rest


def test_the_table_holds_every_depth_and_form():
    assert len(MODELS) == 12
    for name, (kind, config) in MODELS.items():
        assert config.depth * config.branches == 12, name
        assert (kind is MergedViT) == hasattr(config, "form")
        assert dataclasses.replace(config, n_classes=10).n_classes == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": 0}, "branches must be at least 1, got 0"),
        ({"join": (5, 4)}, "0 <= first <= last"),
        ({"join": (-1, 4)}, "0 <= first <= last"),
        ({"dropout": 0.1}, "dropout=0"),
        ({"n_heads": 0}, "n_heads must divide d_model=8 for attention, got 0"),
        ({"n_heads": 3}, "n_heads must divide d_model=8"),
        ({"mixer": "mlp"}, 'mixer="attention"'),
    ],
)
def test_what_cannot_be_merged_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        BranchedViTConfig(**(TINY | changes))


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \[B, 3, 6, 6\]"):
        branched()(torch.zeros(1, 3, 8, 8).double())
