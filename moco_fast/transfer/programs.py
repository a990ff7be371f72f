"""Export of trained networks as programs that run without our code, for images of any size.

torchvision's detectors were written before torch.export: two of their functions choose by how many boxes there are,
which a program cannot. In their place stand two that do the same for any number.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.v2 import functional as v2

from moco_fast.transfer.opening import TrainedNetwork, load_trained
from moco_fast.transfer.pictures import Gallery, decoded_image
from moco_fast.transfer.presets import DetectPreset
from shards.ground.files import appearing, remove

__all__ = ["PROGRAMS", "export_trained", "usage_of"]

PROGRAMS = {"torch-export": ".pt2", "onnx": ".onnx"}
"""Formats, with the endings of their files."""

_LEAST, _MOST = 128, 4096  # height and width of an image in pixels
_SIZES = ((160, 224), (224, 160), (192, 192))
_ONNX = ("onnx", "onnxruntime", "onnxscript")
_NEAR = 1e-2
"""Scores may differ by less; what is as near to the least score may be found by one of two and not by the other."""

Outputs = Callable[[Tensor], Sequence[Tensor]]


class DetectorProgram(nn.Module):
    """A detector as a function of one image, (3, H, W) uint8: boxes, scores, labels and, if it has them, masks."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Find objects in the image in the size that it has."""
        network, size = self.network, (image.shape[1], image.shape[2])
        divisor = network.transform.size_divisible
        pixels = network.transform.normalize(image)[None]
        pixels = F.pad(pixels, (0, -size[1] % divisor, 0, -size[0] % divisor))
        maps = network.backbone(pixels)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals, _ = network.rpn(ImageList(pixels, [size]), maps)
        [found], _ = network.roi_heads(maps, proposals, [size])
        return tuple(found.values())


class PixelProgram(nn.Module):
    """A network that names pixels as a function of one image: (3, H, W) uint8 -> scores (K, H, W) float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Give scores."""
        return (self.network(image[None])[0],)


def export_trained(path: str | Path, target: str, out: str | Path) -> tuple[TrainedNetwork, int]:
    """Write a trained network as a program, load it again, and compare what it gives on images of several sizes.

    Args:
        path: of a file of OUT/trained.
        target: one of `PROGRAMS`.
        out: file to write; an earlier one is replaced.

    Returns:
        the network, and how many objects of the images were compared (of pixels: images).

    Raises:
        ValueError: it cannot be exported, or the program gives something else; nothing is written.
    """
    out = Path(out)
    if target not in PROGRAMS:
        raise ValueError(f"there is no format {target!r}: choose {' or '.join(PROGRAMS)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: give a file in a folder that is there")
    if target == "onnx" and (missing := [name for name in _ONNX if find_spec(name) is None]):
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install 'moco-fast[onnx]'")
    trained = load_trained(path)
    if trained.keypoint_names:
        raise ValueError(
            f"{path} finds keypoints, whose heat maps torchvision resizes to each box in a loop that a program cannot "
            "have: use moco_fast.load_trained"
        )
    is_detector = isinstance(trained.preset, DetectPreset)
    eager = (DetectorProgram if is_detector else PixelProgram)(trained.network).eval()
    images = _images(Path(path))
    with appearing(out, durable=False) as aside:
        _write(eager, images[0], target, aside)
        program = _read(aside, target)
        num_compared = 0
        for image in images:
            with torch.no_grad():
                num_compared += _compared(program(image), eager(image), target, is_detector=is_detector)
        remove(out)
    return trained, num_compared


def usage_of(trained: TrainedNetwork, target: str, out: str) -> str:
    """Return Python lines that use a program."""
    is_detector = isinstance(trained.preset, DetectPreset)
    outputs = "boxes, scores, labels, *masks" if is_detector else "[scores]"
    shape = "(3, H, W) uint8, not normalized"
    if isinstance(trained.preset, DetectPreset):
        shape += f", its shorter side {trained.preset.test_side} as it was tested"
    if target == "onnx":
        return (
            f"import onnxruntime\nsession = onnxruntime.InferenceSession({out!r})\n"
            f"{outputs} = session.run(None, {{'image': image}})  # {shape}"
        )
    needs = "import torchvision  # whose operators the program calls\n" if is_detector else ""
    return f"import torch\n{needs}program = torch.export.load({out!r}).module()\n{outputs} = program(image)  # {shape}"


