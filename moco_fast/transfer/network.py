"""Networks: Faster, Mask and Keypoint R-CNN of torchvision's parts, with the settings of the MoCo authors.

What differs from torchvision's own, as in facebookresearch/detectron2: anchors are not rounded and lie at multiples of
the stride; regions are aligned by half a pixel (ROIAlignV2); boxes have an L1 loss, divided by the number of anchors
that are asked for, not of those that are there; the background has no box. Anchors, boxes and losses are in float32
whatever the network computes in: bfloat16 would round coordinates above 256 to even pixels.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from moco_fast.encoders.encoder import Encoder
from moco_fast.transfer.heads import (
    AlignedRegions,
    BoxPredictor,
    C4Head,
    MaskPredictor,
    RegionHeads,
    box_loss,
)
from moco_fast.transfer.keypoint_heads import KeypointMaps
from moco_fast.transfer.plain_vit import SimplePyramid
from moco_fast.transfer.presets import DetectPreset
from moco_fast.transfer.trunks import Pyramid, ReducedTrunk, Trunk

__all__ = ["Anchors", "ProposalNetwork", "build_detector"]

_RATIOS = (0.5, 1.0, 2.0)
_HIDDEN = 1024
_FPN_DIVISOR = 32
_KEYPOINT_LAYERS = (512,) * 8


def build_detector(
    encoder: Encoder, preset: DetectPreset, *, num_classes: int, seed: int, num_keypoints: int = 0
) -> GeneralizedRCNN:
    """Build a detector on a copy of a ResNet, or one with a pyramid on a copy of a plain vision transformer.

    In training it takes images and targets and gives losses by name; in evaluation it takes images and gives boxes,
    labels (from 1), scores and, if the preset says so, masks of the boxes (28 cells wide, 14 for C4) and keypoints
    (x, y, probability). Images are (3, H, W) uint8, in the size that they are looked at. Every parameter is trained.

    Args:
        encoder: whose backbone and normalization of pixels it has.
        preset: which detector, its anchors, numbers of proposals and regions.
        num_classes: without the background.
        seed: of the weights that the encoder does not have.
        num_keypoints: of an object, if the preset has keypoints.

    Raises:
        ValueError: this detector cannot be built of the encoder.
    """
    pixels = copy.deepcopy(encoder)
    network: Any = pixels.backbone
    pixels.backbone, pixels.head, pixels.predictor = nn.Identity(), nn.Identity(), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = {"c4": _c4, "c5": _c5, "fpn": _fpn}[preset.head]
        trunk, heads = build(network, encoder, preset, num_classes)
        if preset.keypoints:
            _add_keypoints(trunk, heads, num_keypoints)
        is_pyramid = isinstance(trunk, Pyramid | SimplePyramid)
        sizes = [(size,) for size in preset.anchor_sizes] if is_pyramid else [preset.anchor_sizes]
        strides = trunk.strides if is_pyramid else [trunk.stride]
        if len(sizes) != len(strides):
            raise ValueError(
                f"a pyramid has {len(strides)} maps, each with anchors of one size: give as many sizes with "
                "--anchor-sizes"
            )
        proposals = ProposalNetwork(trunk.out_channels, Anchors(sizes, _RATIOS, strides=strides), preset)
    transform = Pixels(pixels, divisor=_FPN_DIVISOR if is_pyramid else 1)
    return GeneralizedRCNN(trunk, proposals, heads, transform).requires_grad_(True)


def _c4(network: Any, encoder: Encoder, preset: DetectPreset, num_classes: int) -> tuple[Trunk, RegionHeads]:
    """The last stage looks at regions of what the stages before it see; the mask's head begins after it."""
    trunk = Trunk(network, encoder.channels, num_stages=3)
    heads = RegionHeads(
        regions=AlignedRegions(14, strides=[trunk.stride]),
        head=C4Head(network.layer4, encoder.feature_dim),
        predictor=BoxPredictor(encoder.feature_dim, num_classes),
        preset=preset,
        mask_predictor=MaskPredictor(encoder.feature_dim, num_classes) if preset.masks else None,
    )
    return trunk, heads


def _c5(network: Any, encoder: Encoder, preset: DetectPreset, num_classes: int) -> tuple[Trunk, RegionHeads]:
    """All stages, the last one dilated; two hidden layers look at regions."""
    trunk = ReducedTrunk(network, encoder.channels)
    assert not preset.masks
    head = TwoMLPHead(trunk.out_channels * 7 * 7, _HIDDEN)
    for layer in (head.fc6, head.fc7):
        _begin_linear(layer)
    heads = RegionHeads(
        regions=AlignedRegions(7, strides=[trunk.stride]),
        head=head,
        predictor=BoxPredictor(_HIDDEN, num_classes),
        preset=preset,
    )
    return trunk, heads


