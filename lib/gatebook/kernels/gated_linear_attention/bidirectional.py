"""Bidirectional gated linear attention (Liao et al. 2024, ViG, arXiv 2405.18425)."""

from torch import Tensor

from gatebook.kernels.gated_linear_attention import (
    BACKENDS,
    checks,
    choose_backend,
    full_precision,
    gla,
)


def bidirectional_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    subchunk: int = 16,
) -> Tensor:
    """Mean of two scans that share q, k and v and have a gate each: o_t = (o→_t + o←_t) / 2.

    o→ is `gla` with `g_forward`, from the first token to the last; o← is `gla` with `g_backward`,
    from the last to the first, so `g_backward` at token t multiplies the state that comes from
    token t + 1. Both contain the token itself, which thus counts once in total. Differentiable in
    all five tensors; the paper's released kernel has no backward pass.

    Args:
        q: Queries `[B, T, H, K]`, any floating type.
        k: Keys `[B, T, H, K]`, of the same type.
        v: Values `[B, T, H, V]`, of the same type; V may differ from K.
        g_forward: Natural-log gates log α→ `[B, T, H, K]` or, one per head, `[B, T, H, 1]`.
            Float32, or float64 when q is float64.
        g_backward: Natural-log gates log α← in either of these shapes, of the same type.
        scale: The factor on the outputs; `K ** -0.5` when None, as in the paper.
        cu_seqlens: Offsets `[N + 1]` of sequences packed along T with B = 1, as for `gla`.
        backend: As for `gla`: "triton" walks both directions in one set of kernels, every other
            backend takes two calls of `gla`, the second in reverse.
        chunk_size: The length C of a chunk for "chunked", as for `gla`.
        subchunk: The length c of a sub-chunk for "chunked", a power of two.

    Returns:
        The outputs `[B, T, H, V]` in the type of v.

    Raises:
        ValueError: A shape, type, device, offset, backend or block length that is not allowed; it
            says what is.
    """
    checks.check_tensors(q, k, v, g_forward, g_backward)
    checks.check_options(backend, BACKENDS, chunk_size, subchunk)
    offsets = checks.host_offsets(cu_seqlens, q)
    if choose_backend(backend, q, v, g_forward) == "triton":
        from gatebook.kernels.gated_linear_attention import fused

        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with full_precision(q.device.type):
            inputs = (q, k, v, g_forward, g_backward, scale, offsets)
            return fused.fused_bidirectional_gla(*inputs)
    options = {"scale": scale, "cu_seqlens": offsets, "backend": backend}
    options |= {"chunk_size": chunk_size, "subchunk": subchunk}
    forward, _ = gla(q, k, v, g_forward, **options)
    backward, _ = gla(q, k, v, g_backward, reverse=True, **options)
    return (forward + backward) / 2
