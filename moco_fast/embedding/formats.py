"""Formats of written embeddings: parts on disk, and what they are put together to when all are there.

    x.parquet        index, key, source, label, class_name, vector (fixed-size list); its metadata hold the header
    x/               a folder of part-*.parquet with the same columns, damaged.jsonl and embeddings.json, the header
    x.npy            (N, D) alone; x.npy.csv beside it has the other columns, x.npy.json the header
    x.safetensors    values (N, D), label (N,), index (N,); files beside it as beside .npy

Files beside another are written first: where x.npy is, all of it is there.
"""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from moco_fast.embedding.stream import Rows
from shards.ground.files import appearing, publish, remove, write_whole

__all__ = [
    "COLUMNS",
    "HEADER_KEY",
    "HEADER_NAME",
    "EmbeddingFormat",
    "damaged_beside",
    "format_of",
    "header_beside",
    "names_beside",
    "needs_pyarrow",
]

HEADER_KEY = b"moco_fast"
"""Of the header in a Parquet file's metadata."""
HEADER_NAME = "embeddings.json"
"""Of the header in a folder."""

COLUMNS = ("index", "key", "source", "label", "class_name")
"""Beside the vectors."""
_KEY_DIGITS = 12  # As in the shards.
_GROUP_BYTES = 16 << 20  # of vectors in a row group, the least that a reader of Parquet has to hold


class EmbeddingFormat(Protocol):
    """How parts are written and put together."""

    def write_part(self, stem: Path, rows: Rows, class_names: Sequence[str]) -> None:
        """Write the files of a part, `stem` with endings of the format's own."""
        ...

    def finish(self, stems: Sequence[Path], out: Path, header: dict[str, Any], damaged: Iterable[str]) -> None:
        """Put parts together under their final name, complete or not at all.

        Args:
            stems: of all parts, in their order.
            out: file or folder to write.
            header: what the embeddings are.
            damaged: a line of JSON for each sample that has no vector.
        """
        ...


def format_of(out: Path) -> EmbeddingFormat:
    """Choose a format by the ending of a name. Raises ValueError: there is none, or a package for it is missing."""
    if out.suffix in (".npy", ".safetensors"):
        return _Arrays()
    if out.suffix not in (".parquet", ""):
        raise ValueError(
            f"--out {out}: {out.suffix} is not known; end the name with .parquet, .npy or .safetensors, or give a name "
            "without an ending for a folder of Parquet files"
        )
    needs_pyarrow(f"--out {out}")
    return _ParquetFile() if out.suffix else _ParquetFolder()


def needs_pyarrow(what: str) -> None:
    """Refuse to go on without pyarrow. Raises ValueError: with what is to be installed."""
    if find_spec("pyarrow") is None:
        raise ValueError(
            f"{what} needs pyarrow: pip install 'moco-fast[parquet]', or use embeddings in .npy or .safetensors"
        )


def names_beside(out: Path) -> Path:
    """Return where the columns beside a file of arrays are."""
    return out.with_name(f"{out.name}.csv")


def header_beside(out: Path) -> Path:
    """Return where the header of a file of arrays is."""
    return out.with_name(f"{out.name}.json")


def damaged_beside(out: Path) -> Path:
    """Return where images without a vector are listed, if there are any."""
    return out.with_name(f"{out.name}.damaged.jsonl") if out.suffix else out / "damaged.jsonl"


