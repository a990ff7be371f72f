"""YAML as people write it: long commands as blocks of lines, keys in their order."""

from typing import Any

import yaml

__all__ = ["yaml_text"]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def yaml_text(value: dict[str, Any]) -> str:
    """Return a document."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)
