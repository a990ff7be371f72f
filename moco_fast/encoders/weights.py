"""Files of weights: read without running what is in them, loaded so that no tensor is missing or left in silence."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Weights", "listed", "load_exactly", "read_weights"]

# Where training scripts put the weights among other things.
_ENTRIES = ("state_dict", "model")
# What is put in front of every name: by DDP, torch.compile, and OpenMMLab's classifiers.
_WRAPPERS = ("module.", "_orig_mod.", "backbone.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """What a file holds."""

    tensors: dict[str, Tensor]
    """On the CPU, by name, without what DDP, torch.compile or OpenMMLab put in front of all names."""
    facts: dict[str, Any]
    """What else the file says: a safetensors file's metadata, or the texts and numbers beside a state dict."""


def read_weights(path: Path) -> Weights:
    """Read a file of safetensors or one that `torch.save` wrote; no code in it is run.

    Raises:
        ValueError: it is damaged or something else, or holds Python objects beside tensors.
    """
    with path.open("rb") as file:
        # A safetensors file begins with the length of its header, which is JSON.
        is_safetensors = file.read(9)[8:9] == b"{"
    tensors, facts = (_read_safetensors if is_safetensors else _read_torch)(path)
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Weights(tensors=tensors, facts=facts)


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load tensors into a module, all of them and into all of it.

    A batch norm's number of batches may be missing, as in files of 2018 and before: nothing here reads it.

    Raises:
        ValueError: `what`, with the names of what is missing, left over or of another shape.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith(".num_batches_tracked")]
    extra = [name for name in tensors if name not in own]
    shapes = [
        f"{name} ({_shape(tensor)}, not {_shape(own[name])})"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    wrong = {"it lacks": missing, "it has more": extra, "of other shapes are": shapes}
    if any(wrong.values()):
        said = "; ".join(f"{how} {listed(names)}" for how, names in wrong.items() if names)
        raise ValueError(f"{what}: {said}")
    module.load_state_dict(dict(tensors), strict=False)


def listed(names: Iterable[str], *, most: int = 6) -> str:
    """Return names with commas between, and how many more there are than `most`."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # A safetensors file has no iterator.
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 - see above
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or cut off, copy it again") from None


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # What torch raises depends on where a file is cut off.
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if objects := sorted(set(re.findall(r"GLOBAL `?([\w.]+)", str(error)))):
            raise ValueError(
                f"{path} holds more than weights: {listed(objects)}. Reading such objects may run any code, so they "
                "are not read. If you trust the file, save its weights alone: "
                'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW_FILE)'
            ) from None
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is cut off, damaged, or neither "
            "safetensors nor a file that torch.save wrote"
        ) from None
    return _find_tensors(content, path)


def _find_tensors(content: object, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if _are_tensors(content):
        return cast("dict[str, Tensor]", content), {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    entries = cast("dict[str, Any]", content)
    found = [name for name in _ENTRIES if _are_tensors(entries.get(name))]
    found = found or [name for name, value in entries.items() if _are_tensors(value)]
    if len(found) > 1 and found[0] != _ENTRIES[0]:
        raise ValueError(f"{path} holds several sets of weights ({listed(found)}): save the one that you mean alone")
    if not found:
        raise ValueError(f"{path} holds no weights by name: its entries are {listed(map(str, entries))}")
    return dict(entries[found[0]]), {
        name: value for name, value in entries.items() if isinstance(value, str | int | float)
    }


def _are_tensors(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())
