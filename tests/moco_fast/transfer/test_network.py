import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import nms, roi_align

from moco_fast import distributed
from moco_fast.encoders.encoder import build_backbone
from moco_fast.encoders.formats.base import without_head
from moco_fast.encoders.formats.detectron2 import to_detectron2
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.transfer.heads import RegionHeads
from moco_fast.transfer.network import Anchors, ProposalNetwork, build_detector
from moco_fast.transfer.presets import PRESETS
from tests.moco_fast.transfer.tiny import TINY, tiny_resnet


def bottlenecks(name: str, blocks: int, before: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a stage of detectron2's ResNet-50."""
    found = {}
    for number in range(blocks):
        taken = before if number == 0 else 4 * inner
        shapes = {"conv1": (inner, taken, 1, 1), "conv2": (inner, inner, 3, 3), "conv3": (4 * inner, inner, 1, 1)}
        if number == 0:
            shapes["shortcut"] = (4 * inner, taken, 1, 1)
        for layer, shape in shapes.items():
            found[f"{name}.{number}.{layer}.weight"] = shape
            found |= {f"{name}.{number}.{layer}.norm.{each}": shape[:1] for each in ("weight", "bias")}
    return found


def parameters_of_the_authors(num_classes: int) -> dict[str, tuple[int, ...]]:
    """R50-C4 with the extra norm, as detectron2 names it (modeling/backbone/resnet.py, proposal_generator/rpn.py,
    roi_heads/fast_rcnn.py; detection/train_net.py of facebookresearch/moco)."""
    wanted = {"backbone.stem.conv1.weight": (64, 3, 7, 7)}
    wanted |= {f"backbone.stem.conv1.norm.{each}": (64,) for each in ("weight", "bias")}
    for name, blocks, before, inner in (("res2", 3, 64, 64), ("res3", 4, 256, 128), ("res4", 6, 512, 256)):
        wanted |= bottlenecks(f"backbone.{name}", blocks, before, inner)
    for name, shape in {"conv": (1024, 1024, 3, 3), "objectness_logits": (15, 1024, 1, 1)}.items():
        wanted |= {f"rpn.{name}.weight": shape, f"rpn.{name}.bias": shape[:1]}
    wanted |= {"rpn.anchor_deltas.weight": (60, 1024, 1, 1), "rpn.anchor_deltas.bias": (60,)}
    wanted |= bottlenecks("heads.res5", 3, 1024, 512)
    wanted |= {f"heads.res5.norm.{each}": (2048,) for each in ("weight", "bias")}
    for name, outputs in (("cls_score", num_classes + 1), ("bbox_pred", 4 * num_classes)):
        wanted |= {f"heads.{name}.weight": (outputs, 2048), f"heads.{name}.bias": (outputs,)}
    return wanted


def as_the_authors_name_it(name: str) -> str:
    if name.startswith("backbone."):
        return f"backbone.{to_detectron2(name.removeprefix('backbone.'))}"
    if name.startswith("roi_heads.box_head.layer4"):
        return f"heads.{to_detectron2(name.removeprefix('roi_heads.box_head.'))}"
    for ours, theirs in {
        "rpn.head.conv.0.0": "rpn.conv",
        "rpn.head.cls_logits": "rpn.objectness_logits",
        "rpn.head.bbox_pred": "rpn.anchor_deltas",
        "roi_heads.box_head.norm": "heads.res5.norm",
        "roi_heads.box_predictor": "heads",
    }.items():
        name = name.replace(ours, theirs)
    return name


def test_the_layers_are_those_of_the_authors_configuration() -> None:
    with torch.device("meta"):
        encoder = without_head(build_backbone("resnet50"), 2048)
        detector = build_detector(encoder, PRESETS["voc-c4"], num_classes=20, seed=0)
    shapes = {as_the_authors_name_it(name): tuple(value.shape) for name, value in detector.named_parameters()}
    assert shapes == parameters_of_the_authors(20)
    assert all(value.requires_grad for value in detector.parameters())
    strides = {
        name: layer.stride
        for name, layer in detector.named_modules()
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1
    }
    # STRIDE_IN_1X1 False: the 3x3 convolution of a stage's first block, and the shortcut beside it.
    wanted = {
        f"{stage}.0.{layer}"
        for stage in ("backbone.layer2", "backbone.layer3", "roi_heads.box_head.layer4")
        for layer in ("conv2", "downsample.0")
    } | {"backbone.conv1"}
    assert strides == dict.fromkeys(wanted, (2, 2))
    assert detector.backbone.stride == 16


def test_new_layers_begin_as_the_authors_do_and_only_the_seed_decides() -> None:
    detector, again = (build_detector(tiny_resnet(), TINY, num_classes=3, seed=5) for _ in range(2))
    other = build_detector(tiny_resnet(), TINY, num_classes=3, seed=6)
    for name, std in {"rpn.head.conv.0.0": 0.01, "roi_heads.box_predictor.cls_score": 0.01}.items():
        layer = detector.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.2)
        assert not layer.bias.any()
        assert torch.equal(layer.weight, again.get_submodule(name).weight)
        assert not torch.equal(layer.weight, other.get_submodule(name).weight)
    assert detector.roi_heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.2)
    norm = detector.roi_heads.box_head.norm
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()


