"""Addresses in options: refused wherever an option does not say that it takes one."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

__all__ = ["refuse_addresses"]

_ADDRESS = re.compile(r"(?:.*=)?[a-z][a-z0-9+.-]*://", re.IGNORECASE)

_UNNAMED = ("config", "recipe", "task")
"""Fields whose own fields are options without their name in front."""


def refuse_addresses(
    options: Any, *, taken_by: Collection[str], ways_out: Mapping[str, str] | None = None, prefix: str = ""
) -> None:
    """Refuse an address, such as s3://bucket/x, in an option that would take it for a path and make a folder `s3:`.

    Args:
        options: a dataclass of options; those that are dataclasses are looked into.
        taken_by: fields that take addresses, as `Class.field`.
        ways_out: what to do instead, for some fields.
        prefix: what the names of options begin with.

    Raises:
        ValueError: the message names option and value.
    """
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{type(options).__name__}.{field.name}"
        if dataclasses.is_dataclass(value):
            inner = "" if field.name in _UNNAMED else f"{prefix}{field.name}."
            refuse_addresses(value, taken_by=taken_by, ways_out=ways_out, prefix=inner)
            continue
        texts = cast("tuple[object, ...]", value if isinstance(value, tuple) else (value,))
        for text in texts:
            if isinstance(text, str) and _ADDRESS.match(text) and name not in taken_by:
                instead = (ways_out or {}).get(name, "give a path on this machine")
                option = f"{prefix}{field.name}".replace("_", "-")
                raise ValueError(f"--{option} {text} is an address, which this option does not take: {instead}")