def _images(path: Path) -> list[Tensor]:
    """Return images of several sizes: those that the test was shown by, or noise."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in _SIZES]
    try:
        gallery = Gallery.read(path.parent.parent / "pictures" / f"{path.stem}.json")
    except ValueError:
        return noise
    best = [v2.pil_to_tensor(decoded_image(gallery.images[number].pixels)) for number in gallery.chosen.best]
    pictures: list[Any] = [v2.resize(image, list(size)) for size in _SIZES for image in best]
    return [*noise, *pictures]


def _write(program: nn.Module, image: Tensor, target: str, path: Path) -> None:
    sides = {1: torch.export.Dim("height", min=_LEAST, max=_MOST), 2: torch.export.Dim("width", min=_LEAST, max=_MOST)}
    with torch.no_grad(), _for_any_number(), _quiet():
        exported = torch.export.export(program, (image,), dynamic_shapes={"image": sides}, strict=False)
        if target == "onnx":
            written: Any = torch.onnx.export(exported, (image,), dynamo=True, verbose=False, input_names=["image"])
            written.save(str(path), external_data=False)
            return
        # torch writes only to a path with its own extension, or to an open file.
        with path.open("wb") as file:
            torch.export.save(exported, file)


def _read(path: Path, target: str) -> Outputs:
    """Load a program as a user would."""
    if target == "onnx":
        onnxruntime: Any = import_module("onnxruntime")
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda image: [torch.from_numpy(each) for each in session.run(None, {"image": image.numpy()})]
    with path.open("rb") as file, _quiet():
        return torch.export.load(file).module()


def _compared(found: Sequence[Tensor], wanted: Sequence[Tensor], target: str, *, is_detector: bool) -> int:
    """Return how much was compared. Raises ValueError: something is another thing."""
    if not is_detector:
        scale = wanted[0].abs().max()
        is_same = found[0].shape == wanted[0].shape and bool((found[0] - wanted[0]).abs().max() <= 1e-3 * scale)
        num = 1
    else:
        is_same = _has_all(found, wanted) and _has_all(wanted, found)
        num = len(wanted[0])
    if not is_same:
        raise ValueError(f"the program of {target} gives something else than the network: use moco_fast.load_trained")
    return num


def _has_all(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Return whether all that surely is in one list of detections is in the other."""
    boxes, scores, labels, *masks = wanted
    least = min([float(each.min()) for each in (scores, found[1]) if len(each)], default=0.0)
    for row in torch.where(scores >= least + _NEAR)[0].tolist():
        near = (found[0] - boxes[row]).abs().amax(1) <= 0.1
        near &= ((found[1] - scores[row]).abs() <= _NEAR) & (found[2] == labels[row])
        if masks:
            near &= (found[3] - masks[0][row]).abs().flatten(1).amax(1) <= _NEAR
        if not near.any():
            return False
    return True


def _suppressed(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Return the boxes that no better one of their class overlaps: classes are put apart."""
    reach = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    return torch.ops.torchvision.nms(boxes + (idxs.to(boxes) * reach)[:, None], scores, iou_threshold)


def _at_most(values: Tensor, num: int, axis: int) -> Any:
    return torch.sym_min(num, values.size(axis))


@contextmanager
def _for_any_number() -> Generator[None]:
    with (
        patch("torchvision.ops.boxes.batched_nms", _suppressed),
        patch("torchvision.models.detection._utils._topk_min", _at_most),
    ):
        yield


@contextmanager
def _quiet() -> Generator[None]:
    import warnings

    with warnings.catch_warnings():
        # torchvision calls a function that torch 2.15 calls by another name; torch 2.11 says the other of its buffers.
        warnings.filterwarnings("ignore", message=".*create_unbacked_symint", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        yield
