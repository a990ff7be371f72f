"""The contrastive losses.

Shapes: B queries of this rank, D features, K keys in the dictionary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_std", "info_nce"]


def info_nce(queries: Tensor, keys: Tensor, dictionary: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE: name each query's own key among it and the dictionary (MoCo v1, equation 1).

    -log(exp(q.k+ / t) / (exp(q.k+ / t) + sum_i exp(q.k_i / t))) = softplus(logsumexp_i(q.k_i / t) - q.k+ / t), so the
    (B, K) similarities are never copied beside the positive ones.

    Args:
        queries: (B, D) float32 unit vectors.
        keys: (B, D) float32 unit vectors, the positives.
        dictionary: (K, D) float32 unit vectors, the negatives.
        temperature: divides the similarities.

    Returns:
        The mean loss () and what to watch, each (), without gradient: `accuracy` (share of queries whose own key is the
        most similar), `similarity_positive` and `similarity_negative` (mean cosines).
    """
    scaled = queries / temperature  # (B, D)
    positives = (scaled * keys).sum(dim=1)  # (B,)
    negatives = scaled @ dictionary.T  # (B, K)
    loss = F.softplus(negatives.logsumexp(dim=1) - positives).mean()
    with torch.no_grad():
        watched = {
            "accuracy": (positives > negatives.amax(dim=1)).float().mean(),
            "similarity_positive": positives.mean() * temperature,
            # The mean over all pairs is the product of the means.
            "similarity_negative": queries.mean(dim=0) @ dictionary.mean(dim=0),
        }
    return loss, watched


@torch.no_grad()
def feature_std(queries: Tensor) -> Tensor:
    """Mean over features of the standard deviation over the batch of unit vectors (B, D) -> ().

    About 1 / sqrt(D) when they spread evenly over the sphere, 0 when they collapse to a point (SimSiam, section 4.1).
    """
    return queries.std(dim=0, unbiased=False).mean()
