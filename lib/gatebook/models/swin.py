"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (arXiv 2103.14030).

Shapes:
    B   images               H, W  height and width of the image, pixels
    h   rows of tokens       w     columns of tokens
    C   channels             nH    heads                d   channels of a head, C / nH
    M   side of a window     N     tokens of a window, M * M
    nW  windows of a map     s     shift, tokens

Read in the paper: the equations, Section 3 and Tables 1 to 7. Taken from the released code
(microsoft/Swin-Transformer): the order of merged neighbours, the initialisation, and that a map
no larger than a window becomes one window that never shifts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.layers.vision import DropPath, PatchEmbed, merge_windows, partition_windows


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Sizes of a Swin Transformer (Section 3.3).

    A window as large as the first stage's map makes every attention global.

    Raises:
        ValueError: Sizes that do not fit: the image, the patches, the windows or the heads.
    """

    d_model: int  # C of the first stage; each later stage doubles it
    depths: tuple[int, ...]  # blocks of each stage
    n_heads: tuple[int, ...]  # heads of each stage
    window_size: int = 7  # M, tokens; a smaller map lowers it
    image_size: int = 224  # side of the square image, pixels
    patch_size: int = 4  # side of a patch, pixels
    in_channels: int = 3  # channels of the image
    n_classes: int = 1000  # classes of the head
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0
    shift: bool = True  # False: no block shifts its windows (Table 4, "w/o shifting")
    relative_bias: bool = True  # False: no position at all (Table 4, "no pos.")

    def __post_init__(self):
        """Refuse what the released code would round or pad silently, or crash on."""
        if len(self.depths) != len(self.n_heads):
            raise ValueError(f"{len(self.depths)} depths but {len(self.n_heads)} numbers of heads")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for stage, heads in enumerate(self.n_heads):
            self._check_stage(stage, self.stage_side(stage), heads)

    def _check_stage(self, stage: int, side: int, heads: int) -> None:
        where = f"stage {stage + 1} of an image of side {self.image_size}"
        if side * 2**stage * self.patch_size != self.image_size:
            raise ValueError(f"{where}: the map before it has an odd side and can't be merged")
        if side > self.window_size and side % self.window_size:
            raise ValueError(
                f"{where}: {side}x{side} tokens have no whole windows of side {self.window_size}; "
                f"choose an image_size that is a multiple of "
                f"{self.patch_size * 2 ** (len(self.depths) - 1) * self.window_size}"
            )
        if self.stage_width(stage) % heads:
            raise ValueError(f"{where}: {self.stage_width(stage)} channels, {heads} heads")

    def stage_side(self, stage: int) -> int:
        """Side of the stage's map in tokens: `H / (P * 2^stage)`."""
        return self.image_size // (self.patch_size * 2**stage)

    def stage_width(self, stage: int) -> int:
        """Channels of the stage: `C * 2^stage`."""
        return self.d_model * 2**stage


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of a window's tokens (text below Eq. 4).

    With `D = query - key`, the row is `(D_y + M - 1) * (2M - 1) + (D_x + M - 1)`.

    Returns:
        `[N, N]` of int64 in `[0, (2M - 1)^2)`; query first, key second.
    """
    side = torch.arange(window_size)
    position = torch.cartesian_prod(side, side)  # [N, 2] as (y, x)
    delta = position[:, None] - position[None] + window_size - 1  # [N, N, 2] in [0, 2M - 2]
    return delta[..., 0] * (2 * window_size - 1) + delta[..., 1]


def shift_mask(height: int, width: int, window_size: int, shift: int) -> Tensor:
    """Additive mask that keeps a rolled map's neighbours apart when the image does (Figure 4).

    The rolled map's last windows hold tokens from opposite edges of the image. Each axis is cut
    at `-M` and `-s`; only tokens of one region attend to each other. We add minus infinity where
    the released code adds -100: the same in float32, and exactly zero weight in any precision.

    Returns:
        `[nW, N, N]` of 0 and minus infinity.
    """

    def third(side: int) -> Tensor:
        token = torch.arange(side)
        return (token >= side - window_size).long() + (token >= side - shift)

    region = 3 * third(height)[:, None] + third(width)  # [h, w]
    label = partition_windows(region[None, :, :, None], window_size)[0]  # [nW, N, 1]
    apart = label != label.transpose(1, 2)
    return torch.zeros(apart.shape).masked_fill(apart, float("-inf"))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with relative position bias (Eq. 4).

    `Attention(Q, K, V) = SoftMax(Q K^T / sqrt(d) + B) V`, where `B` is read from a table of
    `(2M - 1)^2` learned values for each head.

    Args:
        d_model: Channels C.
        n_heads: Heads nH.
        window_size: Side M of a window.
        relative_bias: Whether to add `B`.
    """

    def __init__(self, d_model: int, n_heads: int, window_size: int, relative_bias: bool = True):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.bias_table = None
        if relative_bias:
            self.bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, n_heads))
            index = relative_position_index(window_size)
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        The windows count as heads, so that the mask is the same for each image of the batch.

        Args:
            x: Windows `[B, nW, N, C]`.
            mask: `[nW, N, N]`, added to the logits of every head.

        Returns:
            `[B, nW, N, C]`.
        """
        n_windows = x.shape[1]
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # [B, nW, N, 3, nH, d]
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # each [B, nW*nH, N, d]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(n_windows, mask))
        y = y.unflatten(1, (n_windows, self.n_heads)).transpose(2, 3)  # [B, nW, N, nH, d]
        return self.proj(y.flatten(3))

    def relative_bias(self) -> Tensor:
        """The bias `B` of each head, `[nH, N, N]`; query first, key second."""
        return self.bias_table[self.index].permute(2, 0, 1)

    def _bias(self, n_windows: int, mask: Tensor | None) -> Tensor | None:
        """Sum of relative bias and mask, `[nW * nH, N, N]`; None if there is neither."""
        if self.bias_table is None:
            return None if mask is None else mask.repeat_interleave(self.n_heads, dim=0)
        bias = self.relative_bias()  # [nH, N, N]
        if mask is None:
            return bias.repeat(n_windows, 1, 1)
        return (mask[:, None] + bias).flatten(0, 1)


class SwinBlock(nn.Module):
    """One block: (shifted) window attention, then an MLP, each pre-normed and residual (Eq. 3).

    Args:
        d_model: Channels C.
        n_heads: Heads nH.
        height: Rows h of the map.
        width: Columns w of the map.
        window_size: Side M of a window; a map whose smaller side is at most M gets windows of
            that side and no shift.
        shift: Whether to shift the windows by `M // 2`.
        relative_bias: Whether attention has relative position bias.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        height: int,
        width: int,
        window_size: int,
        shift: bool,
        relative_bias: bool = True,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.window_size = min(window_size, height, width)
        self.shift = window_size // 2 if shift and min(height, width) > window_size else 0
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = WindowAttention(d_model, n_heads, self.window_size, relative_bias)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )
        self.drop_path = DropPath(drop_path)
        mask = shift_mask(height, width, self.window_size, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to the same shape."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """W-MSA, or SW-MSA by a cyclic shift (Figure 4): roll, attend with the mask, roll back."""
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = self.attention(partition_windows(x, self.window_size), self.mask)
        x = merge_windows(windows, self.window_size, x.shape[1])
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x


class PatchMerging(nn.Module):
    """Halve the map and double its channels: join 2x2 neighbours, LayerNorm, Linear 4C to 2C."""

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * d_model)
        self.reduction = nn.Linear(4 * d_model, 2 * d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, h, w, C]` to `[B, h/2, w/2, 2C]`.

        Neighbours are joined in the released code's order: (even row, even column), (odd, even),
        (even, odd), (odd, odd).
        """
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h/2, 2, w/2, 2, C]
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # [B, h/2, w/2, 4C], column parity first
        return self.reduction(self.norm(x))