def naive_anchors(rows: int, columns: int, sizes, stride: int) -> list[tuple[float, ...]]:
    found = []
    for row in range(rows):
        for column in range(columns):
            for size in sizes:
                for ratio in (0.5, 1.0, 2.0):
                    width = math.sqrt(size * size / ratio)
                    height = ratio * width
                    x, y = column * stride, row * stride
                    found.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return found


def decode(box, deltas, weights=(1.0, 1.0, 1.0, 1.0)) -> tuple[float, ...]:
    width, height = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (float(delta) / weight for delta, weight in zip(deltas, weights, strict=True))
    x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
    limit = math.log(1000 / 16)
    width, height = width * math.exp(min(dw, limit)), height * math.exp(min(dh, limit))
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def clip(box, height: int, width: int) -> tuple[float, ...]:
    return tuple(min(max(value, 0.0), float(side)) for value, side in zip(box, (width, height) * 2, strict=True))


@torch.no_grad()
def naive_detections(detector, image, preset, *, num_classes: int) -> list[tuple]:
    """One image through the configuration's steps, box by box: (class, score, box) by falling score."""
    detector.eval()
    encoder = tiny_resnet()
    height, width = image.shape[1:]
    seen = detector.backbone(encoder.normalize(image[None]))
    head = detector.rpn.head
    hidden = F.relu(F.conv2d(seen, head.conv[0][0].weight, head.conv[0][0].bias, padding=1))
    scores, deltas = head.cls_logits(hidden)[0], head.bbox_pred(hidden)[0]
    anchors = naive_anchors(*seen.shape[2:], preset.anchor_sizes, 16)
    cells = len(preset.anchor_sizes) * 3
    scores = scores.permute(1, 2, 0).flatten()
    deltas = deltas.unflatten(0, (cells, 4)).permute(2, 3, 0, 1).flatten(0, 2)
    before, after = preset.test_proposals
    kept = scores.argsort(descending=True)[:before]
    boxes = torch.tensor([clip(decode(anchors[each], deltas[each]), height, width) for each in kept.tolist()])
    proposals = boxes[nms(boxes, scores[kept], 0.7)[:after]]
    regions = roi_align(seen, [proposals], 14, 1 / 16, sampling_ratio=0, aligned=True)
    heads = detector.roi_heads
    features = heads.box_head.norm(heads.box_head.layer4(regions)).mean(dim=(2, 3))
    likely = heads.box_predictor.cls_score(features).softmax(dim=1)
    moved = heads.box_predictor.bbox_pred(features).unflatten(1, (num_classes, 4))
    found = []
    for number in range(num_classes):
        chosen = torch.where(likely[:, number + 1] > 0.05)[0]
        boxes = torch.tensor(
            [
                clip(decode(proposals[each].tolist(), moved[each, number], (10, 10, 5, 5)), height, width)
                for each in chosen.tolist()
            ]
        ).reshape(-1, 4)
        scores = likely[chosen, number + 1]
        found += [(number + 1, scores[each].item(), boxes[each].tolist()) for each in nms(boxes, scores, 0.5)]
    return sorted(found, key=lambda each: -each[1])[:100]


def test_initial_detections_are_those_of_the_configuration_followed_box_by_box() -> None:
    preset = replace(TINY, test_proposals=(30, 12))
    detector = build_detector(tiny_resnet(), preset, num_classes=3, seed=1)
    # Scores and boxes that differ, so that their order is one order.
    with torch.no_grad():
        for layer in (detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred):
            layer.weight.mul_(20)
        detector.roi_heads.box_predictor.cls_score.weight.mul_(50)
        detector.roi_heads.box_predictor.bbox_pred.weight.mul_(500)
    image = torch.randint(0, 256, (3, 60, 92), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = naive_detections(detector, image, preset, num_classes=3)
    with torch.no_grad():
        [found] = detector.eval()([image])
    assert len(wanted) > 5
    assert found["labels"].tolist() == [label for label, _, _ in wanted]
    torch.testing.assert_close(found["scores"], torch.tensor([score for _, score, _ in wanted]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["boxes"], torch.tensor([box for _, _, box in wanted]), rtol=1e-3, atol=1e-3)


def test_losses_of_regions_are_those_of_torchvision_for_its_own_settings() -> None:
    heads = build_detector(tiny_resnet(), replace(TINY, l1_beta=1 / 9), num_classes=3, seed=0).roi_heads
    torch.manual_seed(0)
    logits, boxes, wanted = torch.randn(40, 4), torch.randn(40, 16), torch.randn(40, 4)
    labels = torch.randint(0, 4, (40,))
    ours = heads.losses(logits, boxes, labels, wanted)
    theirs = fastrcnn_loss(logits, boxes, list(labels.split(20)), list(wanted.split(20)))
    torch.testing.assert_close(torch.stack(list(ours.values())), torch.stack(theirs))


def proposals_of(beta: float) -> ProposalNetwork:
    return ProposalNetwork(8, Anchors([(16, 32)], (0.5, 1.0, 2.0), strides=[16]), replace(TINY, rpn_l1_beta=beta))


def test_losses_of_proposals_are_those_of_torchvision_where_all_that_is_asked_for_is_there() -> None:
    network = proposals_of(1 / 9)
    torch.manual_seed(0)
    objectness, deltas = torch.randn(1200, 1), torch.randn(1200, 4)
    labels = [torch.randint(0, 2, (600,)).float() for _ in range(2)]
    wanted = list(torch.randn(2, 600, 4))
    losses = []
    for compute in (ProposalNetwork.compute_loss, RegionProposalNetwork.compute_loss):
        torch.manual_seed(1)
        losses.append(torch.stack(compute(network, objectness, deltas, labels, wanted)))
    torch.testing.assert_close(*losses)


def test_losses_of_proposals_are_divided_by_the_number_that_is_asked_for() -> None:
    network = proposals_of(0.0)
    torch.manual_seed(0)
    objectness, deltas, wanted = torch.randn(6, 1), torch.randn(6, 4), torch.randn(6, 4)
    labels = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 0.0])
    found, boxes = network.compute_loss(objectness, deltas, [labels], [wanted])
    signs = {1.0: -1, 0.0: 1}
    drawn = [(float(label), float(score)) for label, score in zip(labels, objectness[:, 0], strict=True) if label >= 0]
    assert found.item() == pytest.approx(
        sum(math.log1p(math.exp(signs[label] * score)) for label, score in drawn) / 256
    )
    assert boxes.item() == pytest.approx((deltas - wanted)[labels == 1].abs().sum().item() / 256)


