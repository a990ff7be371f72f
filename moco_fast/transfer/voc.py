"""Layout of PASCAL VOC: a folder for each year, read as it is. Imports no torch.

VOC2007/Annotations/000005.xml           boxes; pixels are counted from 1, and the last one belongs to the box
VOC2007/ImageSets/Main/trainval.txt      names of the images of a part
VOC2007/JPEGImages/000005.jpg
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from moco_fast.transfer.sets import AnnotatedImage, DetectionSet, Malformed, read_list, size_as_shown
from shards.sets.benchmark import AnyPath, open_benchmark

__all__ = ["VOC_CLASSES", "find_parts", "read_voc"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Of the challenges from 2007 on."""

_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, kw_only=True)
class _Marked:
    """An image's annotations with the names of classes."""

    path: AnyPath
    key: str
    height: int
    width: int
    boxes: list[tuple[float, ...]]
    names: list[str]
    is_difficult: list[bool]


class _MalformedError(ValueError):
    """What makes an annotation useless, in words that several of them can share."""


def find_parts(
    folders: Sequence[str], parts: Sequence[str], *, option: str, lists: str = "Main"
) -> list[tuple[AnyPath, str]]:
    """Find the folder of each part's year.

    Args:
        folders: of years (VOC2007), or in which these lie (VOCdevkit).
        parts: YEAR/NAME, such as VOC2007/trainval.
        option: that gives the parts, for the error.
        lists: folder of the lists of images.

    Returns:
        folder and name of each part.

    Raises:
        ValueError: a folder or a list is not there, or in two places.
    """
    found: list[tuple[AnyPath, str]] = []
    roots = [open_benchmark(folder) for folder in folders]
    for part in parts:
        year, _, name = part.partition("/")
        if not name:
            raise ValueError(f"{option} {part}: give a year's folder and a part of it, such as VOC2007/trainval")
        # By its own name, which may be that of a link, or by the name of what `.` is.
        places = [root for root in roots if year in (root.name, root.resolve().name)]
        places += [root / year for root in roots if (root / year).is_dir()]
        places = [place for place in places if (place / "ImageSets" / lists / f"{name}.txt").is_file()]
        places = list({place.resolve(): place for place in places}.values())
        if not places:
            raise ValueError(
                f"{option} {part}: there is no {year}/ImageSets/{lists}/{name}.txt in {', '.join(folders)}: unpack it "
                "there (docs/transfer.md says where to get it), or name other parts"
            )
        if len(places) > 1:
            raise ValueError(f"{option} {part} is in {' and in '.join(map(str, places))}: name one of them with --data")
        found.append((places[0], name))
    return found


def read_voc(parts: Sequence[tuple[AnyPath, str]], *, class_names: tuple[str, ...] | None) -> DetectionSet:
    """Read annotations, and the sizes in the images' headers.

    Args:
        parts: as `find_parts` gives them.
        class_names: None: VOC's, if these are all that are marked, otherwise those that are marked, sorted.

    Raises:
        ValueError: a part has no image.
    """
    marked: list[_Marked] = []
    malformed: list[Malformed] = []
    for folder, part in parts:
        names = read_list(folder / "ImageSets" / "Main" / f"{part}.txt")
        with ThreadPoolExecutor() as pool:
            for each in pool.map(lambda name, folder=folder: _read_image(folder, name), names):
                (malformed if isinstance(each, Malformed) else marked).append(each)  # pyright: ignore[reportArgumentType] - the right one of the two
    if class_names is None:
        seen = {name for each in marked for name in each.names}
        class_names = VOC_CLASSES if seen <= set(VOC_CLASSES) else tuple(sorted(seen))
    images: list[AnnotatedImage] = []
    for each in marked:
        if unknown := set(each.names) - set(class_names):
            malformed.append(Malformed(key=each.key, reason=f"marks an unknown class, {min(unknown)}"))
        else:
            images.append(_numbered(each, class_names))
    where = ", ".join(f"{folder}/{part}" for folder, part in parts)
    return DetectionSet(where=where, class_names=class_names, images=images, malformed=malformed)


def _numbered(marked: _Marked, class_names: tuple[str, ...]) -> AnnotatedImage:
    return AnnotatedImage(
        path=marked.path,
        key=marked.key,
        height=marked.height,
        width=marked.width,
        boxes=np.array(marked.boxes, dtype=np.float32).reshape(-1, 4),
        classes=np.array([class_names.index(name) for name in marked.names], dtype=np.int64),
        is_difficult=np.array(marked.is_difficult, dtype=np.bool_),
    )


def _read_image(folder: AnyPath, name: str) -> _Marked | Malformed:
    key = f"{folder.name}/{name}"
    try:
        return _read_marked(folder, name, key)
    except _MalformedError as error:
        return Malformed(key=key, reason=str(error))


def _read_marked(folder: AnyPath, name: str, key: str) -> _Marked:
    path, annotation = folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.fromstring(annotation.read_bytes())  # noqa: S314 - expat of today limits what entities expand to
    except FileNotFoundError:
        raise _MalformedError("has no annotation") from None
    except (ElementTree.ParseError, OSError) as error:
        raise _MalformedError("has an annotation that is not XML") from error
    told = (_number(tree.findtext("size/width")), _number(tree.findtext("size/height")))
    # Tools that write this layout leave 0 or nothing where they do not know.
    size = size_as_shown(path, (int(told[0]), int(told[1])) if all(0 < side < math.inf for side in told) else None)
    if isinstance(size, str):
        raise _MalformedError("has no .jpg of its name in JPEGImages" if size == "has no image" else size)
    width, height = size
    objects = tree.findall("object")
    return _Marked(
        path=path,
        key=key,
        height=height,
        width=width,
        boxes=[_box(each, width, height) for each in objects],
        names=[_name(each) for each in objects],
        is_difficult=[_number(each.findtext("difficult")) == 1 for each in objects],
    )


def _name(marked: ElementTree.Element) -> str:
    name = (marked.findtext("name") or "").strip()
    if not name:
        raise _MalformedError("marks an object without a name")
    return name


def _box(marked: ElementTree.Element, width: int, height: int) -> tuple[float, ...]:
    """Return a box from 0 to the image's sides: the first pixel is 1 in a file."""
    sides = [_number(marked.findtext(f"bndbox/{side}")) for side in _SIDES]
    left, top, right, bottom = (sides[0] - 1, sides[1] - 1, sides[2], sides[3])
    if not all(map(math.isfinite, sides)):
        raise _MalformedError("has a box without four numbers")
    if not (left < right and top < bottom):
        raise _MalformedError("has a box without an area")
    # A pixel beyond is found in VOC itself, and is cut off.
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
        raise _MalformedError("has a box that is not within the image")
    return (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
