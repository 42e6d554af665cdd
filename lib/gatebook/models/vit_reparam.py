"""Rethinking Vision Transformer Depth via Structural Reparameterization (arXiv 2511.19718).

Read of the paper: the abstract and public summaries. They name what is done (blocks in parallel
that join step by step, LayerNorm taken out, attention without concatenation, an exact merge). The
equations are a derivation that does all of it; they are not copied from the paper.

    BranchedViT   what is trained: layers of B blocks side by side, which join as λ goes to 1
    merge         exact at λ = 1: one block for each layer
    concatenate   exact at λ = 0: the control that needs no joining, and costs B blocks a layer
    MergedViT     what both return

Shapes: n images, T tokens, D channels, H heads of d = D / H channels, B branches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from gatebook.layers.vision import DropPath, SelfAttention
from gatebook.models.vit import ViT, ViTBlock, ViTConfig

Form = Literal["A", "B", "concat"]


@dataclass(frozen=True, kw_only=True)
class BranchedViTConfig(ViTConfig):
    """Sizes of a Vision Transformer whose layers have branches.

    Raises:
        ValueError: Fewer branches than one, a schedule that ends before it begins, a Mixer, or
            dropout: joined branches would need the same mask.
    """

    branches: int = 1  # B, blocks side by side in each of the `depth` layers
    join: tuple[int, int] | None = None  # optimiser steps where λ leaves 0 and reaches 1; or never
    join_values: bool = True  # variant A; False, variant B, leaves the values apart

    def __post_init__(self):
        """Refuse what cannot be merged."""
        super().__post_init__()
        if self.branches < 1:
            raise ValueError(f"branches must be at least 1, got {self.branches}")
        if self.join is not None and not 0 <= self.join[0] <= self.join[1]:
            raise ValueError(f"join is (first step, last step), 0 <= first <= last: {self.join}")
        if self.mixer != "attention" or self.dropout:
            raise ValueError(
                f'branches need mixer="attention" and dropout=0 (drop_path is shared by all of a '
                f"layer), got {self.mixer!r} and {self.dropout}"
            )


@dataclass(frozen=True, kw_only=True)
class MergedViTConfig(ViTConfig):
    """Sizes of what is left after merging."""

    form: Form = "A"  # "A": plain blocks; "B": W^VO of each head; "concat": B times heads and units
    branches: int = 1  # B that were merged; changes the sizes of "concat" alone


def joined(x: Tensor, share: Tensor) -> Tensor:
    """Move branches towards their mean: `(1 - λ) x_i + λ mean_j x_j`.

    Args:
        x: `[B, ...]`, a branch at each place of the first axis.
        share: λ, a scalar or one for each entry, that broadcasts with `x`.
    """
    return torch.lerp(x, x.mean(0, keepdim=True), share.to(x.dtype))


class BranchedBlock(nn.Module):
    """x += c Σ attention_i(LN_i(x)); x += c Σ MLP_i(LN_i(x)), with c = B^-1/2.

    The branches meet where the non-linearity begins: at queries and keys (and values, in variant
    A), and at the hidden units before GELU. With λ = 1 all activations of a kind coincide.

    Args:
        config: Sizes.
        drop_path: Stochastic depth, one mask for all branches.
    """

    def __init__(self, config: BranchedViTConfig, drop_path: float = 0.0):
        super().__init__()
        c, d = config, config.d_model
        self.branches = nn.ModuleList(
            ViTBlock(d, SelfAttention(d, c.n_heads, c.qkv_bias), c.hidden or 4 * d, eps=c.norm_eps)
            for _ in range(c.branches)
        )
        self.n_heads, self.join_values = c.n_heads, c.join_values
        self.scale = c.branches**-0.5
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, join: Tensor) -> Tensor:
        """Mix tokens `[n, T, D]`; `join` is λ, a scalar."""
        x = x + self.drop_path(self.attend(x, join))
        return x + self.drop_path(self.feed_forward(x, join))

    def attend(self, x: Tensor, join: Tensor) -> Tensor:
        """c Σ_i Σ_h softmax(Q̃_ih K̃_ihᵀ / √d) Ṽ_ih W^O_ih + b^O_i, of `[n, T, D]`."""
        qkv = torch.stack([b.attention.qkv(b.norm1(x)) for b in self.branches])  # [B, n, T, 3 D]
        share = torch.stack([join, join, join * self.join_values])[:, None, None]
        qkv = joined(qkv.unflatten(-1, (3, self.n_heads, -1)), share)  # [B, n, T, 3, H, d]
        q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)  # each [B n, H, T, d]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B n, T, D]
        y = y.unflatten(0, (len(self.branches), -1))
        return self.scale * sum(
            b.attention.out(own) for b, own in zip(self.branches, y, strict=True)
        )

    def feed_forward(self, x: Tensor, join: Tensor) -> Tensor:
        """c Σ_i W²_i φ(h̃_i) + b²_i with h_i = W¹_i LN_i(x) + b¹_i, of `[n, T, D]`."""
        h = torch.stack([b.mlp[0](b.norm2(x)) for b in self.branches])  # [B, n, T, 4 D]
        h = F.gelu(joined(h, join))
        return self.scale * sum(b.mlp[2](own) for b, own in zip(self.branches, h, strict=True))


_STEPPING: WeakSet["BranchedViT"] = WeakSet()  # the models whose steps are counted


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any optimiser: count it for the models whose parameters it holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in _STEPPING:
        if id(next(model.parameters())) in held:
            model.step += 1


register_optimizer_step_post_hook(_count)


class BranchedViT(ViT):
    """What is trained: `depth` layers of `branches` blocks.

    λ follows from the number of steps that an optimiser of these parameters has taken, which the
    model counts by a hook of torch's: it is 0 before the first of `join`, rises linearly, and is 1
    from the last on. How many batches are accumulated for a step does not matter.
    """

    def __init__(self, config: BranchedViTConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(self.blocks)
        self.register_buffer("step", torch.tensor(0))
        _STEPPING.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled model counts its own steps, too."""
        super().__setstate__(state)
        _STEPPING.add(self)

    def _block(self, n_tokens: int, drop_path: float) -> BranchedBlock:
        return BranchedBlock(self.config, drop_path)

    def coefficient(self) -> Tensor:
        """λ of the next step, a scalar in [0, 1]."""
        if self.config.join is None:
            return torch.zeros((), device=self.step.device)
        first, last = self.config.join
        return ((self.step - first + 1) / (last - first + 1)).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images `[n, c, height, width]`; logits `[n, classes]`."""
        join = self.coefficient()
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x, join)
        return self.classifier(x[:, :1] if self.class_token is not None else x)


class ValueOutputAttention(nn.Module):
    """Attention without concatenation, Σ_h softmax(Q_h K_hᵀ / √d) x W^VO_h + b (variant B).

    W^VO_h is a D x D matrix, where a plain head has a product of rank d. A layer, MLP of width 4 D
    included, costs (10 + H) T D² + (1 + H) T² D multiply-adds; a plain one 12 T D² + 2 T² D.

    Args:
        d_model: Channels D.
        n_heads: Heads H.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qk = nn.Linear(d_model, 2 * d_model)
        self.vo = nn.Linear(d_model, n_heads * d_model, bias=False)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[n, T, D]`."""
        q, k = self.qk(x).unflatten(-1, (2, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.vo(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [n, H, T, D]
        return F.scaled_dot_product_attention(q, k, v).sum(1) + self.bias


class MergedViT(ViT):
    """What is left for inference: one block for each layer, in one of three forms."""

    def _block(self, n_tokens: int, drop_path: float) -> ViTBlock:
        c, d = self.config, self.config.d_model
        hidden = c.hidden or 4 * d
        if c.form == "concat":
            attention = SelfAttention(d, c.branches * c.n_heads, d_head=d // c.n_heads)
            return ViTBlock(d, attention, c.branches * hidden, 0.0, drop_path, c.norm_eps)
        kind = SelfAttention if c.form == "A" else ValueOutputAttention
        return ViTBlock(d, kind(d, c.n_heads), hidden, 0.0, drop_path, c.norm_eps)


def absorb(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias that give `linear(norm(x))` from the normalised x alone.

    LN(x) = γ ⊙ n(x) + β, so W becomes W diag(γ) and b becomes b + W β.
    """
    bias = linear.weight @ norm.bias
    return linear.weight * norm.weight, bias if linear.bias is None else bias + linear.bias


def _mean(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    weights, biases = zip(*pairs, strict=True)
    return torch.stack(weights).mean(0), torch.stack(biases).mean(0)


def _sum(block: BranchedBlock, layers: Iterable[nn.Linear]) -> tuple[Tensor, Tensor]:
    pairs = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
    return tuple(block.scale * torch.stack(part).sum(0) for part in pairs)


def _named(**layers: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Entries of a state dict; norms without effect, because theirs is absorbed."""
    dim = layers["mlp_2"][1]
    layers |= {f"norm{i}": (torch.ones_like(dim), torch.zeros_like(dim)) for i in (1, 2)}
    pairs = ((name.replace("_", "."), pair) for name, pair in layers.items())
    return {
        f"{name}.{part}": t
        for name, pair in pairs
        for part, t in zip(("weight", "bias"), pair, strict=True)
    }


def _merged_a(block: BranchedBlock) -> dict[str, Tensor]:
    """Means of what enters a non-linearity, sums of what leaves it."""
    bs = block.branches
    return _named(
        attention_qkv=_mean(absorb(b.norm1, b.attention.qkv) for b in bs),
        attention_out=_sum(block, (b.attention.out for b in bs)),
        mlp_0=_mean(absorb(b.norm2, b.mlp[0]) for b in bs),
        mlp_2=_sum(block, (b.mlp[2] for b in bs)),
    )


def _merged_b(block: BranchedBlock) -> dict[str, Tensor]:
    """As A, but W^VO_h = c Σ_i W^O_ih W^V_ih. Rows of the attention sum to 1, so the values' biases
    pass through it and end in the output's."""
    state, h = _merged_a(block), block.n_heads
    weight, bias = (state.pop(f"attention.qkv.{part}") for part in ("weight", "bias"))
    state.pop("attention.out.weight")
    d_model = weight.shape[1]
    state["attention.qk.weight"], state["attention.qk.bias"] = weight[:-d_model], bias[:-d_model]
    vo, through = 0, state.pop("attention.out.bias")
    for b in block.branches:
        w_v, b_v = (t[2 * d_model :] for t in absorb(b.norm1, b.attention.qkv))
        heads = b.attention.out.weight.unflatten(1, (h, -1)), w_v.unflatten(0, (h, -1))
        vo = vo + block.scale * torch.einsum("ohd,hdi->hoi", *heads)  # [H, D, D]
        through = through + block.scale * b.attention.out.weight @ b_v
    return state | {"attention.vo.weight": vo.flatten(0, 1), "attention.bias": through}


def _concatenated(block: BranchedBlock) -> dict[str, Tensor]:
    """Heads and hidden units side by side."""
    bs = block.branches
    qkv = zip(*(absorb(b.norm1, b.attention.qkv) for b in bs), strict=True)
    up = zip(*(absorb(b.norm2, b.mlp[0]) for b in bs), strict=True)
    out, down = ([pick(b) for b in bs] for pick in (lambda b: b.attention.out, lambda b: b.mlp[2]))
    side = [block.scale * torch.cat([x.weight for x in layers], 1) for layers in (out, down)]
    return _named(
        attention_qkv=tuple(torch.cat([t.unflatten(0, (3, -1)) for t in ts], 1).flatten(0, 1)
                            for ts in qkv),
        attention_out=(side[0], _sum(block, out)[1]),
        mlp_0=tuple(torch.cat(ts) for ts in up),
        mlp_2=(side[1], _sum(block, down)[1]),
    )  # fmt: skip


def merge(model: BranchedViT) -> MergedViT:
    """One block for each layer of joined branches, with the same outputs.

    Variant A has the size of a plain `ViT` of this depth; variant B has larger values. The sums are
    done in float64, so that only their rounding is left.

    Args:
        model: At λ = 1, the end of its schedule. It stays as it is.

    Returns:
        A model of its own weights, of the same device, type and mode.

    Raises:
        ValueError: λ < 1: no merged model has the same outputs; or the branches never join.
    """
    if model.config.branches > 1 and model.config.join is None:
        raise ValueError(
            "the branches never join (join=None): concatenate them, or train a model with "
            "join=(first step, last step)"
        )
    if model.config.branches > 1 and model.coefficient() < 1:
        raise ValueError(
            f"the branches are joined to {float(model.coefficient()):.3g}, and merging is exact at "
            f"1: train to the end of join={model.config.join} first"
        )
    return _merged(model, "A" if model.config.join_values else "B")


def concatenate(model: BranchedViT) -> MergedViT:
    """Branches that never joined as one block of B times the heads and hidden units.

    Args, Returns: As `merge`, but at λ = 0.

    Raises:
        ValueError: λ > 0.
    """
    if model.coefficient() > 0:
        raise ValueError(
            f"the branches are joined to {float(model.coefficient()):.3g}, and they lie side by "
            "side at 0 only"
        )
    return _merged(model, "concat")


@torch.no_grad()
def _merged(model: BranchedViT, form: Form) -> MergedViT:
    c, parameter = model.config, next(model.parameters())
    sizes = {field.name: getattr(c, field.name) for field in fields(ViTConfig)}
    config = MergedViTConfig(**sizes | {"qkv_bias": True}, form=form, branches=c.branches)
    with torch.device("meta"):  # what is loaded below takes the place of these weights
        exact, merged = BranchedViT(c), MergedViT(config)
    state = {k: t.to("cpu", torch.float64, copy=True) for k, t in model.state_dict().items()}
    exact.load_state_dict(state, assign=True)
    parts = {name: t for name, t in state.items() if not name.startswith(("blocks.", "step"))}
    merge_block = {"A": _merged_a, "B": _merged_b, "concat": _concatenated}[form]
    for i, block in enumerate(exact.blocks):
        parts |= {f"blocks.{i}.{name}": tensor for name, tensor in merge_block(block).items()}
    merged.load_state_dict(parts, assign=True)
    return merged.to(parameter.device, parameter.dtype).train(model.training)


_TINY = {"d_model": 192, "n_heads": 3, "drop_path": 0.1}  # ViT-Tiny, as `deit_ti`
_LAYERS = {6: 2, 4: 3, 3: 4}  # 12 blocks as G layers of B; `join` is to be given for training

MODELS: dict[str, tuple[type[nn.Module], ViTConfig]] = {
    f"vit_ti_{depth}x{branches}": (
        BranchedViT,
        BranchedViTConfig(**_TINY, depth=depth, branches=branches),
    )
    for depth, branches in _LAYERS.items()
} | {
    f"vit_ti_{depth}_{form.lower()}": (
        MergedViT,
        MergedViTConfig(**_TINY, depth=depth, branches=branches, form=form),
    )
    for depth, branches in _LAYERS.items()
    for form in ("A", "B", "concat")
}
