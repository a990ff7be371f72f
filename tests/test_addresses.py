"""No option of any command takes an address for a path: it is refused, or meant."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast import cli, commandline
from moco_fast.config import Config
from moco_fast.presets import PRESETS
from shards import cli as shards_cli
from shards.storage.addresses import refuse_addresses

TAKE = commandline.TAKE_ADDRESSES | shards_cli.TAKE_ADDRESSES


def dataclasses_in(kind: Any) -> Iterator[type]:
    """Yield the dataclasses that a union of commands, or the type of a field, is made of."""
    bare = get_origin(kind) or kind
    if isinstance(bare, type) and dataclasses.is_dataclass(bare):
        yield bare
    for each in get_args(kind):
        yield from dataclasses_in(each)


def holds_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is not Literal and any(holds_text(each) for each in get_args(kind)))


def options() -> dict[str, tuple[type, str, Any]]:
    """Return every option of every command that text is given to, as `Class.field`."""
    waiting = [
        *dataclasses_in(cli._Commands),
        *dataclasses_in(shards_cli._Commands),
        Config,
        *(type(config.method) for _, config in PRESETS.values()),
    ]
    found, seen = {}, set()
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        names = {"Any": Any, "T": Any} | vars(typing)
        kinds = typing.get_type_hints(cls, localns=names, include_extras=True)
        for field in dataclasses.fields(cls):
            waiting += dataclasses_in(kinds[field.name])
            if holds_text(kinds[field.name]):
                found[f"{cls.__name__}.{field.name}"] = (cls, field.name, kinds[field.name])
    return found


OPTIONS = options()


def made(cls: type, name: str, value: Any) -> Any:
    """Return an object with one option set, and no other."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(made, field.name, value if field.name == name else None)
    return made


def test_the_options_are_all_there() -> None:
    assert len(OPTIONS) > 60
    assert {"RunConfig.out", "PackCommand.sources", "EvalTask.train", "Finetune.labels_file", "Export.out"} <= set(
        OPTIONS
    )
    assert set(OPTIONS) >= TAKE


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_an_address_is_refused_by_what_does_not_take_it(option: str) -> None:
    cls, name, kind = OPTIONS[option]
    for address in ("s3://bucket/x", "gs://bucket/x.parquet", "https://host/x", "S3://bucket/x", "file:///x"):
        value = (address,) if "tuple" in str(kind) else address
        if option in TAKE:
            refuse_addresses(made(cls, name, value), taken_by=TAKE)
            continue
        with pytest.raises(ValueError, match=f"{name.replace('_', '-')} {address} is an address"):
            refuse_addresses(made(cls, name, value), taken_by=TAKE)
    refuse_addresses(made(cls, name, "runs/first"), taken_by=TAKE)


@given(st.text())
def test_what_is_not_an_address_is_left_alone(text: str) -> None:
    options = dataclasses.replace(PRESETS["demo"][1].run, out=text)
    if "://" not in text:
        refuse_addresses(options, taken_by=())


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", "demo", "--data.shards", "{set}", "--run.out", "s3://b/r"], "--run.out s3://b/r"),
        (["export", "{set}", "--out", "s3://b/r"], "--out s3://b/r"),
        (["eval", "knn", "--encoder", "s3://b/r"], "--encoder s3://b/r"),
        (["report", "gs://b/r"], "gs://b/r"),
        (["bench", "demo", "--data.shards", "{set}", "--data.cache", "s3://b/r"], "--data.cache s3://b/r"),
    ],
)
def test_commands_refuse_and_leave_no_folder(
    words: list[str],
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([word.format(set=tmp_path) for word in words]) == 2
    assert f"{option} is an address, which this option does not take: give a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_make_shards_refuses_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shards_cli.main(["pack", "images", "--out", "set", "--work-folder", "s3://b/w"]) == 2
    assert "--work-folder s3://b/w is an address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_a_bucket_is_told_of_the_mirror(tmp_path: Path) -> None:
    config = PRESETS["demo"][1]
    data = dataclasses.replace(config.data, shards=str(tmp_path))
    config = dataclasses.replace(config, data=data, run=dataclasses.replace(config.run, out="s3://bucket/run"))
    with pytest.raises(ValueError, match=r"give a folder on this machine, and the address as --checkpoint\.mirror"):
        commandline.check(config, PRESETS["demo"][1])
    with pytest.raises(ValueError, match=r"--checkpoint\.mirror runs/x is not the address of a bucket"):
        commandline.check_mirror("runs/x")
    with pytest.raises(ValueError, match="leave user, password and query out"):
        commandline.check_mirror("s3://user:secret@bucket/x")
