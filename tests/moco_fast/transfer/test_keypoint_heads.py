import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, heatmaps_to_keypoints, keypointrcnn_loss

from moco_fast.transfer.keypoint_heads import KeypointMaps, keypoint_loss, located_keypoints, regions_with_keypoints
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.presets import PRESETS
from tests.moco_fast.transfer.people import TINY_KEYPOINTS, narrow
from tests.moco_fast.transfer.tiny import tiny_resnet


def random_regions(num: int = 6, num_keypoints: int = 4):
    torch.manual_seed(0)
    boxes = torch.rand(num, 4) * 20
    boxes[:, 2:] += boxes[:, :2] + 5
    keypoints = torch.cat([torch.rand(num, num_keypoints, 2) * 45, torch.randint(0, 3, (num, num_keypoints, 1))], dim=2)
    return boxes, keypoints


def naive_loss(logits, boxes, keypoints) -> float:
    """Mean over marked keypoints within their regions of the cross entropy over the cells."""
    size, losses = logits.shape[-1], []
    for maps, box, of_object in zip(logits.double(), boxes.double(), keypoints.double(), strict=True):
        for cells, (x, y, visibility) in zip(maps, of_object, strict=True):
            column = math.floor((x - box[0]) * size / (box[2] - box[0])) - int(x == box[2])
            row = math.floor((y - box[1]) * size / (box[3] - box[1])) - int(y == box[3])
            if visibility > 0 and 0 <= column < size and 0 <= row < size:
                losses.append((cells.logsumexp((0, 1)) - cells[row, column]).item())
    return sum(losses) / len(losses)


def test_the_loss_is_the_cross_entropy_over_cells_of_what_is_marked_in_regions() -> None:
    boxes, keypoints = random_regions()
    keypoints[0, 0] = torch.tensor([boxes[0, 2], boxes[0, 3], 2])  # on the edge, which is in the last cell
    logits = torch.randn(6, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    found = keypoint_loss(logits, list(boxes.split(3)), list(keypoints.split(3)))
    assert found.item() == pytest.approx(naive_loss(logits, boxes, keypoints), rel=1e-5)


def test_without_a_marked_keypoint_the_loss_is_zero_with_a_gradient() -> None:
    boxes, keypoints = random_regions()
    logits = torch.randn(6, 4, 8, 8, requires_grad=True)
    loss = keypoint_loss(logits, [boxes], [keypoints * torch.tensor([1, 1, 0])])
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_regions_without_a_marked_keypoint_in_them_are_not_looked_at() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 4)
    keypoints = torch.tensor([[[10.0, 5, 1]], [[11.0, 5, 2]], [[5.0, 5, 0]], [[3.0, 3, 2]]])
    kept, marked = regions_with_keypoints([boxes[:3], boxes[3:]], [keypoints[:3], keypoints[3:]])
    assert [each.tolist() for each in marked] == [[[[10, 5, 1]]], [[[3, 3, 2]]]]
    assert [len(each) for each in kept] == [1, 1]
    # Batch norm needs something to take statistics of.
    kept, _ = regions_with_keypoints([boxes[1:3], boxes[:0]], [keypoints[1:3], keypoints[:0]])
    assert [len(each) for each in kept] == [2, 0]


def test_places_are_those_of_torchvision_with_a_probability() -> None:
    boxes, _ = random_regions(3)
    logits = 3 * torch.randn(3, 4, 56, 56)
    found = located_keypoints(logits, boxes)
    places, peaks = heatmaps_to_keypoints(logits, boxes)
    torch.testing.assert_close(found[..., :2], places[..., :2])
    # The score of detectron2 (structures/keypoints.py): relative to the sum over the map's own cells.
    torch.testing.assert_close(found[..., 2], (peaks.exp() / logits.exp().sum((2, 3))).clamp(max=1))
    assert located_keypoints(logits[:0], boxes[:0]).shape == (0, 4, 3)


def test_a_peak_is_found_where_the_keypoint_was() -> None:
    """What the loss asks for, the places give back, within a cell."""
    boxes = random_regions()[0]
    boxes[:, 2:] += 60  # In a box of fewer pixels than the map has cells, a peak of one cell may fall between them.
    inside = boxes[:, None, :2] + torch.rand(6, 4, 2) * (boxes[:, 2:] - boxes[:, :2])[:, None]
    cells = ((inside - boxes[:, None, :2]) * 56 / (boxes[:, 2:] - boxes[:, :2])[:, None]).long()
    logits = torch.zeros(6, 4, 56, 56)
    for region in range(6):
        for number in range(4):
            column, row = cells[region, number]
            logits[region, number, row, column] = 20
    assert keypoint_loss(logits, [boxes], [torch.cat([inside, torch.ones(6, 4, 1)], dim=2)]).item() < 0.01
    found = located_keypoints(logits, boxes)
    assert (found[..., :2] - inside).abs().max().item() < 85 / 56


