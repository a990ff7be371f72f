"""Heads of detectors: what looks at regions and says class, box, mask and keypoints."""

from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from moco_fast.transfer.keypoint_heads import keypoint_loss, located_keypoints, regions_with_keypoints
from moco_fast.transfer.presets import DetectPreset

__all__ = ["AlignedRegions", "BoxPredictor", "C4Head", "MaskPredictor", "RegionHeads", "box_loss", "mask_targets"]


class AlignedRegions(nn.Module):
    """Cells of regions, as detectron2's ROIAlignV2 with an adaptive number of samples.

    Of several maps, a region is taken from the one that fits its size: 224 pixels belong to stride 16 (Lin et al.
    2017).

    Args:
        cells: on each side of a region.
        strides: pixels per cell of each map, each twice the one before.
    """

    def __init__(self, cells: int, *, strides: list[int]) -> None:
        super().__init__()
        self.cells, self.strides = cells, list(strides)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps (B, C, H, W), and (R_i, 4) for each image -> (R, C, cells, cells)."""
        del image_shapes
        maps = list(features.values())[: len(self.strides)]
        if len(maps) == 1:
            return self._of_map(maps[0], boxes, self.strides[0])
        image = torch.cat([torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)])
        rows = torch.cat([image, torch.cat(boxes)], dim=1)  # (R, 5)
        sides = (rows[:, 3] - rows[:, 1]).mul(rows[:, 4] - rows[:, 2]).clamp(min=0).sqrt()
        first = log2(self.strides[0] / 16)
        level = (torch.log2(sides / 224 + 1e-8) - first).floor().clamp(0, len(maps) - 1)
        found = maps[0].new_zeros(rows.shape[0], maps[0].shape[1], self.cells, self.cells)
        for number, (seen, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(level == number)[0]
            found = found.index_copy(0, chosen, self._of_map(seen, rows[chosen], stride).to(found.dtype))
        return found

    def _of_map(self, seen: Tensor, boxes: Tensor | list[Tensor], stride: int) -> Tensor:
        return roi_align(seen, boxes, self.cells, 1 / stride, sampling_ratio=0, aligned=True)


class C4Head(nn.Module):
    """Last stage of a ResNet, and the extra batch norm of the MoCo paper.

    Args:
        layer4: the stage.
        channels: of its output.
    """

    def __init__(self, layer4: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer4 = layer4
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C, 14, 14) -> (R, channels, 7, 7)."""
        return self.norm(self.layer4(regions))


class BoxPredictor(nn.Module):
    """Scores of classes and of the background, and a box for each class.

    Args:
        channels: of what it takes.
        num_classes: K, without the background.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C), or maps (R, C, H, W) that it averages, to scores and boxes.

        Returns:
            (R, K + 1) and (R, 4 * (K + 1)) float32; the background is class 0, and its box does not move.
        """
        seen = seen if seen.ndim == 2 else seen.mean(dim=(2, 3))
        boxes = self.bbox_pred(seen).float()
        return self.cls_score(seen).float(), torch.cat([boxes.new_zeros(boxes.shape[0], 4), boxes], dim=1)


