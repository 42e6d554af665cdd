"""The delta rule and its gated form: one operator, token by token and chunk by chunk.

Schlag et al. 2021 (arXiv 2102.11174) for the rule, Yang et al. 2024 for its chunkwise form
(arXiv 2406.06484) and the gate (Gated DeltaNet, arXiv 2412.06464). A key erases what it held before
it writes: with β = 1 and a key of length 1, reading with that key gives back the value just
written.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, N chunks of C tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gatebook.kernels import checks
from gatebook.kernels.gated_linear_attention import CLOSED, full_precision

BACKENDS = ("auto", "naive", "chunked")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule: S_t = α_t (I − β_t k_tᵀ k_t) S_{t-1} + β_t k_tᵀ v_t, o_t = s q_t S_t.

    Differentiable in all tensors. Computed in the type of `beta`, whatever autocast says: the
    triangular systems of the chunkwise form lose too much in 16 bits.

    Args:
        q: Queries `[B, T, H, K]`, any floating type.
        k: Keys `[B, T, H, K]`, of the same type. The rule is stable for β |k|² between 0 and 2;
            give keys of length 1.
        v: Values `[B, T, H, V]`, of the same type; V may differ from K.
        beta: Strengths β of the writes `[B, T, H]`, float32, or float64 when q is float64.
        g: Natural-log gates log α `[B, T, H]` in the type of beta; None for α = 1 (DeltaNet).
            Minus infinity closes a gate; below -100 a gate counts as -100.
        scale: The factor s; `K ** -0.5` when None.
        initial_state: S_0 `[B, H, K, V]` in the type of beta; zeros when None.
        output_final_state: Whether to return S_T as well.
        backend: "naive" (token by token), "chunked", or "auto": "naive" for a single token,
            otherwise "chunked".
        chunk_size: C of the chunkwise form.

    Returns:
        The outputs `[B, T, H, V]` in the type of v, and S_T `[B, H, K, V]` in the type of beta, or
        None unless `output_final_state`.

    Raises:
        ValueError: A shape, type, device, backend or chunk size that is not allowed; it says what
            is.
    """
    g = torch.zeros_like(beta) if g is None else g
    if beta.shape != q.shape[:3] or g.shape != q.shape[:3]:
        raise ValueError(
            f"beta and g need the shape [B, T, H] of q, {list(q.shape[:3])}; got "
            f"{list(beta.shape)} and {list(g.shape)}"
        )
    checks.check_tensors(q, k, v, beta.unsqueeze(-1), g.unsqueeze(-1))
    checks.check_options(backend, BACKENDS, chunk_size, 1)
    shape = (q.shape[0], *q.shape[2:], v.shape[3])
    checks.check_state(initial_state, shape, beta)
    state = beta.new_zeros(shape) if initial_state is None else initial_state
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    naive = backend == "naive" or (backend == "auto" and q.shape[1] == 1)
    with full_precision(q.device.type):
        inputs = (*(x.to(beta.dtype) for x in (q * scale, k, v)), beta, g.clamp(min=CLOSED), state)
        o, state = naive_delta_rule(*inputs) if naive else chunked_delta_rule(*inputs, chunk_size)
    return o.to(v.dtype), state if output_final_state else None


def naive_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token: decay the state, read what the key holds, write the difference to v.

    Args:
        q: Queries, times s, `[B, T, H, K]`.
        k: Keys `[B, T, H, K]`.
        v: Values `[B, T, H, V]`.
        beta: Strengths `[B, T, H]`.
        g: Natural-log gates `[B, T, H]`.
        state: S_0 `[B, H, K, V]`.

    Returns:
        The outputs `[B, T, H, V]` and the last state.
    """
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        new = beta[:, t, :, None] * (v[:, t] - held)
        state = state + k[:, t].unsqueeze(-1) * new.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: what each token writes, U, solves one triangular system in a chunk.

    With G the sum of g from the start of the chunk, D_ij = e^(G_i − G_j) for i ≥ j, and L the
    strictly lower triangle of diag(β) (K Kᵀ ⊙ D):

        (I + L) U = diag(β) (V − diag(e^G) K S)
        O   = diag(e^G) Q S + (Q Kᵀ ⊙ D) U
        S'  = e^(G_C) S + (diag(e^(G_C − G)) K)ᵀ U

    The system is solved for the two parts of its right side in all chunks at once; only the three
    products with S go from chunk to chunk. No exponent is positive. A padded token has β = 0, so
    it writes nothing, and gate 1. Arguments and results as `naive_delta_rule`, plus C.
    """
    length = q.shape[1]
    size = min(chunk_size, length)
    q, k, v, beta, g = (
        _split(x, size) for x in (q, k, v, beta.unsqueeze(-1), g.unsqueeze(-1))
    )  # (B, H, N, C, D)
    total = g.cumsum(-2)  # (B, H, N, C, 1)
    decay = (total - total.mT).tril().exp().tril()  # D, (B, H, N, C, C)
    lower = (beta * (k @ k.mT) * decay).tril(-1)
    right = torch.cat([beta * v, beta * total.exp() * k], -1)  # (B, H, N, C, V + K)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    writes, reads = solved.split([v.shape[-1], k.shape[-1]], -1)
    from_start, scores = q * total.exp(), (q @ k.mT) * decay
    to_end = k * (total[..., -1:, :] - total).exp()
    across = total[..., -1:, :].exp()  # e^(G_C), (B, H, N, 1, 1)
    outputs = []
    for n in range(q.shape[2]):
        u = writes[:, :, n] - reads[:, :, n] @ state  # (B, H, C, V)
        outputs.append(from_start[:, :, n] @ state + scores[:, :, n] @ u)
        state = across[:, :, n] * state + to_end[:, :, n].mT @ u
    return torch.cat(outputs, 2)[:, :, :length].transpose(1, 2), state


def _split(x: Tensor, size: int) -> Tensor:
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
    return x.unflatten(2, (-1, size))  # (B, H, N, C, D)
