"""Contrastive losses.

Shapes: B queries of this rank, D features, K keys in the dictionary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_std", "info_nce", "info_nce_in_batch"]


def info_nce(queries: Tensor, keys: Tensor, dictionary: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE: classify each query as its own key among that key and the dictionary (MoCo v1, equation 1).

    -log(exp(q.k+ / t) / (exp(q.k+ / t) + sum_i exp(q.k_i / t))) = softplus(logsumexp_i(q.k_i / t) - q.k+ / t), so the
    (B, K) similarities are never concatenated with the positive ones.

    Args:
        queries: (B, D) float32 unit vectors.
        keys: (B, D) float32 unit vectors, the positives.
        dictionary: (K, D) float32 unit vectors, the negatives.
        temperature: divides the similarities.

    Returns:
        The mean loss () and the watched values, each (), without gradient: `accuracy` (share of queries whose own key
        is the most similar), `similarity_positive` and `similarity_negative` (mean cosines).
    """
    scaled = queries / temperature  # (B, D)
    positives = (scaled * keys).sum(dim=1)  # (B,)
    negatives = scaled @ dictionary.T  # (B, K)
    with torch.no_grad():
        largest = negatives.amax(dim=1)  # (B,)
        watched = {
            "accuracy": (positives > largest).float().mean(),
            "similarity_positive": positives.mean() * temperature,
            "similarity_negative": negatives.mean() * temperature,
        }
    # torch.logsumexp would search for the maximum again, and its gradient would compute the exponentials again.
    log_sum = (negatives - largest[:, None]).exp_().sum(dim=1).log() + largest  # (B,)
    loss = F.softplus(log_sum - positives).mean()
    return loss, watched


def info_nce_in_batch(
    queries: Tensor, candidates: Tensor, first: int, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE whose negatives are the other keys of the batch (MoCo v3, equation 1; v1's end-to-end mechanism).

    Args:
        queries: (B, D) float32 unit vectors.
        candidates: (K, D) float32 unit vectors, the keys of all ranks.
        first: row of the first query's own key; the others follow.
        temperature: divides the similarities.

    Returns:
        As `info_nce`.
    """
    logits = (queries / temperature) @ candidates.T  # (B, K)
    own = torch.arange(first, first + len(queries), device=queries.device)  # (B,)
    loss = F.cross_entropy(logits, own)
    with torch.no_grad():
        positives = (queries * candidates[own]).sum(dim=1)  # (B,)
        sum_of_all = (queries.sum(dim=0) @ candidates.sum(dim=0)) - positives.sum()
        watched = {
            "accuracy": (logits.argmax(dim=1) == own).float().mean(),
            "similarity_positive": positives.mean(),
            "similarity_negative": sum_of_all / (len(queries) * max(1, len(candidates) - 1)),
        }
    return loss, watched


@torch.no_grad()
def feature_std(queries: Tensor) -> Tensor:
    """Return the standard deviation of unit vectors over the batch, averaged over features: (B, D) -> ().

    About 1 / sqrt(D) when they spread evenly over the sphere, 0 when they collapse to a point (SimSiam, section 4.1).
    """
    return queries.std(dim=0, unbiased=False).mean()
