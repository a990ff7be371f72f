"""Networks: Faster R-CNN of torchvision's parts, with the settings of detectron2 that the MoCo authors trained with.

What differs from torchvision's own Faster R-CNN, as in facebookresearch/detectron2: anchors are not rounded and lie at
multiples of the stride; regions are aligned by half a pixel (ROIAlignV2); boxes have an L1 loss, divided by the number
of anchors that are asked for, not of those that are there; the background has no box. Anchors, boxes and losses are in
float32 whatever the network computes in: bfloat16 would round coordinates above 256 to even pixels.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align

from moco_fast.encoders.encoder import Encoder
from moco_fast.transfer.presets import DetectPreset

__all__ = ["Anchors", "BoxHeads", "BoxPredictor", "C4Head", "ProposalNetwork", "Trunk", "box_loss", "build_detector"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_RATIOS = (0.5, 1.0, 2.0)
_REGION_CELLS = 14


def build_detector(encoder: Encoder, preset: DetectPreset, *, num_classes: int, seed: int) -> GeneralizedRCNN:
    """Build Faster R-CNN C4 on a copy of a ResNet: its last stage looks at regions of what the stages before it see.

    In training it takes images and targets and gives losses by name; in evaluation it takes images and gives boxes,
    labels (from 1) and scores. Images are (3, H, W) uint8, in the size that they are looked at. Every parameter is
    trained.

    Args:
        encoder: whose backbone and normalization of pixels it has.
        preset: anchors, numbers of proposals and regions.
        num_classes: without the background.
        seed: of the weights that the encoder does not have.

    Raises:
        ValueError: the encoder is not a ResNet.
    """
    pixels = copy.deepcopy(encoder)
    network: Any = pixels.backbone
    if not all(hasattr(network, name) for name in ("conv1", "bn1", "act1", "maxpool", *_STAGES)):
        raise ValueError(f"a C4 detector is built of a ResNet's stages, and this is a {type(network).__name__}")
    trunk = Trunk(network, encoder.channels)
    pixels.backbone, pixels.head, pixels.predictor = nn.Identity(), nn.Identity(), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        anchors = Anchors(preset.anchor_sizes, _RATIOS, stride=trunk.stride)
        proposals = ProposalNetwork(trunk.out_channels, anchors, preset)
        head = C4Head(network.layer4, encoder.feature_dim)
        heads = BoxHeads(
            regions=AlignedRegions(_REGION_CELLS, stride=trunk.stride),
            head=head,
            predictor=BoxPredictor(encoder.feature_dim, num_classes),
            preset=preset,
        )
    return GeneralizedRCNN(trunk, proposals, heads, Pixels(pixels)).requires_grad_(True)


class Pixels(GeneralizedRCNNTransform):
    """Pixels to one batch, with zeros beyond what is smaller than others; images are not resized.

    Args:
        encoder: without its backbone; it normalizes.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(0, 0, [], [], size_divisible=1)
        self.encoder = encoder

    def normalize(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (C, H, W) float32."""
        return self.encoder.normalize(image[None])[0]

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Leave an image as it is."""
        return image, target


class Trunk(nn.Module):
    """ResNet up to its third stage, by its own names.

    Args:
        backbone: timm's ResNet.
        channels: of the images.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.steps = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3")
        for name in self.steps:
            setattr(self, name, getattr(backbone, name))
        side = 64
        weight = next(self.parameters())
        with torch.no_grad():
            seen = self.eval()(torch.zeros(1, channels, side, side, device=weight.device, dtype=weight.dtype))
        self.out_channels = int(seen.shape[1])
        self.stride = side // int(seen.shape[2])
        """Pixels per cell of the map."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalized -> (B, out_channels, H / stride, W / stride), rounded up."""
        seen = images.contiguous(memory_format=torch.channels_last)
        for name in self.steps:
            seen = getattr(self, name)(seen)
        return seen


class Anchors(nn.Module):
    """Boxes of every size and shape at each cell of a map.

    Args:
        sizes: square roots of areas, in pixels.
        ratios: height divided by width.
        stride: pixels per cell.
    """

    cells: Tensor

    def __init__(self, sizes: tuple[int, ...], ratios: tuple[float, ...], *, stride: int) -> None:
        super().__init__()
        shapes = [(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios]
        cells = torch.tensor([(-width / 2, -height / 2, width / 2, height / 2) for width, height in shapes])
        self.register_buffer("cells", cells, persistent=False)
        self.stride = stride

    def num_anchors_per_location(self) -> list[int]:
        """Of the one map."""
        return [len(self.cells)]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return (H * W * A, 4) float32 for each image, of one map (B, C, H, W): row by row, cell by cell."""
        [seen] = feature_maps
        rows, columns = (
            torch.arange(length, device=seen.device, dtype=torch.float32) * self.stride for length in seen.shape[2:]
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=2).reshape(-1, 1, 4)
        anchors = (shifts + self.cells.float()).reshape(-1, 4)
        return [anchors] * len(image_list.image_sizes)


class _FloatHead(RPNHead):
    """torchvision's head of a proposal network, with float32 outputs."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [each.float() for each in objectness], [each.float() for each in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's proposal network with the loss of detectron2.

    Args:
        channels: of the map.
        anchors: at each of its cells.
        preset: numbers of proposals, and the loss of boxes.
    """

    def __init__(self, channels: int, anchors: Anchors, preset: DetectPreset) -> None:
        before, after = zip(preset.train_proposals, preset.test_proposals, strict=True)
        super().__init__(
            anchors,  # pyright: ignore[reportArgumentType] - called as torchvision's
            _FloatHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), before, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), after, strict=True)),
            nms_thresh=0.7,
        )
        self.l1_beta = preset.l1_beta

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and of boxes, over the anchors that are drawn."""
        positive, negative = (torch.cat(each).bool() for each in self.fg_bg_sampler(labels))
        drawn = positive | negative
        num_asked = self.fg_bg_sampler.batch_size_per_image * len(labels)
        found = F.binary_cross_entropy_with_logits(
            objectness.flatten()[drawn], torch.cat(labels)[drawn], reduction="sum"
        )
        boxes = box_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], self.l1_beta)
        return found / num_asked, boxes / num_asked


