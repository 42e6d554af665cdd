"""An LSTM, the control of the comparison: its state passes through a nonlinearity at every token.

It can follow the state of a group at every length, and no mixer can whose state decays by factors
between 0 and 1; where the LSTM fails, the task was not learnable in the budget.
"""

from torch import Tensor, nn

from gatebook.mixers import Sizes


class LSTM(nn.Module):
    """`torch.nn.LSTM` under the contract of a mixer."""

    def __init__(self, d_model: int) -> None:
        """Width D of input, state and output."""
        super().__init__()
        self.lstm = nn.LSTM(d_model, d_model, batch_first=True)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x `[B, T, D]` → y `[B, T, D]` and the state, h and c, `[1, B, D]` each."""
        return self.lstm(x, state)


def _make(sizes: Sizes) -> list[nn.Module]:
    return [LSTM(sizes.d_model) for _ in range(sizes.n_layers)]


MIXERS = {"lstm": _make}
