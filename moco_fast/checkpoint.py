"""Checkpoints, written to a temporary folder, synced, then renamed; tensors in safetensors, numbers in JSON, no pickle.

    RUN/checkpoints/step-00000100/
        model.safetensors       query.*, and the method's modules (key.*, queue.*): weights, batch statistics, keys
        optimizer.safetensors   the optimizer's state, <state>/<parameter>
        rng.safetensors         <rank>.cpu, <rank>.cuda: states of torch's generators
        state.json              step, loader, scaler, configuration; digests of the files above and of itself
    RUN/checkpoints/best        link to the checkpoint with the best value of --checkpoint.keep-best

A folder with its final name is complete; the next run removes all others.
"""

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from moco_fast.config import Config, from_dict
from moco_fast.recovery import VERSION, candidates, digest_of, find_whole, fingerprint, read_state, verify
from shards.ground.arrays import Encoded
from shards.ground.digests import running_digest
from shards.ground.files import appearing, aside_of, remove, sync, uncache

if TYPE_CHECKING:
    from moco_fast.encoders.encoder import Encoder

__all__ = [
    "Checkpoint",
    "best_step",
    "copy",
    "find_newest",
    "generator_states",
    "link_best",
    "load",
    "load_encoder",
    "part",
    "read_config",
    "read_numbers",
    "save",
    "set_generator_states",
    "step_of",
    "superfluous",
    "sweep",
]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TENSOR_FILES = ("model", "optimizer", "rng")
_BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to continue."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The run's configuration (`moco_fast.config.to_dict`)."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])
    """Numbers of the run: the loader's position, seconds trained, the loss scaler's state."""


def save(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    keep: int,
    keep_every: int | None = None,
    best: int | None = None,
    spared: Collection[str] = (),
) -> Path:
    """Write `folder/step-NNNNNNNN` completely or not at all, then remove those that need not be kept.

    Called by one rank only. Returns the new checkpoint's folder.

    Args:
        folder: of the run's checkpoints.
        checkpoint: to write.
        keep: number of newest checkpoints to keep.
        keep_every: steps of which a checkpoint is kept, too (`superfluous`).
        best: step of the best checkpoint, which may be this one; None: what was the best one stays.
        spared: names of checkpoints that are kept this time, since they are being read.

    Raises:
        OSError: the disk is full, not writable, or does not give back what was written; earlier checkpoints are not
            affected.
    """
    final = folder / _name_of(checkpoint.step)
    if not final.exists():  # else a run that stops immediately after it was resumed
        _write(final, checkpoint)
    if best is not None and (folder / _name_of(best)).is_dir():
        link_best(folder, _name_of(best))
    steps = [int(path.name.removeprefix("step-")) for path in _whole(folder)]
    names = {_name_of(step) for step in superfluous(steps, keep=keep, keep_every=keep_every)}
    _remove(folder, names - {_best_name(folder), *spared})
    return final


