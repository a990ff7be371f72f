"""Keypoints of regions: heat maps, their loss, and the places that they say.

As the keypoint head of detectron2 (modeling/roi_heads/keypoint_head.py), with batch norm in its convolutions as in the
other heads of the pyramid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypointrcnn_loss

__all__ = ["KeypointMaps", "keypoint_loss", "located_keypoints", "regions_with_keypoints"]


class KeypointMaps(KeypointRCNNPredictor):
    """A heat map for each keypoint, four times as fine as what it takes."""

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, M / 4, M / 4) -> (R, K, M, M) float32, before the softmax."""
        coarse = self.kps_score_lowres(x).float()
        return F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)


def regions_with_keypoints(boxes: list[Tensor], keypoints: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the regions with a marked keypoint of their object in them, and the keypoints.

    All of them if there are none: batch norm would have nothing to take statistics of.

    Args:
        boxes: for each image (P_i, 4), of the regions with an object.
        keypoints: for each image (P_i, K, 3), of the objects.
    """
    chosen = [_has_keypoint(box, of_each) for box, of_each in zip(boxes, keypoints, strict=True)]
    if not torch.cat(chosen).any():
        return boxes, keypoints
    kept = [(box[rows], of_each[rows]) for box, of_each, rows in zip(boxes, keypoints, chosen, strict=True)]
    return [box for box, _ in kept], [of_each for _, of_each in kept]


def _has_keypoint(boxes: Tensor, keypoints: Tensor) -> Tensor:
    places = keypoints[..., :2]
    is_inside = ((places >= boxes[:, None, :2]) & (places <= boxes[:, None, 2:])).all(dim=2)
    return (is_inside & (keypoints[..., 2] > 0)).any(dim=1)


def keypoint_loss(logits: Tensor, boxes: list[Tensor], keypoints: list[Tensor]) -> Tensor:
    """Return the mean over the marked keypoints within their regions of the cross entropy over the cells.

    Args:
        logits: (P, K, M, M) of the regions of all images.
        boxes: for each image (P_i, 4), of the regions.
        keypoints: for each image (P_i, K, 3), of the regions' objects.
    """
    own = [torch.arange(len(each), device=each.device) for each in boxes]
    # torchvision's loss looks at maps as they lie in memory.
    return keypointrcnn_loss(logits.contiguous(), boxes, keypoints, own)


def located_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """Return the most likely place of each keypoint in boxes.

    Args:
        logits: (D, K, M, M)
        boxes: (D, 4)

    Returns:
        (D, K, 3) x, y, and the map's probability there, as the heat map is interpolated to the box's pixels.
    """
    places, peaks = heatmaps_to_keypoints(logits, boxes)  # (D, K, 3), (D, K)
    likely = (peaks - logits.flatten(2).logsumexp(2)).exp().clamp(max=1)
    return torch.cat([places[..., :2], likely[..., None]], dim=2)
