"""ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (2103.10697).

Shapes:
    B   images               c    channels of an image, [c, S, S] pixels
    P   side of a patch      n    patches on a side, S / P
    N   tokens, n * n        C    channels of a token
    H   heads                d    channels of a head, C / H
    K   classes

From the paper: Sections 2 to 4. Taken from the released code (facebookresearch/convit): centres
at half-integers for an even number of heads on a side, the bias of the positional logits, and
where the class token enters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.layers.vision import Classifier, PatchEmbed, SelfAttention
from gatebook.models.vit import ViTBlock


@dataclass(frozen=True, kw_only=True)
class ConViTConfig:
    """Sizes and choices of a ConViT; those of Table 3 are `gate`, `train_gate` and `local_init`.

    Raises:
        ValueError: The image has no whole patches, or heads or layers do not fit.
    """

    d_model: int  # C
    n_heads: int  # H; k * k with k = floor(sqrt(H)) of them start as a k x k convolution
    depth: int = 12  # blocks
    gpsa_layers: int = 10  # first blocks, with gated positional attention; 0 is a plain ViT
    hidden: int = 0  # of the MLPs; 0 is 4 C
    locality: float = 1.0  # alpha, at the start
    gate: float = 1.0  # lambda of every head, at the start
    train_gate: bool = True  # False: lambda stays as it is (Table 3)
    local_init: bool = True  # False: positions and values start at random (Table 3)
    image_size: int = 224  # side S of the square image, pixels
    patch_size: int = 16  # P
    in_channels: int = 3  # c
    n_classes: int = 1000  # K
    class_token: bool = True  # prepended after the GPSA blocks; otherwise the mean over tokens
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0
    init_std: float = 0.02  # truncated normal, of every Linear but queries and keys (0.02)

    def __post_init__(self):
        """Refuse what does not fit."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be at least 1 and divide d_model={self.d_model}"
            )
        if not 0 <= self.gpsa_layers <= self.depth - self.class_token:
            raise ValueError(
                f"gpsa_layers={self.gpsa_layers} must be 0 to {self.depth - self.class_token}: "
                f"there are {self.depth} blocks"
                + (", and the class token needs one without positions" * self.class_token)
            )

    @property
    def side(self) -> int:
        """Patches on a side, n."""
        return self.image_size // self.patch_size


def displacements(side: int) -> Tensor:
    """`delta` of every pair of tokens, key minus query, in patches.

    Args:
        side: Tokens on a side of the map, n; tokens are in row-major order.

    Returns:
        `[N, N, 2]` as (x, y), query first, key second.
    """
    line = torch.arange(side, dtype=torch.get_default_dtype(), device="cpu")
    place = torch.cartesian_prod(line, line).flip(-1)  # [N, 2] as (x, y); x runs fastest
    return place[None] - place[:, None]


