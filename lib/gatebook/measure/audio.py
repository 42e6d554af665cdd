"""Quality of separated sound, in dB, on torchmetrics: SI-SDR, its permutation-invariant
improvement, and the training loss built from it.

With s a source and e its estimate, both made zero-mean,
`SI-SDR = 10 log10 (|t|^2 / |e - t|^2)`, `t = (<e, s> / |s|^2) s`. torchmetrics adds the smallest
relative step of the number type to both powers, so that silence as estimate gets 0 dB, not -inf.
"""

import torch
from torch import Tensor


def si_sdr(estimate: Tensor, source: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio of zero-mean signals.

    Args:
        estimate: (..., L).
        source: (..., L), not silent.

    Returns:
        dB, (...).
    """
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    return scale_invariant_signal_distortion_ratio(estimate, source, zero_mean=True)


def best_order(estimates: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Assigns estimates to sources, once for the whole utterance, such that SI-SDR is highest.

    Args:
        estimates: (B, C, L).
        sources: (B, C, L).

    Returns:
        The mean SI-SDR over speakers in dB, (B), with gradient; and the order (B, C): source c is
        met by `estimates[order[c]]`.
    """
    from torchmetrics.functional.audio import permutation_invariant_training

    return permutation_invariant_training(estimates, sources, si_sdr)


def reorder(estimates: Tensor, order: Tensor) -> Tensor:
    """Puts estimates (B, C, L) into the sources' order (B, C) that `best_order` found."""
    return estimates.gather(1, order.unsqueeze(-1).expand_as(estimates))


def si_sdr_improvement(estimates: Tensor, sources: Tensor, mixture: Tensor) -> Tensor:
    """SI-SDRi: SI-SDR of the best order minus that of the untouched mixture, mean over speakers.

    Args:
        estimates: (B, C, L).
        sources: (B, C, L).
        mixture: (B, L).

    Returns:
        dB, (B).
    """
    untouched = si_sdr(mixture.unsqueeze(1).expand_as(sources), sources).mean(dim=1)
    return best_order(estimates, sources)[0] - untouched


def separation_loss(estimates: Tensor, sources: Tensor, floor_db: float | None = None) -> Tensor:
    """Negative SI-SDR of the best order, in float32: what a separator is trained on.

    Args:
        estimates: (B, C, L).
        sources: (B, C, L).
        floor_db: utterances whose loss is already below it teach nothing (SpeechBrain's recipes
            take -30); None keeps all.

    Returns:
        Scalar, dB: the mean over the utterances kept, with gradient.
    """
    with torch.autocast(estimates.device.type, enabled=False):
        loss = -best_order(estimates.float(), sources.float())[0]
    if floor_db is None:
        return loss.mean()
    keep = loss > floor_db
    return (loss * keep).sum() / keep.sum().clamp(min=1)
