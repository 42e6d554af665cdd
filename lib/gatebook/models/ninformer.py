"""NiNformer: Network in Network Transformer with a Token Mixing Gate (arXiv 2403.02411, 2024).

Shapes: B images, `[c, H, W]` pixels, P side of a patch, N patches, D channels, h hidden width, t
hidden width of the MLP over tokens, K classes.

Taken from the released code (Abdullah-88/NiNformer): everything below. The paper's tables and
equations were not read. There is no position embedding and no class token: the MLP over tokens has
weights of its own for each position. There is no norm at the end, and one LayerNorm serves both
halves of a block. The gates "add", "static", "sigmoid" and "none" are our controls.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatebook.errors import unknown
from gatebook.layers.vision import MLP, Classifier, DepthwiseConv, PatchEmbed
from gatebook.models.vit import MixerBlock, ViT, ViTConfig, cifar_control

Gate = Literal["product", "add", "static", "sigmoid", "none"]


@dataclass(frozen=True, kw_only=True)
class NiNformerConfig:
    """Sizes and choices; the defaults are those of the released code.

    Raises:
        ValueError: An unknown gate, or an image without whole patches.
    """

    d_model: int = 256  # D
    hidden: int = 512  # h, of the MLPs over channels
    token_hidden: int = 512  # t, of the MLP over tokens
    depth: int = 4  # blocks
    gate: Gate = "product"  # how the inner network acts on the projected tokens, see MixerGatedUnit
    dropout: float = 0.5  # in every MLP
    image_size: int = 32  # side of the square image, pixels
    patch_size: int = 4  # P
    in_channels: int = 3  # c
    n_classes: int = 10  # K

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        if self.gate not in get_args(Gate):
            raise ValueError(unknown("gate", self.gate, get_args(Gate)))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def n_patches(self) -> int:
        """Patches of an image, N."""
        return (self.image_size // self.patch_size) ** 2


class MixerGatedUnit(nn.Module):
    """MGU(z) = (z W_p + b_p) ⊙ Mix(z): projected tokens times the output of a Mixer block.

    The gate is unbounded and may be negative; as Mix holds a skip of z, the unit starts near a
    square of its input. In place of the product:

        add      (z W_p + b_p) + Mix(z): the same parts without a gate
        static   (Mix(z) W_p + b_p) ⊙ G with a learned G, `[N, D]`, which does not see the input
        sigmoid  (z W_p + b_p) ⊙ sigmoid(Mix(z))
        none     Mix(z) alone, without the projection
    """

    def __init__(self, config: NiNformerConfig) -> None:
        super().__init__()
        c, n = config, config.n_patches
        self.gate = c.gate
        self.project = nn.Linear(c.d_model, c.d_model) if c.gate != "none" else None
        self.mix = MixerBlock(c.d_model, n, c.token_hidden, c.hidden, c.dropout)
        if c.gate == "static":
            self.table = nn.Parameter(torch.ones(n, c.d_model))

    def forward(self, z: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to the same shape."""
        mixed = self.mix(z)
        if self.gate == "static":
            return self.project(mixed) * self.table
        if self.gate == "none":
            return mixed
        if self.gate == "add":
            return self.project(z) + mixed
        return self.project(z) * (mixed.sigmoid() if self.gate == "sigmoid" else mixed)


class NiNformerBlock(nn.Module):
    """x += MGU(LN(x)); x += MLP(LN(x)), with one and the same LayerNorm."""

    def __init__(self, config: NiNformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.unit = MixerGatedUnit(config)
        self.ffn = MLP(config.d_model, config.hidden, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to the same shape."""
        x = x + self.unit(self.norm(x))
        return x + self.ffn(self.norm(x))


class NiNformer(nn.Module):
    """The whole classifier: patches, blocks, mean over tokens; PyTorch's own initialisation."""

    def __init__(self, config: NiNformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config.in_channels, config.d_model, config.patch_size, norm=False)
        self.blocks = nn.Sequential(*(NiNformerBlock(config) for _ in range(config.depth)))
        self.classifier = Classifier(config.d_model, config.n_classes, norm="none")

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised; the weights over tokens fix their size.

        Returns:
            Logits `[B, K]`.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        c = self.config
        if images.shape[1:] != (c.in_channels, c.image_size, c.image_size):
            expected = f"[B, {c.in_channels}, {c.image_size}, {c.image_size}]"
            raise ValueError(f"images of shape {list(images.shape)}; expected {expected}")
        return self.classifier(self.blocks(self.embed(images).flatten(1, 2)))

    def no_weight_decay(self) -> set[str]:
        """The tables of the static control."""
        return {name for name, _ in self.named_parameters() if name.endswith("table")}


class LocalMLP(nn.Module):
    """An MLP on tokens that lie in a square, with a 3 x 3 depthwise convolution before its GELU.

    Args:
        d_model: Channels D.
        hidden: Hidden width, of the convolution, too.
        dropout: After the GELU and at the end.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        self.near = DepthwiseConv(hidden, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to the same shape."""
        side = round(x.shape[1] ** 0.5)
        h = self.near(self.up(x).unflatten(1, (side, side))).flatten(1, 2)  # [B, N, h]
        return self.drop(self.down(self.drop(F.gelu(h))))


class LocalViT(ViT):
    """A ViT without a class token whose MLPs are local; a control. Recalled, not read."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.mlp = LocalMLP(config.d_model, config.hidden, config.dropout)


MODELS: dict[str, tuple[type[nn.Module], NiNformerConfig | ViTConfig]] = {
    "ninformer": (NiNformer, NiNformerConfig()),
    "ninformer_vit": (ViT, cifar_control(n_heads=4)),  # heads: our choice
    "ninformer_local_vit": (LocalViT, cifar_control(n_heads=4)),
} | {
    f"ninformer_mixer{suffix}": (
        ViT,
        cifar_control(depth=depth, mixer="mlp", token_hidden=512, positions=False),
    )
    for suffix, depth in {"": 4, "_8": 8}.items()  # of as many blocks, of as many parameters
}
