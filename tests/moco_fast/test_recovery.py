"""Damaged checkpoints: told apart from whole ones, and passed over for the newest whole one."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.recovery import candidates, find_whole, read_state, seems_whole, set_aside, verify

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
STEPS = (5, 10, 20)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


@pytest.fixture(scope="module")
def saved() -> Generator[Path]:
    """Three whole checkpoints, which tests copy; in a folder that any user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for step in STEPS:
        tensors = {"query.weight": torch.full((3, 2), float(step))}
        state = Checkpoint(step=step, config={"seed": 1}, model=tensors, optimizer=tensors, rng=tensors)
        checkpoint.save(folder / "saved", state, keep=9)
    yield folder
    shutil.rmtree(folder)


def truncate(path: Path, file: str, place: float) -> None:
    os.truncate(path / file, int(place * ((path / file).stat().st_size - 1)))


def flip(path: Path, file: str, place: float) -> None:
    content = bytearray((path / file).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (path / file).write_bytes(content)


def fill_with_zeros(path: Path, file: str, place: float) -> None:
    size = (path / file).stat().st_size
    with (path / file).open("r+b") as opened:
        opened.seek(int(place * (size - 1)))
        opened.write(bytes(size - opened.tell()))


def leave_out(path: Path, file: str, place: float) -> None:
    (path / file).unlink()


def link_to_nothing(path: Path, file: str, place: float) -> None:
    (path / file).unlink()
    (path / file).symlink_to("nothing")


def link_in_a_circle(path: Path, file: str, place: float) -> None:
    (path / file).unlink()
    (path / file).symlink_to(file)


def make_a_folder_of(path: Path, file: str, place: float) -> None:
    (path / file).unlink()
    (path / file).mkdir()


def take_from_another(path: Path, file: str, place: float) -> None:
    shutil.copy(path.with_name(name_of(10)) / file, path / file)


def empty(path: Path, file: str, place: float) -> None:
    shutil.rmtree(path)
    path.mkdir()


def replace_by_a_copy(path: Path, file: str, place: float) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name(name_of(10)), path)


def replace_by_a_link_to_another(path: Path, file: str, place: float) -> None:
    shutil.rmtree(path)
    path.symlink_to(name_of(10))


def replace_by_a_link_to_nothing(path: Path, file: str, place: float) -> None:
    shutil.rmtree(path)
    path.symlink_to("nothing")


def replace_by_a_file(path: Path, file: str, place: float) -> None:
    shutil.rmtree(path)
    path.touch()


def write_something_else(path: Path, file: str, place: float) -> None:
    for content in ("[]", "{}", '{"version": 1}', "null", '"step"', "[" * 5000):
        (path / file).write_text(content)


DAMAGES = (
    truncate,
    flip,
    fill_with_zeros,
    leave_out,
    link_to_nothing,
    link_in_a_circle,
    make_a_folder_of,
    take_from_another,
    empty,
    replace_by_a_copy,
    replace_by_a_link_to_another,
    replace_by_a_link_to_nothing,
    replace_by_a_file,
    write_something_else,
)


