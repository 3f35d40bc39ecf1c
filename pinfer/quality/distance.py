"""How far one run's logits are from a reference run's over the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

TOP = 5


@dataclass(frozen=True)
class Distance:
    """How far one set of logits is from a reference set over the same tokens.

    agreement: share of positions with the same argmax; kl: mean KL(reference ‖ other) in nats;
    max_logit_error: largest absolute difference of any logit.
    """

    agreement: float
    kl: float
    max_logit_error: float


def logit_distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    """Compare logits float32 [T, V] with a reference of the same shape."""
    kl = F.kl_div(other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")
    return Distance(
        agreement=float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
        kl=float(kl),
        max_logit_error=float((reference - other).abs().max()),
    )


def compare_logits(dense: torch.Tensor, sparse: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position by position, the sparse run beside the dense one; each result float32 [T].

    dense, sparse: logits float32 [T, V]; targets: int64 [T], the tokens that came next.

    With p and q the two softmaxes at a position and t its target:

    - dense_nll, sparse_nll: -log p(t), -log q(t), nats;
    - kl: KL(dense ‖ sparse) = Σ_v p(v) · (log p(v) - log q(v)), nats; what rounding leaves below 0 is 0;
    - argmax_agreement: 1 where argmax q = argmax p, else 0;
    - argmax_in_dense_top5: 1 where argmax q is among the five largest of p, else 0;
    - top5_overlap: |top5(p) ∩ top5(q)| / 5.

    ValueError for shapes that do not belong together.
    """
    if dense.dim() != 2 or dense.shape != sparse.shape or targets.shape != dense.shape[:1]:
        raise ValueError(
            f"dense {list(dense.shape)}, sparse {list(sparse.shape)} and targets {list(targets.shape)}: "
            "expected [T, V] twice, and [T]"
        )
    top = min(TOP, dense.shape[1])
    best, others = dense.topk(top).indices, sparse.topk(top).indices  # [T, 5]
    first = sparse.argmax(-1)
    log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
    return {
        "dense_nll": F.nll_loss(log_p, targets, reduction="none"),
        "sparse_nll": F.nll_loss(log_q, targets, reduction="none"),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0),
        "argmax_agreement": (dense.argmax(-1) == first).float(),
        "argmax_in_dense_top5": (best == first[:, None]).any(-1).float(),
        "top5_overlap": (best[:, :, None] == others[:, None, :]).any(-1).float().mean(-1),
    }
