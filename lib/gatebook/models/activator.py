"""Activator: GLU activations as the core functions of a vision Transformer (arXiv 2405.15953).

    GatedUnit        W3 (LN(GELU(W1 x)) ⊙ LN(W2 x)), the same LN on both branches
    ActivatorBlock   x += GatedUnit(LN(x)); x += FFN(LN(x)), the same LN before both
    Activator        patches, blocks, mean over tokens, linear classifier

Taken from the released code (Abdullah-88/Activator), since the abstract gives no equations: sizes,
shared norms, biases, no position, no norm before the head. There, nothing mixes tokens: each patch
is processed alone, and the head averages. `positions` and `token_hidden` are our extensions.

Shapes:
    B  images      [c, H, W]  pixels           P  side of a patch, pixels
    N  tokens      D          width            h  hidden width        K  classes
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gatebook.errors import unknown
from gatebook.layers.vision import MLP, Classifier, PatchEmbed
from gatebook.models.vit import ViT, ViTConfig, cifar_control

GATES: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class ActivatorConfig:
    """Sizes and choices; the defaults are variant 1 of the released code.

    Raises:
        ValueError: An unknown gate, or an image without whole patches.
    """

    d_model: int = 256  # D
    hidden: int = 512  # h, of the gated unit and of the plain MLP
    depth: int = 4  # blocks
    ffn: bool = True  # the plain MLP after the gated unit; False is variant 2, "only GEGLU"
    gate: Literal["gelu", "silu", "relu"] = "gelu"  # GEGLU, SwiGLU or ReGLU
    dropout: float = 0.5  # in the plain MLP
    positions: bool = False  # extension: learned, added to the tokens
    token_hidden: int = 0  # extension: hidden width of a gated unit over the tokens; 0 has none
    image_size: int = 32  # side of the square image, pixels
    patch_size: int = 4  # P
    in_channels: int = 3  # c
    n_classes: int = 10  # K

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        if self.gate not in GATES:
            raise ValueError(unknown("gate", self.gate, GATES))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def n_patches(self) -> int:
        """Patches of an image, N."""
        return (self.image_size // self.patch_size) ** 2


class GatedUnit(nn.Module):
    """A gated linear unit whose branches are normed, by one and the same LayerNorm.

    `W3 (LN(GELU(W1 x + b1)) ⊙ LN(W2 x + b2)) + b3`, over the last axis.

    Args:
        width: Of the last axis, D (or N for the extension).
        hidden: h.
        gate: A key of `GATES`.
    """

    def __init__(self, width: int, hidden: int, gate: str = "gelu"):
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(hidden)
        self.activation = GATES[gate]()

    def gate(self, x: Tensor) -> Tensor:
        """The gate of `x`, `[..., D]` to `[..., h]`: of mean 0 and variance 1 before the gain."""
        return self.norm(self.activation(self.w1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same shape."""
        return self.w3(self.gate(x) * self.norm(self.w2(x)))


class ActivatorBlock(nn.Module):
    """Gated unit, then a plain MLP, each residual and behind the same LayerNorm.

    With `token_hidden`, a gated unit over the token axis comes first: our extension, which gives
    the block what attention has and the released code has not.
    """

    def __init__(self, config: ActivatorConfig):
        super().__init__()
        c = config
        self.norm = nn.LayerNorm(c.d_model)
        self.unit = GatedUnit(c.d_model, c.hidden, c.gate)
        self.ffn = MLP(c.d_model, c.hidden, c.dropout) if c.ffn else None
        self.token_unit = None
        if c.token_hidden:
            self.token_unit = GatedUnit(c.n_patches, c.token_hidden, c.gate)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, D]` to the same shape."""
        if self.token_unit is not None:
            x = x + self.token_unit(self.norm(x).mT).mT
        x = x + self.unit(self.norm(x))
        return x if self.ffn is None else x + self.ffn(self.norm(x))


class Activator(nn.Module):
    """The whole classifier, with PyTorch's own initialisation."""

    def __init__(self, config: ActivatorConfig):
        super().__init__()
        self.config, d = config, config.d_model
        self.embed = PatchEmbed(config.in_channels, d, config.patch_size, norm=False)
        n = config.n_patches
        self.positions = nn.Parameter(torch.zeros(1, n, d)) if config.positions else None
        self.blocks = nn.Sequential(*(ActivatorBlock(config) for _ in range(config.depth)))
        self.classifier = Classifier(d, config.n_classes, norm="none")

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens that enter the first block, `[B, N, D]`.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        channels, side = self.config.in_channels, self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (channels, side, side):
            raise ValueError(
                f"images of shape {list(images.shape)}; expected [B, {channels}, {side}, {side}]"
            )
        x = self.embed(images).flatten(1, 2)
        return x if self.positions is None else x + self.positions

    def votes(self, images: Tensor) -> Tensor:
        """The classifier on each output token, `[B, N, K]`; their mean over tokens is the logits.

        Without extensions, a patch's votes depend on its own pixels alone.
        """
        return self.classifier.head(self.blocks(self.tokens(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, K]`.

        Raises:
            ValueError: As in `tokens`.
        """
        return self.classifier(self.blocks(self.tokens(images)))

    def no_weight_decay(self) -> set[str]:
        """The positions, if there are any."""
        return {"positions"} & {name for name, _ in self.named_parameters()}


MODELS: dict[str, tuple[type[nn.Module], ActivatorConfig | ViTConfig]] = {
    "activator": (Activator, ActivatorConfig()),
    "activator_glu": (Activator, ActivatorConfig(ffn=False)),  # variant 2
    "activator_vit": (ViT, cifar_control(n_heads=4)),  # heads: our choice; positions start at zero
    "activator_mixer": (ViT, cifar_control(mixer="mlp", token_hidden=512, positions=False)),
}
