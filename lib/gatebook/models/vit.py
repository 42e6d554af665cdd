"""Controls of the vision chapters: Vision Transformer (arXiv 2010.11929), MLP-Mixer (2105.01601).

Neither is a chapter of its own. Sizes of DeiT (arXiv 2012.12877) for the first, from memory and
checked by their numbers of parameters.

Shapes: B images, `[c, H, W]` pixels, P side of a patch, N tokens, C channels, K classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatebook.layers.vision import MLP, Classifier, DropPath, PatchEmbed, SelfAttention


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes and choices of a Vision Transformer or a Mixer.

    Raises:
        ValueError: The image has no whole patches, or attention no whole heads.
    """

    d_model: int  # C
    depth: int  # blocks
    n_heads: int = 0  # of attention
    hidden: int = 0  # of the channel MLP; 0 is 4 C
    token_hidden: int = 0  # of the Mixer's token MLP; 0 is C / 2
    mixer: Literal["attention", "mlp"] = "attention"  # what mixes the tokens
    image_size: int = 224  # side of the square image, pixels
    patch_size: int = 16  # P
    in_channels: int = 3  # c
    n_classes: int = 1000  # K
    class_token: bool = True  # read it out; otherwise the mean over all tokens
    positions: bool = True  # learned, added to the tokens
    final_norm: bool = True  # before the read-out
    qkv_bias: bool = True  # of attention
    dropout: float = 0.0  # in the MLPs
    drop_path: float = 0.0  # stochastic depth of the last block; it rises linearly from 0
    norm_eps: float = 1e-6  # of every LayerNorm
    init_std: float = 0.02  # truncated normal, of every Linear and the positions; 0 is torch's own

    def __post_init__(self):
        """Refuse what does not fit."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.mixer == "attention" and (self.n_heads < 1 or self.d_model % self.n_heads):
            raise ValueError(
                f"n_heads must divide d_model={self.d_model} for attention, got {self.n_heads}"
            )

    @property
    def n_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class MixerBlock(nn.Module):
    """x += MLP over tokens of LN(x); x += MLP over channels of LN(x).

    Args:
        d_model: Channels C.
        n_tokens: Tokens N.
        token_hidden: Hidden width of the MLP over tokens.
        hidden: Hidden width of the MLP over channels.
        dropout: In both MLPs.
        eps: Of LayerNorm.
    """

    def __init__(
        self,
        d_model: int,
        n_tokens: int,
        token_hidden: int,
        hidden: int,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.token_norm = nn.LayerNorm(d_model, eps=eps)
        self.token_mlp = MLP(n_tokens, token_hidden, dropout)
        self.channel_norm = nn.LayerNorm(d_model, eps=eps)
        self.channel_mlp = MLP(d_model, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[B, N, C]`."""
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.channel_norm(x))


class ViTBlock(nn.Module):
    """x += attention(LN(x)); x += MLP(LN(x)).

    Args:
        d_model: Channels C.
        attention: Mixes tokens `[B, N, C]`.
        hidden: Hidden width of the MLP.
        dropout: In the MLP.
        drop_path: Stochastic depth of both branches.
        eps: Of LayerNorm.
    """

    def __init__(
        self,
        d_model: int,
        attention: nn.Module,
        hidden: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(d_model, eps=eps)
        self.mlp = MLP(d_model, hidden, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens `[B, N, C]`."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patches, positions, blocks, and a class token or the mean over tokens."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, d = config, config.d_model
        self.embed = PatchEmbed(config.in_channels, d, config.patch_size, norm=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d)) if config.class_token else None
        n = config.n_patches + config.class_token
        self.positions = nn.Parameter(torch.zeros(1, n, d)) if config.positions else None
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(self._block(n, rate) for rate in rates))
        place = "before" if config.final_norm else "none"
        self.classifier = Classifier(d, config.n_classes, place, config.norm_eps)
        if config.init_std:
            self.apply(self._initialise)
            for parameter in (self.class_token, self.positions):
                if parameter is not None:
                    nn.init.trunc_normal_(parameter, std=config.init_std)

    def _block(self, n_tokens: int, drop_path: float) -> nn.Module:
        c = self.config
        hidden = c.hidden or 4 * c.d_model
        if c.mixer == "mlp":
            token_hidden = c.token_hidden or c.d_model // 2
            return MixerBlock(c.d_model, n_tokens, token_hidden, hidden, c.dropout, c.norm_eps)
        attention = SelfAttention(c.d_model, c.n_heads, c.qkv_bias)
        return ViTBlock(c.d_model, attention, hidden, c.dropout, drop_path, c.norm_eps)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens that enter the first block, `[B, N, C]`, the class token first."""
        c = self.config
        if images.shape[1:] != (c.in_channels, c.image_size, c.image_size):
            expected = f"[B, {c.in_channels}, {c.image_size}, {c.image_size}]"
            raise ValueError(f"images of shape {list(images.shape)}; expected {expected}")
        x = self.embed(images).flatten(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return x if self.positions is None else x + self.positions

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `[B, c, H, W]`, normalised.

        Returns:
            Logits `[B, K]`.

        Raises:
            ValueError: The images have another shape than the configuration's.
        """
        x = self.blocks(self.tokens(images))
        return self.classifier(x[:, :1] if self.class_token is not None else x)

    def no_weight_decay(self) -> set[str]:
        """Names of the class token and the positions, which DeiT's recipe does not decay."""
        return {"class_token", "positions"} & {name for name, _ in self.named_parameters()}


def cifar_control(**changes: Any) -> ViTConfig:
    """A control for 32² pixels, of the widths, patches and dropout of Activator and NiNformer.

    Both papers compare with a ViT and an MLP-Mixer whose sizes their code does not hold.

    Args:
        changes: What differs, such as `n_heads=4`, or `mixer="mlp"` with `token_hidden`.
    """
    same = {"d_model": 256, "hidden": 512, "depth": 4, "dropout": 0.5, "n_classes": 10}
    pixels = {"image_size": 32, "patch_size": 4}
    plain = {"class_token": False, "final_norm": False, "norm_eps": 1e-5, "init_std": 0.0}
    return ViTConfig(**(same | pixels | plain | changes))


MODELS: dict[str, tuple[type[nn.Module], ViTConfig]] = {
    f"deit_{name}": (ViT, ViTConfig(d_model=d, depth=12, n_heads=d // 64, drop_path=0.1))
    for name, d in {"ti": 192, "s": 384, "b": 768}.items()
}