def _table(rows: Rows, class_names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns beside the vectors; None where something is not known."""
    labels = rows.labels.tolist()
    return {
        "index": rows.index.tolist(),
        "key": [f"{key:0{_KEY_DIGITS}d}" for key in rows.keys.tolist()],
        "source": list(rows.sources),
        "label": [None if label < 0 else label for label in labels],
        "class_name": [class_names[label] if 0 <= label < len(class_names) else None for label in labels],
    }


def _write_damaged(out: Path, damaged: Iterable[str]) -> None:
    """Write the list of damaged samples, or remove an older one where there is none."""
    lines = iter(damaged)
    first = next(lines, None)
    if first is None:
        remove(out)
        return
    with appearing(out, durable=True) as aside, aside.open("w") as file:
        file.write(first)
        file.writelines(lines)


class _Parquet:
    """Parts in Parquet. Vectors are stored as they are: they hardly shrink, and readers can map them."""

    def write_part(self, stem: Path, rows: Rows, class_names: Sequence[str]) -> None:
        pa = _pyarrow()
        dim = rows.values.shape[1]
        schema = self._schema(dim, rows.values.dtype)
        numbers = pa.array(rows.values.reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(numbers, dim).cast(schema.field("vector").type)
        table = pa.table({**_table(rows, class_names), "vector": vectors}, schema=schema)
        with (
            appearing(stem.with_suffix(".parquet"), durable=True) as aside,
            self._writer(aside, schema) as writer,
        ):
            writer.write_table(table, row_group_size=max(1, _GROUP_BYTES // max(1, rows.values[:1].nbytes)))

    @staticmethod
    def _schema(dim: int, dtype: Any) -> Any:
        pa = _pyarrow()
        element = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        return pa.schema(
            [
                pa.field("index", pa.int64(), nullable=False),
                pa.field("key", pa.string(), nullable=False),
                pa.field("source", pa.string()),
                pa.field("label", pa.int64()),
                pa.field("class_name", pa.string()),
                pa.field("vector", pa.list_(element, dim), nullable=False),
            ]
        )

    @staticmethod
    def _writer(path: Path, schema: Any) -> Any:
        import pyarrow.parquet as pq

        # Its own hints leave out what these options may be, too.
        writer: Any = pq.ParquetWriter
        return writer(
            path,
            schema,
            compression={**dict.fromkeys(COLUMNS, "zstd"), "vector.list.element": "none"},
            use_dictionary=["class_name"],
            write_statistics=["index", "label"],
        )


class _ParquetFile(_Parquet):
    def finish(self, stems: Sequence[Path], out: Path, header: dict[str, Any], damaged: Iterable[str]) -> None:
        import pyarrow.parquet as pq

        _write_damaged(damaged_beside(out), damaged)
        schema = self._schema(header["dim"], np.dtype(header["settings"]["dtype"]))
        with (
            appearing(out, durable=True) as aside,
            self._writer(aside, schema.with_metadata({HEADER_KEY: json.dumps(header)})) as writer,
        ):
            for stem in stems:
                with pq.ParquetFile(stem.with_suffix(".parquet")) as part:
                    for group in range(part.num_row_groups):
                        writer.write_table(part.read_row_group(group))


class _ParquetFolder(_Parquet):
    def finish(self, stems: Sequence[Path], out: Path, header: dict[str, Any], damaged: Iterable[str]) -> None:
        [folder] = {stem.parent for stem in stems}
        _write_damaged(folder / "damaged.jsonl", damaged)
        write_whole(folder / HEADER_NAME, json.dumps(header, indent=1), durable=True)
        publish([(folder, out)])


_ARRAYS = ("values", "label", "index")


class _Arrays:
    """Parts as bare arrays, whose bytes are put one behind the other."""

    def write_part(self, stem: Path, rows: Rows, class_names: Sequence[str]) -> None:
        arrays = {"values": rows.values, "label": rows.labels, "index": rows.index}
        for name, array in arrays.items():
            content = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            write_whole(stem.with_suffix(f".{name}"), content.tobytes(), durable=True)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(zip(*_table(rows, class_names).values(), strict=True))
        write_whole(stem.with_suffix(".csv"), text.getvalue(), durable=True)

    def finish(self, stems: Sequence[Path], out: Path, header: dict[str, Any], damaged: Iterable[str]) -> None:
        _write_damaged(damaged_beside(out), damaged)
        with appearing(names_beside(out), durable=True) as aside, aside.open("wb") as file:
            file.write(f"{','.join(COLUMNS)}\n".encode())
            _append(file, stems, ".csv")
        write_whole(header_beside(out), json.dumps(header, indent=1), durable=True)
        with appearing(out, durable=True) as aside, aside.open("wb") as file:
            if out.suffix == ".npy":
                np.lib.format.write_array_header_1_0(file, _npy_header(header))
                _append(file, stems, ".values")
            else:
                file.write(_safetensors_header(header))
                for name in _ARRAYS:
                    _append(file, stems, f".{name}")


def _append(file: IO[bytes], stems: Sequence[Path], suffix: str) -> None:
    for stem in stems:
        with stem.with_suffix(suffix).open("rb") as part:
            shutil.copyfileobj(part, file, 8 << 20)


def _npy_header(header: dict[str, Any]) -> dict[str, Any]:
    dtype = np.dtype(header["settings"]["dtype"]).newbyteorder("<")
    return {"descr": dtype.str, "fortran_order": False, "shape": (header["num_rows"], header["dim"])}


def _safetensors_header(header: dict[str, Any]) -> bytes:
    """Return the bytes before the tensors: the length of some JSON, and the JSON (safetensors' README)."""
    rows, end = header["num_rows"], 0
    types = {"float32": ("F32", 4), "float16": ("F16", 2)}
    tensors = {
        "values": (*types[header["settings"]["dtype"]], (rows, header["dim"])),
        "label": ("I64", 8, (rows,)),
        "index": ("I64", 8, (rows,)),
    }
    entries: dict[str, Any] = {"__metadata__": {HEADER_KEY.decode(): json.dumps(header)}}
    for name, (dtype, size, shape) in tensors.items():
        begin, end = end, end + size * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pyarrow() -> Any:
    import pyarrow

    return pyarrow
