"""Gated associative memory: its two paths and gates as a mixer, without GAM's own block."""

from torch import Tensor, nn

from gatebook.models.gam import GAM, GAMConfig, cat_time


class GAMMixer(nn.Module):
    """GAM with as many memory slots as channels, as in the paper's model."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gam = GAM(GAMConfig(d_model=d_model, n_slots=d_model))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` to the same; the state is the last K − 1 inputs `[B, K − 1, D]`."""
        taps = self.gam.local_path.kernel_size - 1
        if state is None:
            state = x.new_zeros(x.shape[0], taps, x.shape[2])
        return self.gam(x, state), cat_time(state, x)[:, -taps:]


MIXERS = {"gam": lambda s: [GAMMixer(s.d_model) for _ in range(s.n_layers)]}