def _fpn(
    network: Any, encoder: Encoder, preset: DetectPreset, num_classes: int
) -> tuple[Pyramid | SimplePyramid, RegionHeads]:
    """A pyramid; four convolutions with batch norm and a hidden layer look at regions, four convolutions at masks."""
    is_transformer = isinstance(network, VisionTransformer)
    trunk = SimplePyramid(network) if is_transformer else Pyramid(network, encoder.channels)
    width, strides = trunk.out_channels, trunk.strides[:4]
    head = FastRCNNConvFCHead((width, 7, 7), [256] * 4, [_HIDDEN], norm_layer=nn.BatchNorm2d)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            _begin_linear(layer)
    heads = RegionHeads(
        regions=AlignedRegions(7, strides=strides),
        head=head,
        predictor=BoxPredictor(_HIDDEN, num_classes),
        preset=preset,
        mask_regions=AlignedRegions(14, strides=strides) if preset.masks else None,
        mask_head=MaskRCNNHeads(width, (256,) * 4, 1, norm_layer=nn.BatchNorm2d) if preset.masks else None,
        mask_predictor=MaskPredictor(256, num_classes) if preset.masks else None,
    )
    return trunk, heads


def _add_keypoints(trunk: Trunk | SimplePyramid, heads: RegionHeads, num_keypoints: int) -> None:
    """Eight convolutions with batch norm look at regions of 14 cells, and heat maps have 56."""
    assert isinstance(trunk, Pyramid | SimplePyramid)
    assert num_keypoints
    heads.keypoint_roi_pool = AlignedRegions(14, strides=trunk.strides[:4])
    heads.keypoint_head = MaskRCNNHeads(trunk.out_channels, _KEYPOINT_LAYERS, 1, norm_layer=nn.BatchNorm2d)
    heads.keypoint_predictor = KeypointMaps(_KEYPOINT_LAYERS[-1], num_keypoints)


def _begin_linear(layer: nn.Linear) -> None:
    # c2_xavier_fill of fvcore, which detectron2's hidden layers begin with.
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)


class Pixels(GeneralizedRCNNTransform):
    """Pixels to one batch, with zeros beyond what is smaller than others; images are not resized.

    Args:
        encoder: without its backbone; it normalizes.
        divisor: of the batch's height and width.
    """

    def __init__(self, encoder: Encoder, *, divisor: int) -> None:
        super().__init__(0, 0, [], [], size_divisible=divisor)
        self.encoder = encoder

    def normalize(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (C, H, W) float32."""
        return self.encoder.normalize(image[None])[0]

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Leave an image as it is."""
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Leave detections as they are, in the image as it was given, and masks in their boxes."""
        del image_shapes, original_image_sizes
        return result


class Anchors(nn.Module):
    """Boxes of every size and shape at each cell of maps.

    Args:
        sizes: for each map square roots of areas, in pixels.
        ratios: height divided by width.
        strides: pixels per cell of each map.
    """

    def __init__(self, sizes: list[tuple[int, ...]], ratios: tuple[float, ...], *, strides: list[int]) -> None:
        super().__init__()
        for number, of_map in enumerate(sizes):
            shapes = [(size / ratio**0.5, size * ratio**0.5) for size in of_map for ratio in ratios]
            cells = torch.tensor([(-width / 2, -height / 2, width / 2, height / 2) for width, height in shapes])
            self.register_buffer(f"cells{number}", cells, persistent=False)
        self.strides = strides

    def num_anchors_per_location(self) -> list[int]:
        """Of each map."""
        return [len(cells) for cells in self.buffers()]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return (anchors, 4) float32 for each image, of maps (B, C, H, W): map by map, row by row, cell by cell."""
        of_maps: list[Tensor] = []
        for seen, cells, stride in zip(feature_maps, self.buffers(), self.strides, strict=True):
            rows, columns = (
                torch.arange(length, device=seen.device, dtype=torch.float32) * stride for length in seen.shape[2:]
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=2).reshape(-1, 1, 4)
            of_maps.append((shifts + cells.float()).reshape(-1, 4))
        return [torch.cat(of_maps)] * len(image_list.image_sizes)


class _FloatHead(RPNHead):
    """torchvision's head of a proposal network, with float32 outputs."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [each.float() for each in objectness], [each.float() for each in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's proposal network with the loss of detectron2.

    Args:
        channels: of the maps.
        anchors: at each of their cells.
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
        self.l1_beta = preset.rpn_l1_beta

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
