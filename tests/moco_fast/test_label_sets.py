"""Sets of labels, from PASCAL VOC's own files to the SVM's figures; other tasks refuse them."""

from pathlib import Path

import numpy as np
import pytest

import moco_fast
from moco_fast.cli import main
from shards.config import PackConfig
from shards.packing.pack import pack
from tests.shards.benchmark_files import VOC_CLASSES, tar_of, voc_files
from tests.shards.pictures import encoded, picture


def pack_voc(folder: Path, part: str, count: int, seed: int) -> str:
    """Pictures that are bright for an aeroplane and wide for a cat; anything may hold a person."""
    rng = np.random.default_rng(seed)
    signs = {f"{i:06d}": tuple(int(s) for s in rng.choice([-1, 1], 3)) for i in range(count)}
    signs["000000"] = (0, 1, 1)  # a difficult aeroplane
    files = voc_files({part: list(signs)}, signs)
    for i, (name, sign) in enumerate(signs.items()):
        image = picture(seed + i, 40, 40).point(lambda value, bright=sign[0] > 0: value if bright else value // 4)
        files[f"VOCdevkit/VOC2007/JPEGImages/{name}.jpg"] = encoded(image, "JPEG")
    (folder / f"VOC{'test' if part == 'test' else 'trainval'}_x.tar").write_bytes(tar_of(files))
    source = str(folder / f"VOC{'test' if part == 'test' else 'trainval'}_x.tar")
    pack(PackConfig(sources=(source,), out=str(folder / part), workers=1))
    return str(folder / part)


def test_voc_s_own_tars_become_the_svm_s_figures_and_other_tasks_refuse_them(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train, test = pack_voc(tmp_path, "trainval", 60, seed=0), pack_voc(tmp_path, "test", 30, seed=500)
    settings = {"protocol": "voc07", "costs": (0.1, 1.0), "shots": (1, 4), "num_draws": 2}
    result = moco_fast.evaluate("svm", finished_run, train=train, test=test, settings=settings)
    assert set(result.figures) == {"map", "map_1_shot", "map_4_shot"}
    assert 0.5 < result.figures["map"].value < 1
    assert result.facts == {"num_train": 60, "num_test": 30}
    assert (result.data["train"]["num_classes"], len(VOC_CLASSES)) == (3, 3)
    with pytest.raises(
        ValueError, match="has a set of classes for each sample, where knn needs one class: such sets are"
    ):
        moco_fast.evaluate("knn", finished_run, train=train, test=test)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(train)
    (tmp_path / "data" / "test").symlink_to(test)
    words = ["eval", "suite", "--encoder", str(finished_run), "--device", "cpu", "--data", str(tmp_path / "data")]
    assert main([*words, "--out", "-"]) == 0
    said = capsys.readouterr()
    assert "left out: linear of" in said.err
    assert '"task": "svm"' in said.out
    assert '"task": "health"' in said.out
    assert '"task": "linear"' not in said.out