def test_the_head_is_that_of_torchvision_but_for_its_batch_norm(monkeypatch) -> None:
    """Equal weights, regions and settings: the loss and the places of torchvision's Keypoint R-CNN."""
    narrow(monkeypatch)
    heads = build_detector(tiny_resnet(), TINY_KEYPOINTS, num_classes=1, seed=0, num_keypoints=4).roi_heads
    theirs = KeypointRCNNHeads(256, (16, 16))
    ours = [layer for layer in heads.keypoint_head.modules() if isinstance(layer, nn.Conv2d)]
    for layer, other in zip((theirs[0], theirs[2]), ours, strict=True):
        layer.weight.data.copy_(other.weight)
    predictor = KeypointRCNNPredictor(16, 4)
    predictor.load_state_dict(heads.keypoint_predictor.state_dict())
    assert isinstance(heads.keypoint_predictor, KeypointMaps)
    boxes, keypoints = random_regions()
    regions = torch.randn(6, 256, 14, 14)
    heads.keypoint_head.eval()  # Of new batch norms the statistics are 0 and 1, up to epsilon.
    maps = heads.keypoint_predictor(heads.keypoint_head(regions))
    wanted = predictor(theirs(regions))
    assert maps.shape == (6, 4, 56, 56)
    torch.testing.assert_close(maps, wanted, rtol=1e-3, atol=1e-4)
    loss = keypointrcnn_loss(wanted, [boxes], [keypoints], [torch.arange(6)])
    torch.testing.assert_close(keypoint_loss(maps, [boxes], [keypoints]), loss, rtol=1e-4, atol=1e-4)


def test_the_loss_of_the_whole_head_is_that_of_torchvision(monkeypatch) -> None:
    """The same modules in torchvision's RoIHeads, which draws the same regions."""
    narrow(monkeypatch)
    heads = build_detector(tiny_resnet(), TINY_KEYPOINTS, num_classes=1, seed=0, num_keypoints=4).roi_heads.eval()
    features = {
        str(number): torch.randn(2, 256, 64 // stride, 96 // stride) for number, stride in enumerate((4, 8, 16, 32))
    }
    proposals = [torch.tensor([[4.0, 4.0, 38.0, 42.0], [50.0, 5.0, 90.0, 60.0]]) for _ in range(2)]
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    target["keypoints"] = torch.tensor([[[10.0, 10, 2], [30, 12, 1], [0, 0, 0], [80, 50, 2]]])
    losses = []
    for forward in (RoIHeads.forward, type(heads).forward):
        torch.manual_seed(0)
        heads.training = True  # of the heads alone: their batch norms stay as they are
        _, found = forward(heads, dict(features), [each.clone() for each in proposals], [(64, 96)] * 2, [target] * 2)
        losses.append(found["loss_keypoint"])
    torch.testing.assert_close(*losses)


def test_maps_are_float32_in_bfloat16(monkeypatch) -> None:
    narrow(monkeypatch)
    heads = build_detector(tiny_resnet(), TINY_KEYPOINTS, num_classes=1, seed=0, num_keypoints=4).roi_heads.eval()
    features = {
        str(number): torch.randn(1, 256, 64 // stride, 96 // stride) for number, stride in enumerate((4, 8, 16, 32))
    }
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        [found], _ = heads(features, [torch.tensor([[4.0, 4.0, 38.0, 42.0]])], [(64, 96)])
    assert found["keypoints"].dtype == torch.float32
    assert found["keypoints"].shape == (1, 4, 3)


def test_settings_are_those_of_the_configuration() -> None:
    """configs/COCO-Keypoints/Base-Keypoint-RCNN-FPN.yaml and config/defaults.py of detectron2."""
    preset = PRESETS["coco-keypoints"]
    assert (preset.l1_beta, preset.rpn_l1_beta, preset.min_keypoints) == (0.5, 0.0, 1)
    assert (preset.train_proposals, preset.test_proposals) == ((2_000, 1_500), (1_000, 1_000))
    assert replace(
        preset, title="", masks=True, keypoints=False, l1_beta=0.0, train_proposals=(2_000, 1_000)
    ) == replace(PRESETS["coco-fpn-2x"], title="")
    with torch.device("meta"):
        detector = build_detector(tiny_resnet(), preset, num_classes=1, seed=0, num_keypoints=17)
    convs = [layer for layer in detector.roi_heads.keypoint_head.modules() if isinstance(layer, nn.Conv2d)]
    assert [(each.in_channels, each.out_channels, each.kernel_size) for each in convs] == [(256, 512, (3, 3))] + [
        (512, 512, (3, 3))
    ] * 7
    deconv = detector.roi_heads.keypoint_predictor.kps_score_lowres
    assert (deconv.out_channels, deconv.kernel_size, deconv.stride, deconv.padding) == (17, (4, 4), (2, 2), (1, 1))
