from dataclasses import replace

import pytest
import torch
from torch import nn

from moco_fast import distributed
from moco_fast.encoders.encoder import build_backbone
from moco_fast.encoders.formats.base import without_head
from moco_fast.methods.batchnorm import use_statistics_of_all_ranks
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.pixel_sets import OPEN
from moco_fast.transfer.presets import SEGMENT_PRESETS
from tests.moco_fast.transfer.tiny import tiny_resnet, tiny_vit

FCN = SEGMENT_PRESETS["voc-semantic"]
DEEPLAB = replace(FCN, head="deeplabv3")


def resnet50(preset) -> PixelNetwork:
    with torch.device("meta"):
        return PixelNetwork(without_head(build_backbone("resnet50"), 2048), preset, num_classes=21, seed=0)


def test_the_network_is_that_of_the_papers_appendix() -> None:
    network = resnet50(FCN)
    assert network.backbone.strides == [4, 8, 16, 16]
    convs = [layer for layer in network.backbone.layer4.modules() if isinstance(layer, nn.Conv2d)]
    assert {layer.stride for layer in convs} == {(1, 1)}
    assert {layer.dilation for layer in convs if layer.kernel_size == (3, 3)} == {(2, 2)}
    first, norm, _, second, _, _, last = network.head
    assert (tuple(first.weight.shape), first.dilation, first.bias) == ((256, 2048, 3, 3), (6, 6), None)
    assert (tuple(second.weight.shape), second.dilation) == ((256, 256, 3, 3), (6, 6))
    assert isinstance(norm, nn.BatchNorm2d)
    assert tuple(last.weight.shape) == (21, 256, 1, 1)
    assert all(value.requires_grad for value in network.parameters())


def test_the_branches_of_deeplab_are_the_papers_for_stride_16() -> None:
    head = resnet50(DEEPLAB).head
    convs = {name: layer for name, layer in head.named_modules() if isinstance(layer, nn.Conv2d)}
    assert {name: (tuple(layer.weight.shape), *layer.dilation) for name, layer in convs.items()} == {
        "0.convs.0.0": ((256, 2048, 1, 1), 1, 1),
        **{f"0.convs.{n}.0": ((256, 2048, 3, 3), 6 * n, 6 * n) for n in (1, 2, 3)},
        "0.convs.4.1": ((256, 2048, 1, 1), 1, 1),
        "0.project.0": ((256, 1280, 1, 1), 1, 1),
        "1": ((256, 256, 3, 3), 1, 1),
        "4": ((21, 256, 1, 1), 1, 1),
    }
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in head.modules()) == 7


@pytest.mark.parametrize("preset", [FCN, DEEPLAB])
def test_new_layers_begin_alike_in_both_heads_and_only_the_seed_decides(preset) -> None:
    network, again, other = (PixelNetwork(tiny_resnet(), preset, num_classes=21, seed=seed) for seed in (5, 5, 6))
    *convs, score = (layer for layer in network.head.modules() if isinstance(layer, nn.Conv2d))
    assert score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not score.bias.any()
    for conv in convs:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert torch.equal(score.weight, again.head[-1].weight)
    assert not torch.equal(score.weight, other.head[-1].weight)


def encoders():
    return {"resnet": tiny_resnet(), "vit": tiny_vit()}


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_loss_is_the_mean_over_the_pixels_that_count(kind) -> None:
    network = PixelNetwork(encoders()[kind], FCN, num_classes=4, seed=0).eval()
    images = torch.randint(0, 256, (2, 3, 33, 50), dtype=torch.uint8)
    targets = torch.randint(0, 4, (2, 33, 50), dtype=torch.uint8)
    targets[:, :10] = OPEN
    scores = network(images)
    assert scores.shape == (2, 4, 33, 50)
    likely = scores.log_softmax(1)[:, :, 10:].gather(1, targets[:, None, 10:].long())
    torch.testing.assert_close(network(images, targets)["loss_pixels"], -likely.mean())
    assert network(images, torch.full_like(targets, OPEN))["loss_pixels"].item() == 0


def test_scores_of_a_transformer_lie_where_its_patches_lie() -> None:
    network = PixelNetwork(tiny_vit(), FCN, num_classes=2, seed=0).eval()
    # Scores that say the column of a patch: interpolated, they grow by 1 for 16 pixels.
    network.head = nn.Identity()
    columns = torch.arange(3.0).expand(1, 2, 2, 3)
    network.backbone.forward = lambda images: columns
    scores = network(torch.zeros(1, 3, 20, 40, dtype=torch.uint8))
    assert scores.shape == (1, 2, 20, 40)
    wanted = ((torch.arange(40) + 0.5) / 16 - 0.5).clamp(0, 2)
    torch.testing.assert_close(scores[0, 0, 7], wanted)


@pytest.mark.parametrize("preset", [FCN, DEEPLAB])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_every_parameter_has_a_gradient(preset, kind) -> None:
    network = PixelNetwork(encoders()[kind], preset, num_classes=3, seed=0).train()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    network(images, torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8))["loss_pixels"].backward()
    assert [name for name, value in network.named_parameters() if value.grad is None] == []


def statistics_of_deeplab():
    """Scores of a rank's half of the images, and running statistics of the head."""
    network = PixelNetwork(tiny_resnet(), DEEPLAB, num_classes=3, seed=0).train()
    network.head[0].project[3].p = 0.0  # Each rank drops other cells.
    if distributed.world_size() > 1:
        use_statistics_of_all_ranks(network, weighted=False)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()
    scores = network(images.chunk(distributed.world_size())[distributed.rank()])
    norms = [layer for layer in network.head.modules() if isinstance(layer, nn.BatchNorm2d)]
    return scores.detach(), torch.cat([layer.running_mean for layer in norms])


def test_batch_norm_of_deeplab_over_two_ranks_is_that_of_one_with_both_batches(run_ranks) -> None:
    scores, running = statistics_of_deeplab()
    of_ranks = run_ranks(statistics_of_deeplab)
    torch.testing.assert_close(torch.cat([each for each, _ in of_ranks]), scores, rtol=1e-3, atol=1e-4)
    for _, each in of_ranks:
        torch.testing.assert_close(each, running, rtol=1e-3, atol=1e-4)