def test_boxes_and_scores_are_float32_in_bfloat16() -> None:
    detector = build_detector(tiny_resnet(), TINY, num_classes=3, seed=0)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()([image], [target])
        [found] = detector.eval()([image])
    assert {value.dtype for value in (*losses.values(), found["boxes"], found["scores"])} == {torch.float32}


def test_an_image_without_boxes_has_losses_too() -> None:
    detector = build_detector(tiny_resnet(), TINY, num_classes=3, seed=0).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = detector([torch.zeros(3, 64, 96, dtype=torch.uint8)], [nothing])
    assert losses["loss_box_reg"].item() == losses["loss_rpn_box_reg"].item() == 0
    assert torch.stack(list(losses.values())).isfinite().all()


def test_what_is_not_a_resnet_is_refused() -> None:
    encoder = tiny_resnet()
    encoder.backbone = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="a ResNet's stages, and this is a Sequential"):
        build_detector(encoder, TINY, num_classes=3, seed=0)


def batch_statistics():
    """Outputs, gradient and running statistics of the head, on a rank's half of the regions."""
    head = build_detector(tiny_resnet(), TINY, num_classes=3, seed=0).roi_heads.box_head.train()
    if distributed.world_size() > 1:
        use_statistics_of_all_ranks(head, weighted=False)
    regions = torch.randn(12, 32, 14, 14, generator=torch.Generator().manual_seed(3))
    own = regions.chunk(distributed.world_size())[distributed.rank()]
    outputs = head(own)
    outputs.square().sum().backward()
    gradient = head.layer4[0].conv1.weight.grad
    distributed.average_([gradient])
    running = torch.cat([head.norm.running_mean, head.norm.running_var, head.layer4[0].bn1.running_var])
    return outputs.detach(), gradient * distributed.world_size(), running


def test_batch_norm_over_two_ranks_is_that_of_one_with_both_batches(run_ranks) -> None:
    whole = batch_statistics()
    halves = run_ranks(batch_statistics)
    torch.testing.assert_close(torch.cat([outputs for outputs, _, _ in halves]), whole[0], rtol=1e-3, atol=1e-5)
    for _, gradient, running in halves:
        torch.testing.assert_close(gradient, whole[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(running, whole[2])


def unequal_ranks():
    layer = nn.BatchNorm2d(2).train()
    use_statistics_of_all_ranks(layer, weighted=False)
    rank = distributed.rank()
    layer(torch.full((1, 2, 1 + rank, 2), float(rank)))
    return layer.running_mean


def test_a_rank_with_larger_images_counts_as_much_as_another(run_ranks) -> None:
    for mean in run_ranks(unequal_ranks):
        assert mean.tolist() == pytest.approx([0.05, 0.05])  # 0.1 of the mean of 0 and 1


def test_heads_give_losses_in_training_and_detections_otherwise() -> None:
    heads = build_detector(tiny_resnet(), TINY, num_classes=3, seed=0).roi_heads
    assert isinstance(heads, RegionHeads)
    features, boxes = {"0": torch.randn(1, 32, 4, 6)}, [torch.tensor([[0.0, 0.0, 40.0, 40.0]])]
    target = {"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    found, losses = heads.train()(features, list(boxes), [(64, 96)], [target])
    assert (found, sorted(losses)) == ([], ["loss_box_reg", "loss_classifier"])
    found, losses = heads.eval()(features, boxes, [(64, 96)])
    assert (len(found), losses) == (1, {})
