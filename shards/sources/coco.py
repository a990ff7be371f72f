"""Annotations in COCO's JSON, which iNaturalist has too: `images`, `annotations`, `categories`.

An image with annotations of one category has one label, as in iNaturalist. Where any image has several, as in COCO,
labels are sets, and an image without annotations has the empty set.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from shards.config import SourceOptions
from shards.ground.errors import PackError
from shards.ground.units import counted
from shards.sources.base import Aside, Found, Input, LabelSet, Source, folder_of
from shards.sources.lists import ListSource
from shards.storage.stores import is_url, open_bytes

__all__ = ["CocoSource"]


class CocoSource(ListSource):
    """The images that a JSON file names, each with the categories of its annotations."""

    kind: ClassVar[str] = "coco"

    @classmethod
    def recognize(cls, path: str, options: SourceOptions) -> Self | None:
        """Return a source for a file that ends in .json.

        Raises:
            ValueError: a subset is asked for, which is a file of its own here.
        """
        if not path.lower().endswith(".json") or (not is_url(path) and not Path(path).is_file()):
            return None
        if options.subset is not None:
            raise ValueError(f"--subset {options.subset} means nothing for {path}: give the .json file of the subset")
        return cls(path, options)

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found | Aside]:
        """List the images in the file's order."""
        del spool
        images, annotations, names = self._load()
        of_image: dict[Any, set[str]] = {image["id"]: set() for image in images}
        if len(of_image) < len(images):
            raise PackError(f"{self.path} gives two images the same id: labels would be mixed up")
        for annotation in annotations:
            try:
                of_image[annotation["image_id"]].add(names[annotation["category_id"]])
            except KeyError as error:
                raise PackError(f"{self.path}: an annotation names the image or category {error}, not listed") from None
        has_sets = any(len(labels) > 1 for labels in of_image.values())
        if not is_url(self._base):
            self._refuse_elsewhere(images)
        for image in images:
            labels, path = sorted(of_image[image["id"]]), str(image["file_name"])
            label = LabelSet(tuple(labels)) if has_sets else next(iter(labels), None)
            name = path.encode("utf-8", "surrogateescape")
            yield Input(name, folder_of(name), label, label_from="annotations")
        what = f"each with a set of {len(names)} categories" if has_sets else f"of {len(names)} categories"
        yield Found(f"{self.path}: COCO's layout, {counted(len(images), 'image')}, {what}", tuple(names.values()))

    def _load(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[Any, str]]:
        """Return images, annotations, and the name of each category's id."""
        file = open_bytes(self._root)
        try:
            found: Any = json.loads(file.read(0, file.size))
            images = cast("list[dict[str, Any]]", found["images"])
            annotations = cast("list[dict[str, Any]]", found.get("annotations", []))
            names = {each["id"]: str(each["name"]) for each in found.get("categories", [])}
            if not all("id" in image and "file_name" in image for image in images):
                raise KeyError("id and file_name of every image")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PackError(
                f"{self.path} is not in COCO's layout ({type(error).__name__}: {error}): it needs `images`, "
                "`annotations` and `categories`"
            ) from None
        if len(set(names.values())) < len(names):
            # Names of species may be those of two genera; ids never are.
            names = {number: f"{number} {name}" for number, name in names.items()}
        return images, annotations, names

    def _refuse_elsewhere(self, images: list[dict[str, Any]]) -> None:
        """Refuse a list whose images are somewhere else, before each of them is rejected."""
        tried = [str(image["file_name"]) for image in images[:100]]
        if tried and not any(os.path.exists(os.path.join(self._base, name)) for name in tried):  # noqa: PTH110, PTH118 - names as they are
            raise ValueError(
                f"{self.path} names {tried[0]}, which is not below {self._base}: name the folder of the images with "
                "--image-root"
            )