def superfluous(steps: Sequence[int], *, keep: int, keep_every: int | None = None) -> list[int]:
    """Return which checkpoints need not be kept: not the newest `keep`, nor the first at or after a multiple of steps.

    A checkpoint that is kept stays kept as others are removed and added.

    Args:
        steps: of all checkpoints.
        keep: number of newest ones.
        keep_every: of its multiples, from itself on; None: only the newest are kept.
    """
    firsts: dict[int, int] = {}
    for step in sorted(steps):
        if keep_every is not None and step >= keep_every:
            firsts.setdefault(step // keep_every, step)
    return [step for step in sorted(steps)[:-keep] if step not in firsts.values()]


def _remove(folder: Path, names: Collection[str]) -> None:
    """Remove checkpoints. A kill or a power cut leaves none with some of its files under its name."""
    if not names:
        return
    asides = [path.rename(aside_of(path)) for path in (folder / name for name in sorted(names))]
    sync(folder)
    for aside in asides:
        shutil.rmtree(aside)


def _write(final: Path, checkpoint: Checkpoint) -> None:
    with appearing(final, durable=True) as aside:
        aside.mkdir(parents=True)
        state = {
            "version": VERSION,
            "step": checkpoint.step,
            "config": checkpoint.config,
            "numbers": checkpoint.numbers,
            "files": {
                f"{name}.safetensors": _write_tensors(aside / f"{name}.safetensors", getattr(checkpoint, name))
                for name in _TENSOR_FILES
            },
        }
        (aside / "state.json").write_text(json.dumps(state | {"digest": digest_of(state)}, indent=2))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors, read the file back from the disk, and return its fingerprint.

    Raises:
        OSError: it cannot be written, or is not what is in memory.
    """
    whole = running_digest()
    with path.open("wb") as file:
        for piece in _safetensors(tensors):
            whole.update(piece)
            file.write(piece)
    sync(path)
    uncache(path)
    written = fingerprint(path)
    uncache(path)  # Training reads shards through the same memory.
    if written["xxh3_128"] != whole.hexdigest():
        raise OSError(f"{path} is not what was written when it is read back: check the disk")
    return written


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Give the bytes of a safetensors file: an 8-byte length, a JSON header, then the tensors.

    Its library writes tensors that are contiguous and on the CPU, all at once, and those of channels_last weights are
    not: here only one tensor at a time takes memory for that, and its digest is computed as it is written.
    """
    # Items begin at multiples of their size, as the library has it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape, dtype = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        # The format keeps no strides: channels_last weights are stored in their logical order.
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        array: Encoded = flat.view(torch.uint8).numpy()
        yield array.data


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def link_best(folder: Path, name: str) -> None:
    """Make `folder/best` a link to a checkpoint in place of another, so that there is one at any moment."""
    if _best_name(folder) != name:
        with appearing(folder / _BEST, durable=False) as aside:
            aside.symlink_to(name)
        sync(folder)


def _best_name(folder: Path) -> str | None:
    link = folder / _BEST
    return link.readlink().name if link.is_symlink() else None


def best_step(folder: Path) -> int | None:
    """Return the step of the best checkpoint in a run's `checkpoints` folder; None: there is none."""
    name = _best_name(folder)
    return next((int(path.name.removeprefix("step-")) for path in candidates(folder) if path.name == name), None)


def load(path: Path, *, is_checked: bool = False) -> Checkpoint:
    """Read a checkpoint folder, with tensors on the CPU.

    Args:
        path: of the folder.
        is_checked: another process of this machine has just compared the digests: they are not computed again, and the
            tensors are mapped, read only as they are used.

    Raises:
        ValueError: a file is missing, changed or from another version; the message names it.
    """
    state = read_state(path) if is_checked else verify(path)
    tensors = {name: load_file(path / f"{name}.safetensors") for name in _TENSOR_FILES}
    return Checkpoint(step=state["step"], config=state["config"], numbers=state["numbers"], **tensors)


def read_numbers(path: Path) -> dict[str, Any]:
    """Return the numbers of a checkpoint (`Checkpoint.numbers`). Raises ValueError: its state.json is damaged."""
    return read_state(path)["numbers"]


def read_config(path: Path) -> Config:
    """Return the configuration of a checkpoint's run. Raises ValueError: its state.json is damaged."""
    return from_dict(read_state(path)["config"])


def copy(source: Path, folder: Path, **numbers: Any) -> Path:
    """Copy a checkpoint into another run's folder of checkpoints, completely or not at all.

    Args:
        source: the checkpoint, which is only read.
        folder: of the other run's checkpoints.
        numbers: in place of some of the checkpoint's own (`Checkpoint.numbers`).

    Raises:
        OSError: the disk is full or not writable.
        ValueError: its state.json is damaged.
    """
    state = read_state(source)
    state["numbers"] = {**state["numbers"], **numbers}
    final = folder / _name_of(state["step"])
    with appearing(final, durable=True) as aside:
        aside.mkdir(parents=True)
        for name in state["files"]:
            shutil.copyfile(source / name, aside / name)
        (aside / "state.json").write_text(json.dumps(state | {"digest": digest_of(state)}, indent=2))
    return final


def find_newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's `checkpoints` folder, or None; `find_whole` says whether it is whole."""
    whole = _whole(folder)
    return whole[-1] if whole else None


def sweep(folder: Path) -> None:
    """Remove incomplete checkpoints that a killed process left."""
    for path in (*folder.glob(".step-*.partial"), aside_of(folder / _BEST)):
        remove(path)


def generator_states(rank: int, device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators on this rank, by the names under which a checkpoint keeps them."""
    states = {f"{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Restore this rank's generators; one that was not saved, as of a rank that is new, keeps its state."""
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    if device.type == "cuda" and f"{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}.cuda"], device)


def load_encoder(path: str | Path, *, which: Literal["query", "key"] = "query") -> "tuple[Config, Encoder]":
    """Load an encoder of a run (its newest whole checkpoint) or of one checkpoint folder.

    Args:
        path: a run's folder, whose newest whole checkpoint is taken, or one of its checkpoints: step-*, best.
        which: the trained query encoder, or the key encoder, its moving average, which has no predictor.

    Returns:
        the run's configuration and the encoder, on the CPU in fp32 and in eval mode.

    Raises:
        ValueError: there is no whole checkpoint, or its method has no key encoder.
    """
    from moco_fast.encoders.encoder import build_encoder

    found = _find(Path(path))
    checkpoint = load(found)
    config = from_dict(checkpoint.config)
    weights = part(checkpoint.model, which)
    if not weights:
        raise ValueError(f"{found} holds no {which} encoder: {config.method.name} has none; use the query encoder")
    encoder = build_encoder(config.model, config.method, image_size=config.views.size, crop=config.eval.crop)
    if which == "key":
        encoder.predictor = None
    encoder.load_state_dict(weights)
    return config, encoder.eval()


def step_of(path: str | Path) -> int:
    """Return the steps that the encoder of `load_encoder` was trained. Raises ValueError: as that does."""
    return int(read_state(_find(Path(path)))["step"])


def _find(path: Path) -> Path:
    if (path / "state.json").is_file():
        return path
    found = find_whole(path / "checkpoints")
    if found.newest is None:
        raise ValueError(f"{path} holds no checkpoint: give a run's folder or one of its checkpoints/step-*")
    for _, reason in found.damaged:
        warnings.warn(f"{reason}: {found.newest} is used in its place", stacklevel=3)
    return found.newest


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `name.`, without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _whole(folder: Path) -> list[Path]:
    return [path for path in candidates(folder) if (path / "state.json").is_file()]