class GPSA(SelfAttention):
    """Gated positional self-attention (Section 3).

    `A^h = (1 - sigmoid(lambda_h)) softmax(q k^T / sqrt(d)) + sigmoid(lambda_h) softmax(v_h . r)`
    with `r_ij = (delta_x, delta_y, |delta|^2)`. Both maps have rows that sum to 1, so `A` has,
    and the paper's division by the sum of the row is left out.

    The values are mixed by each map, and the results by the gate: the same sum in another order,
    in which the content's map is never stored and the positions' is computed once for a batch.

    Args:
        d_model: Channels C.
        n_heads: Heads H.
        side: Tokens on a side of the map, n.
        gate: `lambda` at the start.
        train_gate: Whether `lambda` is learned.
    """

    def __init__(
        self, d_model: int, n_heads: int, side: int, gate: float = 1.0, train_gate: bool = True
    ):
        super().__init__(d_model, n_heads, qkv_bias=False)
        self.position = nn.Linear(3, n_heads)  # v_h and b_h; the bias cancels in the softmax
        start = torch.full((n_heads,), float(gate))
        self.gate = nn.Parameter(start, requires_grad=train_gate)  # lambda_h
        delta = displacements(side)
        r = torch.cat([delta, delta.square().sum(-1, keepdim=True)], -1)
        self.register_buffer("r", r.to(start.device), persistent=False)  # [N, N, 3]

    @torch.no_grad()
    def start_as_convolution(self, locality: float) -> None:
        """Point head `a + k b` at the shift (b, a) - (k - 1) / 2, and pass values on unchanged.

        `v_h = alpha (2 Delta_x, 2 Delta_y, -1)` makes the logits `-alpha |delta - Delta|^2` and a
        constant, so that k * k heads attend to a k x k neighbourhood. Heads beyond k * k keep
        their positions.

        Args:
            locality: `alpha`.
        """
        k = math.isqrt(self.n_heads)
        shift = torch.arange(k) - (k - 1) / 2
        centre = torch.cartesian_prod(shift, shift)  # [k * k, 2] as (x, y); y runs fastest
        direction = torch.cat([2 * centre, -torch.ones(k * k, 1)], 1)
        self.position.weight[: k * k] = locality * direction.to(self.position.weight)
        value = self.qkv.weight.chunk(3)[2]
        value.copy_(torch.eye(len(value)))

    def positions(self) -> Tensor:
        """The positional map of each head, `[H, N, N]`; it depends on no image."""
        return self.position(self.r).permute(2, 0, 1).softmax(-1)

    def weights(self, x: Tensor) -> Tensor:
        """The map `A` of each head, `[B, H, N, N]`, of tokens `[B, N, C]`."""
        self._check(x)
        share = self._share()
        return (1 - share) * super().weights(x) + share * self.positions()

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[B, N, C]`.

        Raises:
            ValueError: The tokens are not those of the layer's map.
        """
        self._check(x)
        q, k, v = self._heads(x)  # each [B, H, N, d]
        content = F.scaled_dot_product_attention(q, k, v)
        position = torch.einsum("hij,bhjd->bhid", self.positions().to(v.dtype), v)
        mixed = torch.lerp(content, position, self._share().to(v.dtype))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != len(self.r):
            raise ValueError(f"{x.shape[1]} tokens; this layer has positions for {len(self.r)}")

    def _share(self) -> Tensor:
        """`sigmoid(lambda)`, the share of the positions, `[H, 1, 1]`."""
        return self.gate.sigmoid()[:, None, None]


def nonlocality(weights: Tensor, side: int) -> Tensor:
    """How far heads look (Eq. 8): `D = 1/N sum_ij A_ij |delta_ij|`, in patches.

    Args:
        weights: `A`, `[..., N, N]`, of N = n * n patches without a class token.
        side: Patches on a side, n.

    Returns:
        One number for each map, `[...]`.
    """
    distance = displacements(side).norm(dim=-1).to(weights)
    return (weights * distance).sum(-1).mean(-1)


class ConViT(nn.Module):
    """Patches, learned positions, GPSA blocks, the class token, plain blocks, classifier."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.config, d = config, config.d_model
        self.embed = PatchEmbed(config.in_channels, d, config.patch_size, norm=False)
        self.positions = nn.Parameter(torch.zeros(1, config.side**2, d))
        self.class_token = nn.Parameter(torch.zeros(1, 1, d)) if config.class_token else None
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(self._block(i, rate) for i, rate in enumerate(rates))
        self.classifier = Classifier(d, config.n_classes, eps=1e-6)
        self.apply(self._initialise)
        for parameter in (self.class_token, self.positions):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def _block(self, index: int, drop_path: float) -> ViTBlock:
        c = self.config
        if index < c.gpsa_layers:
            attention = GPSA(c.d_model, c.n_heads, c.side, c.gate, c.train_gate)
        else:
            attention = SelfAttention(c.d_model, c.n_heads, qkv_bias=False)
        return ViTBlock(c.d_model, attention, c.hidden or 4 * c.d_model, drop_path=drop_path)

    def _initialise(self, module: nn.Module) -> None:
        """Linear layers first, then, as `apply` goes from the inside out, attention."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, SelfAttention):
            for weight in module.qkv.weight.chunk(3)[:2]:
                nn.init.trunc_normal_(weight, std=0.02)
        if isinstance(module, GPSA):
            nn.init.trunc_normal_(module.position.weight, std=0.02)
            if self.config.local_init:
                module.start_as_convolution(self.config.locality)

    def tokens(self, images: Tensor) -> list[Tensor]:
        """The tokens that enter each block and those that leave the last, `[B, N, C]`.

        The class token is the first of them from block `gpsa_layers` on.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        channels, side = self.config.in_channels, self.config.image_size
        if images.shape[1:] != (channels, side, side):
            raise ValueError(
                f"images of shape {list(images.shape)}; expected [B, {channels}, {side}, {side}]"
            )
        x, found = self.embed(images).flatten(1, 2) + self.positions, []
        for index, block in enumerate(self.blocks):
            if self.class_token is not None and index == self.config.gpsa_layers:
                x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
            found.append(x)
            x = block(x)
        return [*found, x]

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The attention of each block and head, `[B, H, N, N]`; row i has the keys of token i."""
        return [
            block.attention.weights(block.norm1(x))
            for block, x in zip(self.blocks, self.tokens(images), strict=False)
        ]

    def gates(self) -> Tensor:
        """`sigmoid(lambda)` of each GPSA layer and head, `[gpsa_layers, H]`.

        Raises:
            ValueError: There is no GPSA layer.
        """
        if not self.config.gpsa_layers:
            raise ValueError("a model with gpsa_layers=0 has no gates")
        layers = self.blocks[: self.config.gpsa_layers]
        return torch.stack([block.attention.gate.detach().sigmoid() for block in layers])

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, S, S]`, normalised.

        Returns:
            Logits `[B, K]`.
        """
        x = self.tokens(images)[-1]
        return self.classifier(x[:, :1] if self.class_token is not None else x)

    def no_weight_decay(self) -> set[str]:
        """Names of the class token and the positions, which DeiT's recipe does not decay."""
        return {"class_token", "positions"} & {name for name, _ in self.named_parameters()}


def _published(n_heads: int, d_model: int) -> tuple[type[nn.Module], ConViTConfig]:
    """A model of Tables 1 and 3."""
    return ConViT, ConViTConfig(d_model=d_model, n_heads=n_heads, drop_path=0.1)


MODELS: dict[str, tuple[type[nn.Module], ConViTConfig]] = {
    "convit_ti": _published(4, 192),
    "convit_s": _published(9, 432),
    "convit_b": _published(16, 768),
    "convit_ti_plus": _published(4, 256),
    "convit_s_plus": _published(9, 576),
    "convit_b_plus": _published(16, 1024),
}
