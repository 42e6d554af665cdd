"""Gated linear attention on a GPU: the Triton kernels that `launches.py` starts.

    prepare    each chunk: Q ⊙ Λ, K ⊙ Γ, γ and the scores P ⊙ M
    sweep      chunk after chunk: O = P V + (Q ⊙ Λ) S, then S ← γ ⊙ S + (K ⊙ Γ)ᵀ V, S in registers
    join       start states of the segments of a sequence that was cut
    score_gradients, gradients   each chunk: dP; then dQ, dK and the closed form of d log α
    step       one token of decoding

Names follow §4.3 of the paper (arXiv 2312.06635): within a chunk of C tokens g is the running sum
of the log gates a, Λ = e^g, Γ = e^(g_C − g), γ = e^(g_C). REVERSE walks from the last token to the
first: sums of gates then run from the end of a chunk, and P is upper triangular.

Tokens of all sequences lie behind one another. `chunks` holds, for each of the N chunks, its first
token and how many of its C rows exist; `segments`, for each segment, its first chunk, their number,
its first token and its number of tokens. What the kernels hand to each other is laid out as
`[N, H, …]`, with K padded to WIDTH and V to WIDE, so that it is read without masks. Exponents are
kept to base 2.
"""
