"""Presets of transfer: the published settings of a detector's training and test, as data. Imports no torch.

C4 is the MoCo authors' (detection/configs of facebookresearch/moco), dilated C5 their paper's appendix A.1,
segmentation A.5. What these
leave open is the default of facebookresearch/detectron2 (config/defaults.py of early 2020), which trained them. Of
their FPN no configuration is public: it is detectron2's (configs/Base-RCNN-FPN.yaml) with batch norm where
open-mmlab/mmselfsup has it, whose figures are published. LVIS and Cityscapes are detectron2's
(configs/LVIS-InstanceSegmentation and configs/Cityscapes, mask_rcnn_R_50_FPN) with the same batch norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

__all__ = ["PRESETS", "SEGMENT_PRESETS", "DetectPreset", "SegmentPreset", "TransferPreset", "settled"]

T = TypeVar("T", bound="TransferPreset")


@dataclass(frozen=True, kw_only=True)
class TransferPreset:
    """How a network is trained from an encoder, and tested."""

    title: str
    """What it is, for people."""
    train: tuple[str, ...]
    """Parts of the data that are trained on, such as VOC2007/trainval."""
    test: tuple[str, ...]
    """Those that are tested on."""
    batch_size: int = 16
    """Images per step, over all ranks."""
    steps: int
    """Optimizer steps."""
    drops: tuple[float, ...]
    """Shares of the training after which the learning rate is divided by 10."""
    lr: float = 0.02
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly, from a thousandth."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decays_norms: bool = False
    """Whether the parameters of normalization layers decay, too."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """What takes the steps: SGD trains ResNets, AdamW vision transformers."""
    layer_decay: float = 1.0
    """Learning rate of each stage or block of the encoder, divided by that of the one above it."""
    precise_batches: int = 0
    """Batches that the statistics of batch norm are averaged over before the test; 0: they stay as trained."""


@dataclass(frozen=True, kw_only=True)
class DetectPreset(TransferPreset):
    """How a detector is trained and tested."""

    layout: Literal["voc", "coco", "lvis", "cityscapes"] = "voc"
    """Of the data, and whose rules measure."""
    head: Literal["c4", "c5", "fpn"] = "c4"
    """What looks at regions, and at which maps."""
    masks: bool = False
    """Whether objects have masks beside boxes."""
    keypoints: bool = False
    """Whether objects have keypoints beside boxes."""
    min_keypoints: int = 1
    """Marked keypoints that an image has at least to be trained on, where objects have keypoints."""
    keypoint_pairs: tuple[str, ...] | None = None
    """Keypoints that change places in a mirrored image, as left:right; None: as their names say."""
    keypoint_sigmas: tuple[float, ...] | None = None
    """How far annotators are apart at each keypoint, relative to an object's size; None: COCO's."""
    group: int = 2
    """Neighboring images of a batch that all lie or all stand: as many as a rank of the authors' eight had."""
    repeat_threshold: float = 0.0
    """Share of the training images below which a class is rare, and its images are repeated; 0: none are."""
    sides: tuple[int, ...]
    """Shorter sides of training images in pixels, of which one is drawn for each."""
    test_side: int = 800
    """Shorter side of test images in pixels."""
    longest: int = 1333
    """Longest side of images in pixels; what would be longer has a smaller shorter side."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square roots of the anchors' areas in pixels."""
    train_proposals: tuple[int, int] = (12_000, 2_000)
    """Proposals of an image in training, before and after those that overlap are removed."""
    test_proposals: tuple[int, int] = (6_000, 1_000)
    """The same in a test."""
    regions: int = 512
    """Proposals of an image that the head is trained on."""
    detections: int = 100
    """Most that are found in a test image."""
    score_threshold: float = 0.05
    """What is found with a lower score is left out."""
    l1_beta: float = 0.0
    """Where the loss of the head's boxes changes from quadratic to linear; 0: it is linear."""
    rpn_l1_beta: float = 0.0
    """The same of proposals."""
    precise_batches: int = 200
    """Batches that the statistics of batch norm are averaged over before the test; 0: they stay as trained."""


@dataclass(frozen=True, kw_only=True)
class SegmentPreset(TransferPreset):
    """How a network that names every pixel's class is trained and tested."""

    layout: Literal["voc", "cityscapes"] = "voc"
    """Of the data."""
    crop: int
    """Height and width of training images in pixels."""
    scales: tuple[float, float] = (0.5, 2.0)
    """What the size of a training image is multiplied with, at least and at most."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly, from a thousandth."""
    decays_norms: bool = True
    """Whether the parameters of normalization layers decay, too."""
    head: Literal["fcn", "deeplabv3"] = "fcn"
    """What scores the cells of the last map."""


