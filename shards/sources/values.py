"""Labels out of values: of columns of lists and tables, of keys in JSON, of text beside an image."""

import math
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Any, cast

from shards.sources.base import LabelSet

__all__ = ["USUAL_COLUMNS", "USUAL_IMAGES", "USUAL_LABELS", "as_label", "column_of", "number_or_name", "text_label"]

USUAL_LABELS = ("label", "class", "cls", "target", "class_name", "category", "label_name", "fine_label", "labels")
"""What columns and keys with labels are usually called."""

USUAL_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""What columns of tables and records with images are called; the first one counts."""

USUAL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
"""What their columns with labels are called; the first one counts."""

_NUMBER = re.compile(r"-?[0-9]+(\.0*)?")


def column_of(
    path: str, names: Collection[str], chosen: str | None, usual: Sequence[str], *, is_image: bool
) -> str | None:
    """Return the column that was chosen, or the one with a usual name; None: there are no labels.

    Args:
        path: of the file, for messages.
        names: of its columns.
        chosen: by --image-column or --label-column.
        usual: names, of which the first one counts.
        is_image: the column of images is wanted, not that of labels.

    Raises:
        ValueError: there is no such column.
    """
    by_name = {name.lower(): name for name in reversed([*names])} | {name: name for name in names}
    found = next((by_name[name] for name in ([chosen] if chosen else usual) if name in by_name), None)
    if found is None and (is_image or chosen):
        option = "--image-column" if is_image else "--label-column"
        raise ValueError(f"{path} has columns {', '.join(names)}: name the right one with {option}")
    return found


def as_label(value: Any, names: Sequence[str] = ()) -> LabelSet | str | int | None:
    """Return the label that a value is: a number, a name, or for a list a set of classes; None where there is none.

    Args:
        value: of a cell; a number that is missing in a column of floats is NaN, one below 0 no label.
        names: of classes that numbers stand for.

    Raises:
        ValueError: the value cannot be a class.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"{value} is not a class")
        value = int(value)
    if isinstance(value, int):
        if value < 0 or (names and value >= len(names)):
            return None
        return names[value] if names else int(value)
    if isinstance(value, list | tuple):
        values = cast("Sequence[Any]", value)
        found = [as_label(each, names) for each in values]
        if any(isinstance(each, LabelSet) for each in found):
            raise ValueError(f"{str(values)[:60]} is not a set of classes")
        return LabelSet(tuple(sorted({str(each) for each in found if each is not None})))
    raise ValueError(f"{str(value)[:60]} is not a class")


def text_label(data: bytes, names: Sequence[str] = ()) -> str | int | None:
    """Return the label that a text is: a number or a name.

    Args:
        data: the text.
        names: of classes that numbers stand for.
    """
    label = as_label(number_or_name(data.decode("utf-8", "backslashreplace")), names)
    assert not isinstance(label, LabelSet)
    return label


def number_or_name(text: str) -> str | int | None:
    """Return what a text of a list or a file stands for: a number, which may be written 3.0, a name, or nothing."""
    text = text.strip()
    return int(text.partition(".")[0]) if _NUMBER.fullmatch(text) else text or None
