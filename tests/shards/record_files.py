"""TFRecord files and MDS shards for tests, written by other code than ours where there is some."""

import json
import zlib
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter

_FIELD = descriptor_pb2.FieldDescriptorProto


def _example_class():
    """tf.train.Example by protobuf, as tensorflow/core/example/{example,feature}.proto declare it."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name, *fields, parent=None):
        made = (parent.nested_type if parent is not None else file.message_type).add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            added = made.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = _FIELD.TYPE_MESSAGE, f".t.{kind}"
            else:
                added.type = kind
        return made

    message("BytesList", ("value", _FIELD.TYPE_BYTES, True))
    message("FloatList", ("value", _FIELD.TYPE_FLOAT, True))
    message("Int64List", ("value", _FIELD.TYPE_INT64, True))
    lists = (("bytes_list", "BytesList", False), ("float_list", "FloatList", False), ("int64_list", "Int64List", False))
    message("Feature", *lists)
    features = message("Features", ("feature", "Features.FeatureEntry", True))
    entry = message("FeatureEntry", ("key", _FIELD.TYPE_STRING, False), ("value", "Feature", False), parent=features)
    entry.options.map_entry = True
    message("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _example_class()


def example(**values: object) -> bytes:
    """A serialized tf.train.Example; `__` in names stands for a slash, a list for several values."""
    made = Example()
    for name, value in values.items():
        several = value if isinstance(value, list) else [value]
        feature = made.features.feature[name.replace("__", "/")]
        if isinstance(several[0], bytes):
            feature.bytes_list.value.extend(several)
        elif isinstance(several[0], float):
            feature.float_list.value.extend(several)
        else:
            feature.int64_list.value.extend(several)
    return made.SerializeToString()


def tfrecord(path: Path, messages: list[bytes]) -> Path:
    """Write a TFRecord file by TensorBoard's writer."""
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for message in messages:
            writer.write(message)
    return path


def mds(path: Path, encodings: dict[str, str], samples: list[dict[str, bytes]], compress=None) -> Path:
    """Write an MDS shard as mosaicml/streaming does (89e7bb9, streaming/base/format/mds/writer.py), and index.json."""
    sizes = {"int": 8, "uint16": 2, "float32": 4}
    names = sorted(encodings)
    config = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": 1 << 26,
        "column_names": names,
        "column_encodings": [encodings[name] for name in names],
        "column_sizes": [sizes.get(encodings[name]) for name in names],
    }
    text = json.dumps(config, sort_keys=True).encode()
    encoded = []
    for sample in samples:
        head = [len(sample[name]) for name in names if encodings[name] not in sizes]
        encoded.append(np.array(head, np.uint32).tobytes() + b"".join(sample[name] for name in names))
    offsets = np.array([0, *map(len, encoded)]).cumsum().astype(np.uint32)
    offsets += 4 + offsets.nbytes + len(text)
    data = np.uint32(len(samples)).tobytes() + offsets.tobytes() + text + b"".join(encoded)
    path.write_bytes(compress(data) if compress else data)
    shard = {"raw_data": {"basename": path.name, "bytes": len(data), "hashes": {"crc32": zlib.crc32(data)}}}
    (path.parent / "index.json").write_text(json.dumps({"version": 2, "shards": [config | shard]}))
    return path