class SwinTransformer(nn.Module):
    """The whole classifier: patches, stages with merging between them, mean over tokens, head."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config.in_channels, config.d_model, config.patch_size)
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        stages: list[nn.Module] = []
        for stage, depth in enumerate(config.depths):
            blocks = [self._block(stage, i, rates.pop(0)) for i in range(depth)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        widths = [config.stage_width(stage) for stage in range(len(stages))]
        self.merges = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.n_classes)
        self.apply(_initialise)

    def _block(self, stage: int, index: int, drop_path: float) -> SwinBlock:
        config, side = self.config, self.config.stage_side(stage)
        return SwinBlock(
            config.stage_width(stage),
            config.n_heads[stage],
            height=side,
            width=side,
            window_size=config.window_size,
            shift=config.shift and index % 2 == 1,
            relative_bias=config.relative_bias,
            drop_path=drop_path,
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """Output of each stage, `[B, h, w, C]`, finest first, before any merging.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        channels, side = self.config.in_channels, self.config.image_size
        if images.shape[1:] != (channels, side, side):
            raise ValueError(
                f"images of shape {list(images.shape)}; expected [B, {channels}, {side}, {side}]"
            )
        maps, x = [], self.embed(images)
        for stage, blocks in enumerate(self.stages):
            x = blocks(self.merges[stage - 1](x) if stage else x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, n_classes]`.
        """
        return self.head(self.norm(self.features(images)[-1]).mean(dim=(1, 2)))

    def no_weight_decay(self) -> set[str]:
        """Names of the bias tables, which the released recipe does not decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}


def _initialise(module: nn.Module) -> None:
    """Linear weights and bias tables from N(0, 0.02^2), Linear biases 0 (released code)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention) and module.bias_table is not None:
        nn.init.trunc_normal_(module.bias_table, std=0.02)


def _published(d_model: int, depth: int, drop_path: float, **changes) -> tuple[type, SwinConfig]:
    """A model of Section 3.3: 32 channels a head, `depth` blocks in the third stage."""
    heads = tuple(d_model * 2**stage // 32 for stage in range(4))
    sizes = {"d_model": d_model, "depths": (2, 2, depth, 2), "n_heads": heads}
    return SwinTransformer, SwinConfig(**sizes, drop_path=drop_path, **changes)


# Stochastic depth: Section 4.1 for T, S and B; not known to us for L, whose 0.2 is our choice.
MODELS: dict[str, tuple[type[nn.Module], SwinConfig]] = {
    "swin_t": _published(96, 6, 0.2),
    "swin_s": _published(96, 18, 0.3),
    "swin_b": _published(128, 18, 0.5),
    "swin_b_384": _published(128, 18, 0.5, image_size=384, window_size=12),
    "swin_l": _published(192, 18, 0.2),
    "swin_l_384": _published(192, 18, 0.2, image_size=384, window_size=12),
}
