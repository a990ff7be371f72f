"""Format of detectron2: torchvision's ResNets by other names (its tools/convert-torchvision-to-d2.py)."""

import re

from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, refuse_key
from moco_fast.encoders.formats.torchvision import exported_facts, open_network, resnet_of

__all__ = ["Detectron2", "from_detectron2", "to_detectron2"]


class Detectron2:
    """A backbone alone, as detectors take it for a start."""

    def takes(self, place: Place) -> bool:
        """A file with the names of its ResNets."""
        return place.is_file and {"stem.conv1.weight", "res2.0.conv1.weight"} <= place.weights.tensors.keys()

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Load it by torchvision's names."""
        refuse_key(place, which)
        tensors = {from_detectron2(name): tensor for name, tensor in place.weights.tensors.items()}
        facts = exported_facts(place.weights.facts)
        name = str(facts.pop("name", "")) or resnet_of(tensors, place.where)
        return open_network(name, tensors, place.where, f"{place.where} (detectron2's {name})", facts)


def to_detectron2(name: str) -> str:
    """Return detectron2's name of a ResNet's tensor in torchvision: `layer1.0.bn1.bias` -> `res2.0.conv1.norm.bias`."""
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    name, stages = re.subn(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    return name if stages else f"stem.{name}"


def from_detectron2(name: str) -> str:
    """Return torchvision's name of a ResNet's tensor in detectron2."""
    name = re.sub(r"\bconv(\d)\.norm\b", r"bn\1", name.removeprefix("stem."))
    name = name.replace("shortcut.norm", "downsample.1")
    name = re.sub(r"\bshortcut\b", "downsample.0", name)
    return re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name)
