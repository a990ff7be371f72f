"""Health of features, without labels: how many directions they use, how evenly, and what has collapsed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectrum", "alignment", "lidar", "rankme", "spectrum", "spread", "uniformity", "view_alignment"]

_CHUNK_ELEMENTS = 1 << 25  # similarities held at once: 128 MiB of float32
_EPSILON = 1e-7  # RankMe's, for float32
_NOISE = 1e-13  # of float64, relative to the second moment: what is below counts as zero


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Moments of N feature vectors of D numbers, taken apart; float64, on the host."""

    singular: Tensor
    """(min(N, D),) singular values of the (N, D) matrix, not centered, the largest first."""
    variances: Tensor
    """(D,) variances along the principal components, the largest first."""
    deviations: Tensor
    """(D,) standard deviation of each number."""

    @property
    def top_share(self) -> float:
        """Share of the variance along the first component; 1 where nothing varies."""
        total = self.variances.sum()
        return float(self.variances[0] / total) if total > 0 else 1.0

    def components(self, share: float) -> int:
        """Return how many leading components have this share of the variance together."""
        return 1 + int((self.variances.cumsum(0) < share * self.variances.sum()).sum())

    @property
    def dead_share(self) -> float:
        """Share of the numbers whose deviation is below a thousandth of the mean one."""
        return float((self.deviations <= 1e-3 * self.deviations.mean()).double().mean())


def spectrum(values: Tensor) -> Spectrum:
    """Take the moments of features apart, by way of their (D, D) second moment: no float64 copy of all is made.

    Args:
        values: (N, D) floating point.

    Raises:
        ValueError: every feature is zero.
    """
    num, dim = values.shape
    moment = torch.zeros(dim, dim, dtype=torch.float64, device=values.device)
    total = torch.zeros(dim, dtype=torch.float64, device=values.device)
    for chunk in values.split(max(_CHUNK_ELEMENTS // (2 * dim), 1)):
        rows = chunk.double()
        moment += rows.T @ rows
        total += rows.sum(dim=0)
    if not moment.trace() > 0:
        raise ValueError("every feature is zero: the encoder has collapsed, or another layer was meant")
    mean = total / num
    covariance = moment / num - mean.outer(mean)
    floor = _NOISE * float(moment.trace()) / num
    variances, deviations = (
        torch.where(each > floor, each, 0).cpu() for each in (torch.linalg.eigvalsh(covariance), covariance.diag())
    )
    singular = torch.linalg.eigvalsh(moment).clamp(min=0).sqrt().cpu()
    return Spectrum(
        singular=singular.flip(0)[: min(num, dim)], variances=variances.flip(0), deviations=deviations.sqrt()
    )


def rankme(singular: Tensor) -> float:
    """Return the effective rank: exp of the entropy of the normalized singular values (Garrido et al. 2023, eq. 1)."""
    shares = singular / singular.sum() + _EPSILON
    return float((-shares * shares.log()).sum().exp())


def uniformity(values: Tensor, *, t: float = 2.0) -> float:
    """Return log of the mean of exp(-t |x - y|^2) over all pairs (Wang & Isola 2020); exact, part by part.

    Args:
        values: (N, D) float32, rows of length 1, at least two.
        t: width of the kernel.
    """
    total, num, first = 0.0, len(values), 0
    for chunk in values.split(max(_CHUNK_ELEMENTS // num, 1)):
        # Rows of length 1: |x - y|^2 = 2 - 2 x.y. Of two equal pairs, one is counted.
        kernel = (2 * t * (chunk @ values[first:].T - 1)).exp()
        total += kernel.triu(diagonal=1).sum(dtype=torch.float64).item()
        first += len(chunk)
    return math.log(total / (num * (num - 1) / 2))


def alignment(values: Tensor, labels: Tensor) -> float | None:
    """Return the mean of |x - y|^2 over all pairs of the same class (Wang & Isola 2020); None: there are no pairs.

    Args:
        values: (N, D) float32, rows of length 1.
        labels: (N,) int64 on the host; -1 where there is none.
    """
    keep = labels >= 0
    if not bool(keep.any()):
        return None
    labels = labels[keep]
    counts = labels.bincount().double()
    sums = torch.zeros(len(counts), values.shape[1], dtype=torch.float64, device=values.device)
    sums.index_add_(0, labels.to(values.device), values[keep.to(values.device)].double())
    num_pairs = float((counts * (counts - 1)).sum())
    # Over ordered pairs of a class: the sum of x.y is |sum of x|^2 less the n terms x.x = 1.
    return 2 - 2 * float(sums.square().sum().cpu() - counts.sum()) / num_pairs if num_pairs else None


def view_alignment(values: Tensor) -> float:
    """Return the mean of |x - y|^2 over all pairs of views of the same sample (Wang & Isola 2020).

    Args:
        values: (N, V, D) float32, vectors of length 1, at least two views.
    """
    num_views = values.shape[1]
    # The sum of x.y over ordered pairs of a sample's views is |sum of x|^2 less the V terms x.x = 1.
    products = values.double().sum(dim=1).square().sum(dim=1) - num_views  # (N,)
    return 2 - 2 * float(products.mean()) / (num_views * (num_views - 1))


def lidar(values: Tensor, *, delta: float = 1e-4) -> float:
    """Return LiDAR, the effective rank of the matrix that tells samples apart by their views (Thilak et al. 2023).

    Equations 3 to 5 of arXiv:2312.04000: exp of the entropy of the normalized eigenvalues of
    W^(-1/2) B W^(-1/2), B the scatter of the samples' means and W, with `delta` on its diagonal, that of their views.

    Args:
        values: (N, V, D) floating point, V views of each of N samples.
        delta: keeps W invertible where there are fewer views than numbers.
    """
    rows = values.double()
    means = rows.mean(dim=1)  # (N, D)
    within = (rows - means[:, None]).flatten(0, 1)  # (N * V, D)
    between = means - means.mean(dim=0)
    scatter = within.T @ within / len(within)
    scatter.diagonal().add_(delta)
    strengths, directions = torch.linalg.eigh(scatter)
    whitened = (between @ directions) * strengths.rsqrt()  # B as D x D is its second moment: the same eigenvalues
    eigenvalues = torch.linalg.eigvalsh(whitened.T @ whitened / len(whitened)).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum() + _EPSILON
    return float((-shares * shares.log()).sum().exp())


def spread(values: Tensor) -> float:
    """Return sqrt(D) times the mean deviation of the numbers of unit vectors: 1 spread evenly, 0 collapsed.

    What SimSiam's authors watch for collapse (Chen & He 2021, section 4.1).

    Args:
        values: (N, D) float32, rows of length 1.
    """
    return math.sqrt(values.shape[1]) * values.std(dim=0, correction=0).mean().item()
