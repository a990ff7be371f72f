"""YAML as people write it: long commands as blocks of lines, keys in their order."""

from typing import Any

import yaml

__all__ = ["documents"]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no part as a reference to an equal one."""

    def ignore_aliases(self, data: object) -> bool:
        """Return that nothing is written as a reference."""
        del data
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def documents(*values: dict[str, Any]) -> str:
    """Return documents, one after the other."""
    return "---\n".join(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000) for value in values)
