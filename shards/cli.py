"""Command line of `make-shards`."""

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import tyro

from shards.config import WORK_FOLDER, PackConfig, SourceOptions
from shards.ground.errors import PackError
from shards.ground.option_files import changed, read_option_file, take_option
from shards.ground.options import ending_quietly, parse_words
from shards.ground.units import counted
from shards.storage.addresses import refuse_addresses
from shards.storage.file_kinds import BETON_SUFFIX

__all__ = ["TAKE_ADDRESSES", "PackCommand", "main", "parse_pack"]


@dataclass(frozen=True, kw_only=True)
class PackCommand(PackConfig):
    """Pack images into shards. After an interrupt, the same command continues where it stopped."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE...")]
    """Folders, tar and zip archives, WebDataset shards, Parquet, Arrow, TFRecord or MDS files, lists (.txt, .csv, .tsv,
    .jsonl); local, or s3:// gs:// az:// http(s):// addresses. Recognized: ImageNet's tars, CIFAR, PASCAL VOC, COCO's
    and iNaturalist's .json."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """File of options, YAML or JSON, which those of the command line override."""

    def settings(self) -> dict[str, Any]:
        """Return the options that decide what the shards hold."""
        return {name: value for name, value in super().settings().items() if name != "config"}


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Check that a set of shards is unchanged since it was packed."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder that holds manifest.json, local or s3:// gs:// az:// http(s)://, or a .beton."""
    decode: bool = False
    """Also decode every pixel."""
    workers: int | None = None
    """Worker processes; unset: one per CPU that this process may use."""
    work_folder: str = WORK_FOLDER
    """For a set in a bucket: local folder for the files that are being read."""


@dataclass(frozen=True, kw_only=True)
class IndexCommand:
    """Write index and manifest for WebDataset tars that someone else wrote, without rewriting them.

    For a set that an earlier version packed: note in its manifest what kinds of JPEG it holds.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the tars, local or s3:// gs:// az://."""
    members: tuple[str, ...] = ()
    """Extensions of the members that are samples, where several images have one name, such as `jpg` for 0001.jpg beside
    0001.seg.png; `all`: every image; unset: two images in a sample are refused."""
    workers: int | None = None
    """Worker processes; unset: one per CPU that this process may use."""
    work_folder: str = WORK_FOLDER
    """For a set in a bucket: local folder for the files that are being read."""


@dataclass(frozen=True, kw_only=True)
class InspectCommand:
    """Print what a set of shards holds."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder that holds manifest.json, local or s3:// gs:// az:// http(s)://, or a .beton; several with commas."""
    sheet: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a sheet of pictures to this PNG file."""


@dataclass(frozen=True, kw_only=True)
class StatusCommand:
    """Print how far a packing is, from its files alone: also of one in parts, on a cluster or in a bucket."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """What was given to pack as --out."""
    json: bool = False
    """Print JSON."""
    work_folder: str = WORK_FOLDER
    """For a target in a bucket: the local folder that was given to pack."""


@dataclass(frozen=True, kw_only=True)
class TableCommand:
    """Write what a set of shards holds as one Parquet file, a row for each sample, for analysis."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder that holds manifest.json, local or s3:// gs:// az:// http(s)://; several with commas."""
    file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write; unset: samples.parquet in the folder."""
    workers: int | None = None
    """Worker processes that look at headers, where a shard holds several kinds of JPEG; unset: one per CPU that this
    process may use."""


@dataclass(frozen=True, kw_only=True)
class SummaryCommand:
    """Write a page about a set of shards: sizes, shapes, formats, labels, what was rejected, with pictures."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder that holds manifest.json, local or s3:// gs:// az:// http(s)://."""
    file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The page to write; unset: summary.html in the folder."""
    near_duplicates: bool = False
    """Also look for images that are almost the same, which decodes all of them at an eighth of their size."""
    workers: int | None = None
    """Worker processes for that; unset: one per CPU that this process may use."""


@dataclass(frozen=True, kw_only=True)
class BetonCommand:
    """Write a set of shards as one file in FFCV's format, for the ffcv backend."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder that holds manifest.json."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The file to write; its name ends in .beton."""
    workers: int | None = None
    """Worker processes; unset: one per CPU that this process may use."""


