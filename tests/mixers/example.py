"""A mixer of one's own: the mean of all values so far, for `-p add`."""

import torch
from torch import Tensor, nn


class RunningMean(nn.Module):
    """y_t = W_o (mean of W_v x_1 … W_v x_t), one number of state a channel, and a count."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """`[B, T, D]` to the same; the state is the sum so far and the number of tokens."""
        total, count = state or (0.0, 0)
        sums = total + self.value(x).cumsum(1)  # (B, T, D)
        counts = torch.arange(count + 1, count + x.shape[1] + 1, device=x.device)
        return self.out(sums / counts[:, None]), (sums[:, -1:], count + x.shape[1])


MIXERS = {"running mean": lambda sizes: [RunningMean(sizes.d_model) for _ in range(sizes.n_layers)]}
