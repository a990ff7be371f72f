"""Command lines made of dataclasses: the words that stand for values, help in whole lines, an end without a reader."""

import dataclasses
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

__all__ = ["ending_quietly", "parse_words", "word_for"]

_UNITS = {
    "batch_size": "SAMPLES",
    "bytes": "BYTES",
    "cache": "FOLDER",
    "column": "COLUMN",
    "crop": "SHARE",
    "epochs": "EPOCHS",
    "file": "FILE",
    "folder": "FOLDER",
    "fraction": "SHARE",
    "gib": "GIB",
    "images": "IMAGES",
    "lr": "RATE",
    "milestones": "SHARE",
    "out": "FOLDER",
    "p": "PROBABILITY",
    "pixels": "PIXELS",
    "ratio": "MIN MAX",
    "root": "FOLDER",
    "s": "SECONDS",
    "samples": "SAMPLES",
    "scale": "MIN MAX",
    "seconds": "SECONDS",
    "seed": "SEED",
    "share": "SHARE",
    "sigma": "MIN MAX",
    "size": "PIXELS",
    "step_size": "SHARE",
    "steps": "STEPS",
    "threads": "THREADS",
    "workers": "PROCESSES",
}
"""Name of a field, or its end after an underscore -> what a value is. The longest that fits counts."""

_NUMBERS: dict[Any, str] = {int: "N", float: "NUMBER"}


def parse_words(
    form: Any,
    words: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    config: Sequence[Any] = (),
    default: Any = tyro.MISSING_NONPROP,
    console_outputs: bool = True,
) -> Any:
    """Parse a command line into a dataclass, or one of a union of them, as `tyro.cli` does.

    Args:
        form: the dataclass, or the union.
        words: of the command line.
        prog: what the command is called in its help.
        description: what the help begins with; None: the docstring of `form`.
        config: markers of tyro's for all fields.
        default: an instance whose values are the defaults.
        console_outputs: print help and errors.

    Raises:
        SystemExit: 2 when an option is wrong (the message is on stderr), 0 after `--help`.
        ValueError: the dataclass refuses its values.
    """
    return tyro.cli(
        form,
        prog=prog,
        description=description,
        args=words,
        default=default,
        config=config,
        console_outputs=console_outputs,
        registry=_registry(),
    )


def word_for(name: str, hint: Any, metadata: Any = None) -> str | None:
    """Return the word that stands for a field's value in usage and help; None: the parser's own will do.

    Args:
        name: of the field.
        hint: its type, without `Annotated`.
        metadata: the field's; its `metavar` comes first.
    """
    if metadata and "metavar" in metadata:
        return metadata["metavar"]
    if get_origin(hint) in (Union, UnionType):
        kinds = [each for each in get_args(hint) if each is not NoneType]
        return word_for(name, kinds[0]) if len(kinds) == 1 else None
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        word = word_for(name, first)
        if word is None or " " in word:
            return word
        return f"{word}..." if rest == [...] else " ".join([word] * (1 + len(rest)))
    if hint not in (str, int, float):
        return None
    fits = [end for end in _UNITS if name == end or name.endswith(f"_{end}")]
    if fits:
        return _UNITS[max(fits, key=len)]
    return _NUMBERS.get(hint, name.upper().replace("_", "-"))


def ending_quietly(command: Callable[[], int]) -> int:
    """Run a command; where the reader of its output has gone, as `head` does, end as SIGPIPE would end it.

    Returns:
        the command's exit code, or 128 + SIGPIPE.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # What is still in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _reader_has_gone() -> bool:
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def _registry() -> ConstructorRegistry:
    """Return a registry with a rule for dataclasses: tyro's own, with our words and with help in whole lines."""
    registry = ConstructorRegistry()
    is_asking = False

    @registry.struct_rule
    def _(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_asking
        form: Any = vars(info)["type"]  # whose type is partly unknown
        if is_asking or not dataclasses.is_dataclass(form):
            return None
        is_asking = True  # tyro's own rule comes next.
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            is_asking = False
        if not isinstance(spec, StructConstructorSpec):
            return cast("None", spec)
        metadata = {field.name: field.metadata for field in dataclasses.fields(form)}
        fields = tuple(_in_our_words(field, metadata[field.name]) for field in spec.fields)
        return dataclasses.replace(spec, fields=fields)

    return registry


def _in_our_words(field: StructFieldSpec, metadata: Any) -> StructFieldSpec:
    whole: Any = vars(field)["type"]
    hint, *notes = get_args(whole) if get_origin(whole) is Annotated else (whole,)
    word = None if any(getattr(note, "metavar", None) for note in notes) else word_for(field.name, hint, metadata)
    changes: dict[str, Any] = {"helptext": _in_whole_lines(field.helptext)}
    if word is not None:
        changes["type"] = Annotated[whole, tyro.conf.arg(metavar=word)]
    return dataclasses.replace(field, **changes)


def _in_whole_lines(text: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """Return help without the ends of lines of its source, of which tyro would keep some; it is read when needed."""

    def joined() -> str | None:
        found = text() if callable(text) else text
        return None if found is None else "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", found))

    return joined