@given(
    damage=st.sampled_from(DAMAGES),
    file=st.sampled_from(FILES),
    place=st.floats(0, 1),
    steps=st.sets(st.sampled_from((5, 20))),
)
def test_whatever_was_done_to_a_checkpoint_the_newest_whole_one_is_found(
    saved: Path, damage: Callable[[Path, str, float], None], file: str, place: float, steps: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        shutil.copytree(saved / "saved", folder)
        before = {step: (folder / name_of(step) / file).read_bytes() for step in STEPS}
        for step in sorted(steps):
            damage(folder / name_of(step), file, place)
        # Zeros over zeros, or the same generator states: nothing has changed.
        harmless = {
            step
            for step in steps
            if (folder / name_of(step)).resolve().name == name_of(step)
            and (folder / name_of(step) / file).is_file()
            and (folder / name_of(step) / file).read_bytes() == before[step]
            and damage is not replace_by_a_copy
        }
        found = find_whole(folder)
        expected = max({*STEPS} - (steps - harmless))
        assert found.newest == folder / name_of(expected)
        assert [path.name for path, _ in found.damaged] == [name_of(20)] * (expected != 20)
        told = f"; going on from {name_of(expected)}"
        assert [str(folder / name_of(20)) in each and each.endswith(told) for each in found.warnings] == (
            [True] * len(found.damaged)
        )
        assert checkpoint.load(found.newest).step == expected
        for path, _ in found.damaged:
            set_aside(path)
        assert find_whole(folder).damaged == ()
        assert checkpoint.find_newest(folder) == found.newest


def test_what_only_looks_like_a_checkpoint_is_none(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "saved", folder)
    newest = folder / name_of(20)
    for name in (f"{newest.name} (copy)", f"{newest.name}.bak", "step-x", ".step-00000030.partial", "best"):
        shutil.copytree(newest, folder / name)
    assert [path.name for path in candidates(folder)] == [name_of(step) for step in STEPS]
    assert find_whole(folder).newest == checkpoint.find_newest(folder) == newest
    # A checkpoint has any name where it lies alone.
    shutil.copytree(newest, tmp_path / "kept")
    assert verify(tmp_path / "kept")["step"] == 20


def test_a_state_of_format_1_stays_readable(tmp_path: Path) -> None:
    # As the first version wrote it; the digest is of the keys in their order, whatever order the file has.
    state = {"step": 3, "version": 1, "numbers": {}, "files": {}, "config": {"run": {"seed": 1}}}
    (tmp_path / "state.json").write_text(json.dumps(state | {"digest": "2aeed60c152809e813f77362db62b7b7"}))
    assert read_state(tmp_path) == state


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match=r"checkpoints cannot be read \(Not a directory\): make it readable"):
        candidates(tmp_path / "checkpoints")


def test_none_whole_is_refused_and_none_at_all_is_a_beginning(saved: Path, tmp_path: Path) -> None:
    assert find_whole(tmp_path / "nothing").newest is None
    shutil.copytree(saved / "saved", tmp_path / "checkpoints")
    for path in candidates(tmp_path / "checkpoints"):
        flip(path, "model.safetensors", 1)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(.*step-00000020/model\.safetensors is not"):
        find_whole(tmp_path / "checkpoints")


def test_a_look_finds_what_is_missing_but_not_a_flipped_bit(saved: Path, tmp_path: Path) -> None:
    path = shutil.copytree(saved / "saved" / name_of(20), tmp_path / name_of(20))
    flip(path, "model.safetensors", 1)
    assert seems_whole(path)
    truncate(path, "model.safetensors", 0.9)
    assert not seems_whole(path)


def test_a_checkpoint_of_someone_else_is_passed_over(saved: Path) -> None:
    """Root may read everything, so the test reads as another user where it is root."""
    folder = shutil.copytree(saved / "saved", saved / "forbidden")
    for path in folder.rglob("*"):
        path.chmod(0o755)
    user = os.geteuid()
    for file, newest in (("model.safetensors", 20), ("", 10)):
        (folder / name_of(newest) / file).chmod(0)
    os.seteuid(user or 65534)
    try:
        found = find_whole(folder)
    finally:
        os.seteuid(user)
    for newest in (20, 10):
        (folder / name_of(newest)).chmod(0o755)
    assert found.newest == folder / name_of(5)
    assert [reason.endswith("cannot be read (Permission denied)") for _, reason in found.damaged] == [True, True]


def test_an_encoder_comes_from_the_newest_whole_checkpoint(own_run: Path) -> None:
    run = own_run
    whole = run / "checkpoints" / name_of(40)
    state = checkpoint.load(whole)
    checkpoint.save(
        run / "checkpoints",
        Checkpoint(step=60, config=state.config, model=state.model, optimizer={}, rng={}),
        keep=2,
    )
    truncate(run / "checkpoints" / name_of(60), "model.safetensors", 0.5)
    with pytest.warns(UserWarning, match=r"step-00000060/model\.safetensors .*/step-00000040 is used in its place"):
        checkpoint.load_encoder(run)
    with pytest.warns(UserWarning, match="used in its place"):
        assert checkpoint.step_of(run) == 40
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        checkpoint.load_encoder(run / "checkpoints" / name_of(60))


def test_a_second_damage_to_the_same_step_takes_the_place_of_the_first(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for note in ("first", "second"):
        shutil.copytree(saved / "saved" / name_of(20), folder / name_of(20))
        (folder / name_of(20) / "state.json").write_text(json.dumps(note))
        set_aside(folder / name_of(20))
    assert [path.name for path in folder.iterdir()] == ["damaged-step-00000020"]
    assert json.loads((folder / "damaged-step-00000020/state.json").read_text()) == "second"