@dataclass(frozen=True, kw_only=True)
class FinishCommand:
    """Write the manifest of a set whose parts (pack --part I/N) are all done."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """The folder that was given as --out."""
    work_folder: str = WORK_FOLDER
    """For a target in a bucket: local folder for the plan."""
    max_rejected: float = 0.05
    """Exit with an error if more than this share of the inputs was rejected."""


def _pack(command: PackCommand) -> int:
    from shards.ground.progress import ProgressBars
    from shards.packing.estimate import estimate
    from shards.packing.pack import pack
    from shards.packing.summary import summarize

    if command.dry_run:
        for line in estimate(command, ProgressBars()).lines(command):
            print(line)
        return 0
    manifests = pack(command, ProgressBars())
    if manifests is None:
        print(f"part {command.part} is done; when all are: make-shards finish {command.out}")
        return 0
    return summarize(command.out, manifests, command.max_rejected)


def _index(command: IndexCommand) -> int:
    from shards.ground.cpus import available_cpus
    from shards.ground.progress import ProgressBars
    from shards.sets.manifest import describe_jpegs
    from shards.sets.shard_folder import ShardFolder
    from shards.storage.file_kinds import TABLE_OF_SHARDS_NAME
    from shards.tools.index import advice, index_folder
    from shards.tools.jpeg_kinds import note_kinds

    workers, work_folder = command.workers or available_cpus(), command.work_folder
    if command.folder.endswith(".beton"):
        raise ValueError(
            f"{command.folder}: a .beton has its index and cannot be changed; to note kinds of JPEG in it, run "
            "`make-shards index SHARDS` on the shards it was made of, and write it again with `make-shards beton`"
        )
    described = ShardFolder(where=command.folder, work_folder=work_folder)
    if described.has_manifest() and described.manifest().num_unknown_jpegs:
        manifest = note_kinds(command.folder, workers=workers, progress=ProgressBars())
        print(f"{command.folder}: {describe_jpegs(manifest)}")
        return 0
    if described.has_manifest() and described.add_table():
        print(f"{command.folder}: wrote {TABLE_OF_SHARDS_NAME}, with which a set of so many shards opens at once")
        return 0
    options = SourceOptions(members=command.members)
    indexed = index_folder(
        command.folder, workers=workers, work_folder=work_folder, options=options, progress=ProgressBars()
    )
    manifest = indexed.manifest
    samples = counted(manifest.num_samples, "sample")
    print(f"{command.folder}: indexed {samples} in {counted(len(manifest.shards), 'tar')}")
    for line in advice(indexed, command.folder):
        print(line)
    if others := described.other_archives():
        count = counted(len(others), "other archive")
        print(
            f"  not indexed: {count}, such as {others[0]}: index reads .tar right in the folder alone; pack reads all"
        )
    return 0


def _inspect(command: InspectCommand) -> int:
    from shards.sets.registry import open_set
    from shards.tools.inspect_set import contact_sheet, describe

    shards = open_set(command.folder)
    for line in describe(shards, where=command.folder):
        print(line)
    if command.sheet is not None:
        contact_sheet(shards).save(command.sheet, format="PNG")
        print(f"pictures: {command.sheet}")
    return 0


def _finish(command: FinishCommand) -> int:
    from shards.packing.finish import finish
    from shards.packing.summary import summarize

    return summarize(command.folder, finish(command.folder, work_folder=command.work_folder), command.max_rejected)


def _status(command: StatusCommand) -> int:
    from shards.tools.status import describe_status, read_status

    status = read_status(command.folder, work_folder=command.work_folder)
    for line in [status.to_json()] if command.json else describe_status(status, command.folder):
        print(line)
    return 0


def _table(command: TableCommand) -> int:
    from shards.ground.cpus import available_cpus
    from shards.ground.progress import ProgressBars
    from shards.tools.table import write_table

    workers = command.workers or available_cpus()
    path, num_samples = write_table(command.folder, command.file, workers=workers, progress=ProgressBars())
    print(f"{path}: {counted(num_samples, 'row')}")
    return 0


def _summary(command: SummaryCommand) -> int:
    from shards.ground.cpus import available_cpus
    from shards.ground.progress import ProgressBars
    from shards.tools.summary import write_summary

    path = write_summary(
        command.folder,
        command.file,
        with_near_duplicates=command.near_duplicates,
        workers=command.workers or available_cpus(),
        progress=ProgressBars(),
    )
    print(path)
    return 0


def _beton(command: BetonCommand) -> int:
    from shards.ground.cpus import available_cpus
    from shards.ground.progress import ProgressBars
    from shards.ground.units import format_bytes
    from shards.tools.beton import write_beton

    written = write_beton(
        command.folder, command.out, workers=command.workers or available_cpus(), progress=ProgressBars()
    )
    size = format_bytes(written.layout.num_bytes)
    print(f"{command.out}: {counted(written.num_samples, 'sample')} in {size}, read back and right")
    return 0


def _verify(command: VerifyCommand) -> int:
    from shards.ground.cpus import available_cpus
    from shards.ground.progress import ProgressBars
    from shards.tools.verify import verify

    if command.folder.endswith(BETON_SUFFIX):
        from shards.tools.beton import verify_beton

        problems = verify_beton(
            command.folder,
            decode=command.decode,
            workers=command.workers or available_cpus(),
            progress=ProgressBars(),
        )
    else:
        problems = verify(
            command.folder,
            decode=command.decode,
            workers=command.workers or available_cpus(),
            work_folder=command.work_folder,
            progress=ProgressBars(),
        )
    for problem in problems:
        print(problem)
    print(f"{command.folder}: {counted(len(problems), 'problem') if problems else 'everything is as it was packed'}")
    return 1 if problems else 0


_ACTIONS: dict[type, Callable[[Any], int]] = {
    PackCommand: _pack,
    VerifyCommand: _verify,
    FinishCommand: _finish,
    IndexCommand: _index,
    InspectCommand: _inspect,
    StatusCommand: _status,
    TableCommand: _table,
    SummaryCommand: _summary,
    BetonCommand: _beton,
}

TAKE_ADDRESSES = frozenset(
    {
        *(f"PackCommand.{name}" for name in ("sources", "out", "image_root", "ray_address")),
        *(
            f"{name}Command.folder"
            for name in ("Verify", "Index", "Inspect", "Status", "Table", "Summary", "Beton", "Finish")
        ),
    }
)
"""Options that take addresses."""

_Commands = (
    Annotated[PackCommand, tyro.conf.subcommand("pack")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[FinishCommand, tyro.conf.subcommand("finish")]
    | Annotated[IndexCommand, tyro.conf.subcommand("index")]
    | Annotated[InspectCommand, tyro.conf.subcommand("inspect")]
    | Annotated[StatusCommand, tyro.conf.subcommand("status")]
    | Annotated[TableCommand, tyro.conf.subcommand("table")]
    | Annotated[SummaryCommand, tyro.conf.subcommand("summary")]
    | Annotated[BetonCommand, tyro.conf.subcommand("beton")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `make-shards` and return the exit status.

    0: done. 1: packing or verification failed. 2: the command cannot work as given. 3: more than --max-rejected of the
    inputs were rejected. 130: interrupted.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    return ending_quietly(lambda: _run(words))


def _with_file(words: Sequence[str]) -> tuple[list[str], Any]:
    """Return a command line without `pack --config FILE`, and what the file says of the options."""
    if words[:1] != ["pack"]:
        return list(words), tyro.MISSING_NONPROP
    rest, path = take_option(words)
    if path is None:
        return rest, tyro.MISSING_NONPROP
    file = read_option_file(path)
    # In the options that a run of the packer has: the file cannot name another.
    values = changed(PackConfig(sources=tyro.MISSING, out=tyro.MISSING), file.values, file)
    return rest, PackCommand(**vars(values))


def parse_pack(words: Sequence[str]) -> PackCommand:
    """Read what is given to `make-shards pack`, without doing it.

    Raises:
        SystemExit: 2 when an option is wrong (the message is on stderr), 0 after `--help`.
        ValueError: the options cannot work together, or the file of options is wrong.
    """
    return _parse(["pack", *words])


def _parse(words: Sequence[str]) -> Any:
    words, default = _with_file(words)
    command: Any = parse_words(
        _Commands,
        words,
        prog="make-shards",
        default=default,
        description="Images in, shards out: what MoCo training reads. `make-shards --version` prints the version.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    refuse_addresses(command, taken_by=TAKE_ADDRESSES)
    return command


def _run(words: Sequence[str]) -> int:
    if words == ["--version"]:
        print(f"make-shards {version('moco-fast')}")
        return 0
    command: Any = None
    try:
        command = _parse(words)
        return _ACTIONS[type(command)](command)
    except PackError as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(_said_of_system(error, command), 1)
    except KeyboardInterrupt:
        return _fail("interrupted: finished shards are kept; run the same command to continue", 130)


_CANNOT_WRITE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOSPC, errno.EDQUOT})


def _said_of_system(error: OSError, command: Any) -> str:
    """Return what to say of an error of the system: where, what is kept, and the way out."""
    # Writing to a full disk names no file.
    where = error.filename or getattr(command, "out", None)
    said = f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    if isinstance(command, PackCommand | FinishCommand):
        said += ": finished shards are kept; fix this and run the same command again"
    elif getattr(command, "file", "") is None and error.errno in _CANNOT_WRITE:
        said += ": say with --file where to write"
    return said


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
