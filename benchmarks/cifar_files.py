"""CIFAR-10 from an archive of its images as files, split/class/number.jpg, in folders."""

import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

__all__ = ["unpack_cifar"]


def unpack_cifar(archive: Path, split: str, folder: Path, *, of_class: int | None = None) -> None:
    """Unpack a split into `folder`, by class, unless it is there already.

    Args:
        archive: a tar, compressed or not.
        split: train or test.
        folder: gets its name when all is in it.
        of_class: images of each class, the first ones; None: all.

    Raises:
        ValueError: the archive has no such split.
    """
    if folder.is_dir():
        return
    aside, num = folder.with_name(f"{folder.name}.partial"), Counter[str]()
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if not member.isfile() or split not in name.parts[:-1]:
                continue
            num[name.parts[-2]] += 1
            if of_class is not None and num[name.parts[-2]] > of_class:
                continue
            target = aside / name.parts[-2] / name.name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            target.write_bytes(source.read())
    if not num:
        raise ValueError(f"{archive} has no {split}/: its images lie by split and class")
    aside.rename(folder)