_VOC = DetectPreset(
    title="Faster R-CNN R50-C4 on VOC 07+12 trainval, tested on VOC 07 test",
    train=("VOC2007/trainval", "VOC2012/trainval"),
    test=("VOC2007/test",),
    steps=24_000,
    drops=(18_000 / 24_000, 22_000 / 24_000),
    sides=tuple(range(480, 801, 32)),
)
_COCO = DetectPreset(
    title="Mask R-CNN R50-C4 on COCO train2017, tested on val2017, 1x schedule",
    layout="coco",
    masks=True,
    train=("train2017",),
    test=("val2017",),
    steps=90_000,
    drops=(60_000 / 90_000, 80_000 / 90_000),
    warmup_steps=1_000,
    sides=tuple(range(640, 801, 32)),
)
_FPN = replace(
    _COCO,
    title="Mask R-CNN R50-FPN on COCO train2017, tested on val2017, 1x schedule",
    head="fpn",
    train_proposals=(2_000, 1_000),
    test_proposals=(1_000, 1_000),
)


def _doubled(preset: DetectPreset) -> DetectPreset:
    """Return the 2x schedule of a 1x one: it drops 60,000 and 20,000 steps before its end."""
    steps = 2 * preset.steps
    drops = ((steps - 60_000) / steps, (steps - 20_000) / steps)
    return replace(preset, title=preset.title.replace("1x", "2x"), steps=steps, drops=drops)


# The MoCo paper's appendix, and configs/COCO-Keypoints/Base-Keypoint-RCNN-FPN.yaml of detectron2.
_KEYPOINTS = replace(
    _doubled(_FPN),
    title="Keypoint R-CNN R50-FPN on COCO train2017, tested on val2017, 2x schedule",
    masks=False,
    keypoints=True,
    l1_beta=0.5,
    train_proposals=(2_000, 1_500),
)

PRESETS: dict[str, DetectPreset] = {
    "voc-c4": _VOC,
    "voc-c5": replace(_VOC, title=_VOC.title.replace("R50-C4", "R50-dilated-C5"), head="c5"),
    "coco-c4-1x": _COCO,
    "coco-c4-2x": _doubled(_COCO),
    "coco-fpn-1x": _FPN,
    "coco-fpn-2x": _doubled(_FPN),
    "lvis-fpn-2x": replace(
        _doubled(_FPN),
        title="Mask R-CNN R50-FPN on LVIS v0.5 train, tested on its val, 2x schedule",
        layout="lvis",
        train=("lvis_v0.5_train",),
        test=("lvis_v0.5_val",),
        repeat_threshold=0.001,
        detections=300,
        score_threshold=0.0001,
    ),
    "cityscapes-instance": replace(
        _FPN,
        title="Mask R-CNN R50-FPN on Cityscapes train fine, tested on val",
        layout="cityscapes",
        train=("train",),
        test=("val",),
        batch_size=8,
        group=1,
        steps=24_000,
        drops=(18_000 / 24_000,),
        lr=0.01,
        sides=tuple(range(800, 1025, 32)),
        test_side=1024,
        longest=2048,
    ),
    "coco-keypoints": _KEYPOINTS,
}
"""Of detectors, by name."""

# Appendix A.5 of the MoCo paper.
SEGMENT_PRESETS: dict[str, SegmentPreset] = {
    "voc-semantic": SegmentPreset(
        title="FCN on a dilated R50, on VOC train_aug 2012, tested on val 2012",
        train=("VOC2012/train_aug",),
        test=("VOC2012/val",),
        steps=30_000,
        drops=(0.7, 0.9),
        lr=0.003,
        crop=513,
    ),
    "cityscapes-semantic": SegmentPreset(
        title="FCN on a dilated R50, on Cityscapes train fine, tested on val",
        layout="cityscapes",
        train=("train",),
        test=("val",),
        steps=90_000,
        drops=(0.7, 0.9),
        lr=0.01,
        crop=769,
    ),
}
"""Of segmentation, by name."""


# Of the detectors by facebookresearch/detectron2 (projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py), for 64
# images, and of networks that name pixels by open-mmlab/mmsegmentation (configs/mae, ADE20K); both are for a ViT-B.
_ADAMW_DETECT = {"lr": 1e-4 * 16 / 64, "weight_decay": 0.1, "layer_decay": 0.7}
_ADAMW_SEGMENT = {
    "lr": 1e-4,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "warmup_steps": 1_500,
    "decays_norms": False,
}


def settled(
    preset: T,
    given: Mapping[str, object] = MappingProxyType({}),
    *,
    batch_size: int | None = None,
    steps: int | None = None,
) -> T:
    """Return a preset with what a user gives in place of its own values; None: its own.

    With AdamW in place of SGD, learning rate, weight decay and layer decay are those that others train vision
    transformers with, unless they are given.

    With another batch size, learning rate, steps and warm-up follow unless they are given, so that as many images are
    seen and each counts as much (Goyal et al. 2017; `auto_scale_workers` of detectron2).
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("optimizer") == "adamw" != preset.optimizer:
        preset = replace(preset, **(_ADAMW_DETECT if isinstance(preset, DetectPreset) else _ADAMW_SEGMENT))
    if batch_size is not None:
        scale = batch_size / preset.batch_size
        steps = steps or round(preset.steps / scale)
        warmup_steps = round(preset.warmup_steps / scale)
        chosen = {"lr": preset.lr * scale, "warmup_steps": warmup_steps, "batch_size": batch_size} | chosen
    if steps is not None:
        chosen["steps"] = steps
    return replace(preset, **chosen)  # pyright: ignore[reportArgumentType] - of the fields' types, as options are