class AlignedRegions(nn.Module):
    """Cells of regions, of one map, as detectron2's ROIAlignV2 with an adaptive number of samples.

    Args:
        cells: on each side of a region.
        stride: pixels per cell of the map.
    """

    def __init__(self, cells: int, *, stride: int) -> None:
        super().__init__()
        self.cells, self.stride = cells, stride

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(B, C, H, W), and (R_i, 4) for each image -> (R, C, cells, cells)."""
        del image_shapes
        [seen] = features.values()
        return roi_align(seen, boxes, self.cells, 1 / self.stride, sampling_ratio=0, aligned=True)


class C4Head(nn.Module):
    """Last stage of a ResNet, the extra batch norm of the MoCo paper, and the mean over a region.

    Args:
        layer4: the stage.
        channels: of its output.
    """

    def __init__(self, layer4: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer4 = layer4
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C, 14, 14) -> (R, channels)."""
        return self.norm(self.layer4(regions)).mean(dim=(2, 3))


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
        """(R, C) -> (R, K + 1) and (R, 4 * (K + 1)) float32; the background is class 0, and its box does not move."""
        boxes = self.bbox_pred(seen).float()
        return self.cls_score(seen).float(), torch.cat([boxes.new_zeros(len(boxes), 4), boxes], dim=1)


class BoxHeads(RoIHeads):
    """torchvision's heads on regions with the loss of detectron2.

    Args:
        regions: cells of regions.
        head: cells to features.
        predictor: features to scores and boxes.
        preset: how many regions are drawn, and the loss of boxes.
    """

    def __init__(self, *, regions: nn.Module, head: nn.Module, predictor: nn.Module, preset: DetectPreset) -> None:
        super().__init__(
            regions,
            head,
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=preset.regions,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
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
            logits, boxes = self._predict(features, proposals, image_shapes)
            found = self.postprocess_detections(logits, boxes, proposals, image_shapes)
            return [
                {"boxes": boxes, "scores": scores, "labels": labels}
                for boxes, scores, labels in zip(*found, strict=True)
            ], {}
        with torch.no_grad():
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, boxes = self._predict(features, proposals, image_shapes)
        return [], self.losses(logits, boxes, torch.cat(labels), torch.cat(list(wanted)))

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))

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