class MaskPredictor(nn.Module):
    """A mask for each class, twice as fine as what it takes.

    Args:
        channels: of what it takes.
        num_classes: K, without the background.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, 256, 2, stride=2)
        self.predictor = nn.Conv2d(256, num_classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (self.deconv, self.predictor):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, seen: Tensor) -> Tensor:
        """(R, C, M / 2, M / 2) -> (R, K, M, M) float32, before the sigmoid."""
        return self.predictor(F.relu(self.deconv(seen))).float()


class RegionHeads(RoIHeads):
    """torchvision's heads on regions with the losses of detectron2.

    Args:
        regions: cells of regions.
        head: cells to features.
        predictor: features to scores and boxes.
        preset: how many regions are drawn, and the loss of boxes.
        mask_predictor: features to masks; None: there are no masks.
        mask_regions: cells that masks are made of; None: of the features of `head`.
        mask_head: those cells to features.
    """

    def __init__(
        self,
        *,
        regions: nn.Module,
        head: nn.Module,
        predictor: nn.Module,
        preset: DetectPreset,
        mask_predictor: nn.Module | None = None,
        mask_regions: nn.Module | None = None,
        mask_head: nn.Module | None = None,
    ) -> None:
        super().__init__(
            regions,
            head,
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=preset.regions,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=preset.score_threshold,
            nms_thresh=0.5,
            detections_per_img=preset.detections,
            mask_roi_pool=mask_regions,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )
        self.l1_beta = preset.l1_beta

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections (evaluation) or losses (training); the other one is empty."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None
        with torch.no_grad():
            proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        seen = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(seen)
        losses = self.losses(logits, deltas, torch.cat(labels), torch.cat(list(wanted)))
        if self.mask_predictor is not None:
            objects = [torch.where(each > 0)[0] for each in labels]
            boxes = [each[rows] for each, rows in zip(proposals, objects, strict=True)]
            masks = self._masks(features, boxes, image_shapes, seen[torch.cat(labels) > 0])
            drawn = [target["masks"][each[rows]] for target, each, rows in zip(targets, matched, objects, strict=True)]
            losses["loss_mask"] = mask_loss(masks, torch.cat(labels), drawn, boxes)
        if self.keypoint_predictor is not None:
            objects = [torch.where(each > 0)[0] for each in labels]
            boxes = [each[rows] for each, rows in zip(proposals, objects, strict=True)]
            marked = [
                target["keypoints"][each[rows]] for target, each, rows in zip(targets, matched, objects, strict=True)
            ]
            boxes, marked = regions_with_keypoints(boxes, marked)
            losses["loss_keypoint"] = keypoint_loss(self._keypoint_maps(features, boxes, image_shapes), boxes, marked)
        return [], losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        seen = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(seen)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        found = [
            {"boxes": box, "scores": score, "labels": label}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
        if self.mask_predictor is not None:
            of_classes = self._masks(features, boxes, image_shapes, None)
            classes = torch.cat(labels) - 1
            masks = of_classes[torch.arange(classes.shape[0], device=classes.device), classes].sigmoid()
            for each, of_image in zip(found, masks.split([box.shape[0] for box in boxes]), strict=True):
                each["masks"] = of_image[:, None]
        if self.keypoint_predictor is not None:
            maps = self._keypoint_maps(features, boxes, image_shapes).split([len(box) for box in boxes])
            for each, of_image, box in zip(found, maps, boxes, strict=True):
                each["keypoints"] = located_keypoints(of_image, box)
        return found

    def _masks(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        seen: Tensor | None,
    ) -> Tensor:
        """Return (R, K, M, M) before the sigmoid, of boxes; `seen`: the box head's features of these, if there are."""
        assert self.mask_predictor is not None
        if self.mask_roi_pool is not None:
            assert self.mask_head is not None
            return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        if seen is None:
            seen = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        return self.mask_predictor(seen)

    def _keypoint_maps(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Return (R, K, M, M) before the softmax, of boxes."""
        assert self.keypoint_roi_pool is not None
        assert self.keypoint_head is not None
        assert self.keypoint_predictor is not None
        return self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes, image_shapes)))

    def losses(self, logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """Return the losses of classes and of boxes, both divided by the number of regions.

        Args:
            logits: (R, K + 1)
            boxes: (R, 4 * (K + 1)) as they are predicted, relative to the proposals.
            labels: (R,) int64, 0 for the background.
            wanted: (R, 4) boxes of the objects, relative to the proposals.
        """
        rows = torch.where(labels > 0)[0]
        chosen = boxes.unflatten(1, (-1, 4))[rows, labels[rows]]  # (positives, 4)
        return {
            "loss_classifier": F.cross_entropy(logits, labels),
            "loss_box_reg": box_loss(chosen, wanted[rows], self.l1_beta) / len(labels),
        }


def box_loss(predicted: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Sum the smooth L1 loss: (N, 4), (N, 4) -> (); with beta 0 it is L1."""
    return F.smooth_l1_loss(predicted, wanted, beta=beta, reduction="sum")


def mask_loss(logits: Tensor, labels: Tensor, masks: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """Return the mean loss of all cells of the masks of the regions' own classes.

    Args:
        logits: (P, K, M, M) of the regions with an object.
        labels: (R,) of all regions, 0 for the background.
        masks: for each image (P_i, H, W) uint8, of the objects.
        boxes: for each image (P_i, 4), of the regions.
    """
    if not len(logits):
        return logits.sum() * 0
    classes = labels[labels > 0] - 1
    targets = mask_targets(masks, boxes, cells=logits.shape[-1])
    chosen = logits[torch.arange(len(classes), device=classes.device), classes]
    return F.binary_cross_entropy_with_logits(chosen, targets)


def mask_targets(masks: list[Tensor], boxes: list[Tensor], *, cells: int) -> Tensor:
    """Return whether each cell of a region lies in its object: (P, cells, cells) float32, 0 or 1."""
    found = [
        roi_align(
            mask[:, None].float(),
            torch.cat([torch.arange(len(mask), device=box.device, dtype=box.dtype)[:, None], box], dim=1),
            cells,
            sampling_ratio=0,
            aligned=True,
        )[:, 0]
        for mask, box in zip(masks, boxes, strict=True)
    ]
    return (torch.cat(found) >= 0.5).float()
