"""Option files: YAML or JSON with values of options, checked against the dataclass whose fields the options are."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

__all__ = ["OptionFile", "changed", "describe_type", "fitted", "read_option_file", "take_option"]

Section = TypeVar("Section")

_DEEPEST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionFile:
    """What an option file says."""

    path: str
    values: dict[str, Any]
    """Values by the names of fields (`-` may stand for `_`); those of sections as dictionaries."""
    lines: Mapping[str, int]
    """Line of each dotted name in a YAML file; of JSON, none."""

    def place(self, name: str) -> str:
        """Return where a dotted name is, for the start of a message."""
        line = self.lines.get(name)
        return self.path if line is None else f"{self.path}, line {line}"


def take_option(words: Sequence[str], option: str = "--config") -> tuple[list[str], str | None]:
    """Return a command line without an option, and the option's value; None: it was not given.

    Raises:
        ValueError: it was given twice, or has no value.
    """
    rest: list[str] = []
    values: list[str] = []
    of_words = iter(words)
    for word in of_words:
        name, sign, value = word.partition("=")
        if name != option:
            rest.append(word)
            continue
        value = value if sign else next(of_words, "")
        if not value or (value.startswith("--") and not sign):
            raise ValueError(f"{option} needs the name of a file after it")
        values.append(value)
    if len(values) > 1:
        raise ValueError(f"{option} is given twice ({' and '.join(values)}): give one file; options override it")
    return rest, values[0] if values else None


def read_option_file(path: str) -> OptionFile:
    """Read a file of options: JSON where its name ends in .json, else YAML.

    Raises:
        ValueError: it cannot be read, or has a key twice; the message names file, line or key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read: {reason}") from None
    lines: dict[str, int] = {}
    values = _read_json(path, text) if path.endswith(".json") else _read_yaml(path, text, lines)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options: write names and values, such as `optim: {{lr: 0.1}}`")
    return OptionFile(path=path, values=cast("dict[str, Any]", values), lines=lines)


def changed(section: Section, values: Mapping[str, Any], file: OptionFile, prefix: str = "") -> Section:
    """Return a dataclass with the values of a file.

    Args:
        section: what the file starts from.
        values: those of this section.
        file: that they are from, for messages.
        prefix: dotted name of the section with a dot at the end; of the whole: nothing.

    Raises:
        ValueError: an unknown name, a value of another type, or one that the dataclass refuses.
    """
    assert dataclasses.is_dataclass(section)
    assert not isinstance(section, type)
    hints = get_type_hints(type(section))
    known = {field.name for field in dataclasses.fields(section)}
    new: dict[str, Any] = {}
    for key, value in values.items():
        name, full = key.replace("-", "_"), f"{prefix}{key}"
        place = file.place(full)
        if name not in known:
            raise ValueError(f"{place}: there is no option {full}{_suggestion(full, section, prefix)}")
        if name in new:
            raise ValueError(f"{place}: {full} is there twice")
        before = getattr(section, name)
        if dataclasses.is_dataclass(before):
            if not isinstance(value, dict):
                raise ValueError(f"{place}: {full} is {value!r}, but must be a section with options of its own")
            new[name] = changed(before, cast("dict[str, Any]", value), file, f"{full}.")
            continue
        try:
            new[name] = fitted(value, hints[name])
        except ValueError as error:
            raise ValueError(f"{place}: {full} is {value!r}, but must be {error}") from None
    try:
        return dataclasses.replace(section, **new)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def fitted(value: object, hint: Any) -> Any:
    """Return a value as a field's type has it: an integer as a float, a list as a tuple.

    Raises:
        ValueError: it has another type; the message is `describe_type` of the field's.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in arguments:
            try:
                return fitted(value, each)
            except ValueError:
                continue
    elif origin is Literal:
        if any(value == each and type(value) is type(each) for each in arguments):
            return value
    elif origin is tuple:
        try:
            return _as_tuple(value, arguments)
        except ValueError:
            pass
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(describe_type(hint))


def _as_tuple(value: object, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    items = cast("Sequence[object]", value) if isinstance(value, list | tuple) else None
    if items is None:
        raise ValueError
    kinds = kinds[:1] * len(items) if kinds[1:] == (...,) else kinds
    return tuple(fitted(item, kind) for item, kind in zip(items, kinds, strict=True))


def describe_type(hint: Any) -> str:
    """Return what a value of this type is, for `must be ...`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin is tuple:
        if arguments[1:] == (...,):
            return f"a list, each {describe_type(arguments[0])}"
        return f"a list of {len(arguments)}, each {describe_type(arguments[0])}"
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def _suggestion(name: str, section: Any, prefix: str) -> str:
    own = [f"{prefix}{each}" for each in _names(section)]
    wanted = name.replace("-", "_")
    last = wanted.rpartition(".")[2]
    near = [each for each in own if each.rpartition(".")[2] == last] or get_close_matches(wanted, own, n=1)
    return f": did you mean {' or '.join(near)}?" if near else ""


def _names(section: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{prefix}{field.name}.")
        yield f"{prefix}{field.name}"


def _read_json(path: str, text: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{path}: {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None


def _read_yaml(path: str, text: str, lines: dict[str, int]) -> object:
    import yaml

    class _Yaml(yaml.SafeLoader):
        """YAML's safe one, for which 1e-4 is a number, as for everyone who writes it."""

    cast("Any", _Yaml).add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )

    def value_of(node: yaml.Node, prefix: str, depth: int) -> object:
        if not isinstance(node, yaml.MappingNode) or depth > _DEEPEST:
            return loader.construct_object(node, deep=True)
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = str(key_node.value)
            if key in found:
                raise ValueError(
                    f"{path}, line {line}: {prefix}{key} is there twice, first in line {lines[prefix + key]}"
                )
            lines[f"{prefix}{key}"] = line
            found[key] = value_of(value_node, f"{prefix}{key}.", depth + 1)
        return found

    loader: Any = _Yaml(text)
    try:
        node = loader.get_single_node()
        return {} if node is None else value_of(node, "", 0)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}, line {mark.line + 1}"
        raise ValueError(f"{place}: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
