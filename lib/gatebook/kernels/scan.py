"""The gated recurrence of single channels, h_t = α_t h_{t-1} + x_t (HGRN's, for one).

Shapes: B batch, T tokens, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gatebook.kernels.gated_linear_attention import CLOSED

BACKENDS = ("auto", "naive", "doubling")


def linear_scan(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """h_t = exp(g_t) ⊙ h_{t-1} + x_t for all t.

    Args:
        x: Inputs `[B, T, D]`, float32 or float64.
        g: Natural-log gates `[B, T, D]`, of the same type. Minus infinity closes a gate; below
            -100 a gate counts as -100.
        initial_state: h_0 `[B, D]`, of the same type; zeros when None.
        backend: "naive" (token by token), "doubling" (in log₂ T parallel steps) or "auto":
            "naive" for a single token, otherwise "doubling".

    Returns:
        h `[B, T, D]`, and its last row `[B, D]`.

    Raises:
        ValueError: A shape, type or backend that is not allowed; it says what is.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if x.ndim != 3 or 0 in x.shape or g.shape != x.shape:
        raise ValueError(
            f"x and g need one shape [B, T, D], not empty; got {list(x.shape)} and {list(g.shape)}"
        )
    state = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    if state.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"initial_state needs the shape {[x.shape[0], x.shape[2]]}; got {list(state.shape)}"
        )
    if not x.dtype == g.dtype == state.dtype or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x, g and the state need one type, float32 or float64; got {x.dtype}, {g.dtype} and "
            f"{state.dtype}"
        )
    naive = backend == "naive" or (backend == "auto" and x.shape[1] == 1)
    h = (naive_scan if naive else doubling_scan)(x, g.clamp(min=CLOSED), state)
    return h, h[:, -1]


def naive_scan(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """Token by token; x and g `[B, T, D]`, the state before them `[B, D]`."""
    rows = []
    for t in range(x.shape[1]):
        state = g[:, t].exp() * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def doubling_scan(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """The same in log₂ T steps (Hillis and Steele 1986): after step n, row t holds the sum of the
    last 2^n inputs, each decayed to t. The state joins the first input."""
    x = torch.cat([x[:, :1] + (g[:, 0].exp() * state).unsqueeze(1), x[:, 1:]], 1)
    step = 1
    while step < x.shape[1]:
        x = x + g.exp() * F.pad(x[:, :-step], (0, 0, step, 0))
        g = g + F.pad(g[:, :-step], (0, 0, step, 0))
        step *= 2
    return x
