"""Format of the MoCo authors' checkpoints: v1, v2 (facebookresearch/moco) and v3 (facebookresearch/moco-v3).

Their moco/builder.py names the encoders: `encoder_q`, `encoder_k`, `queue` in v1 and v2, `base_encoder`,
`momentum_encoder`, `predictor` in v3, all below DDP's `module.`. Heads are in the place of the classifier: `fc` is one
linear layer in v1, linear, ReLU, linear in v2; v3's have batch norm, in `fc` of a ResNet or `head` of a transformer.
v3's transformers are those of its vits.py: 12 heads in every width.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import Encoder, build_backbone, build_encoder, width_of
from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, opened, without_head
from moco_fast.encoders.formats.torchvision import RESNETS, resnet_of
from moco_fast.encoders.weights import listed, load_exactly
from moco_fast.methods.base import Method
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3

__all__ = ["Authors"]

_NAMES: dict[str, dict[Which, str]] = {
    "v3": {"query": "base_encoder", "key": "momentum_encoder"},
    "v1 or v2": {"query": "encoder_q", "key": "encoder_k"},
}
_VITS = {384: "vit_small", 768: "vit_base"}


class Authors:
    """Both encoders of a pretraining run, of which one is taken."""

    def takes(self, place: Place) -> bool:
        """A file with the names of an encoder of theirs."""
        return place.is_file and _version(place.weights.tensors) is not None

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Load one of the encoders with its head, and the predictor for queries of v3."""
        weights = place.weights
        version = _version(weights.tensors)
        assert version is not None
        theirs = _NAMES[version][which]
        of = _below(weights.tensors, theirs)
        if not of:
            raise ValueError(f"{place.where} holds no {which} encoder: nothing in it is called {theirs}.*")
        network = _network(of, str(weights.facts.get("arch", "")), place.where)
        classifier = "head" if network in _VITS.values() else "fc"
        head = _below(of, classifier)
        predictor = _below(weights.tensors, "predictor") if which == "query" else {}
        model = ModelConfig(encoder=network)
        method = _method(head, version, place.where)
        encoder = _build(model, method, has_predictor=bool(predictor))
        wanted = {f"backbone.{key}": each for key, each in of.items() if not key.startswith(f"{classifier}.")}
        wanted |= {f"head.{key}": each for key, each in head.items()}
        wanted |= {f"predictor.{key}": each for key, each in predictor.items()}
        load_exactly(encoder, wanted, f"{place.where} ({network} of MoCo {version})")
        used = (f"{theirs}.", "predictor.") if predictor else (f"{theirs}.",)
        left_out = tuple(key for key in weights.tensors if not key.startswith(used))
        name = f"{place.where} (MoCo {version}, {network}, {which} encoder)"
        return opened(encoder, place.where, name, model=model, method=method, left_out=left_out)


def _version(tensors: Mapping[str, Tensor]) -> str | None:
    for version, names in _NAMES.items():
        if any(key.startswith(tuple(f"{name}." for name in names.values())) for key in tensors):
            return version
    return None


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}


def _network(of: Mapping[str, Tensor], arch: str, where: str) -> str:
    """Return our name of the network, by what the file says (`arch`) or else by its tensors."""
    if any(key.startswith("patch_embed.proj.0.") for key in of):
        raise ValueError(
            f"{where} is of a vit_conv_* of moco-v3, a transformer with a convolutional stem: the authors released "
            "none, and it cannot be built here"
        )
    if arch in (*RESNETS, *_VITS.values()):
        return arch
    if arch:
        raise ValueError(
            f"{where} says that it is of a {arch}, but known are {listed((*RESNETS, *_VITS.values()), most=20)}"
        )
    if "cls_token" not in of:
        return resnet_of(of, where)
    width = of["cls_token"].shape[-1]
    if width not in _VITS:
        raise ValueError(f"{where} is of a transformer of width {width}: moco-v3's are of {listed(map(str, _VITS))}")
    return _VITS[width]


def _method(head: Mapping[str, Tensor], version: str, where: str) -> Method | None:
    """Return the method whose head the tensors are; None: there are none."""
    if not head:
        return None
    # Of each linear layer the number of outputs.
    widths = {key: len(tensor) for key, tensor in head.items() if tensor.ndim == 2}
    match version, *widths:
        case "v3", "0.weight", "3.weight", *rest:
            return MomentumContrastV3(dim=widths[rest[-1] if rest else "3.weight"], mlp_dim=widths["0.weight"])
        case "v1 or v2", "weight":
            return MomentumContrast(dim=widths["weight"], head="linear")
        case "v1 or v2", "0.weight", "2.weight":
            return MomentumContrast(dim=widths["2.weight"], head="mlp")
        case _:
            raise ValueError(
                f"{where}: heads are one linear layer in MoCo v1, 0 and 2 of three in v2, linear layers and batch "
                f"norms in v3, but this one has {listed(head)}"
            )


def _build(model: ModelConfig, method: Method | None, *, has_predictor: bool) -> Encoder:
    if method is None:
        backbone: nn.Module = build_backbone(model.encoder)
        return without_head(backbone, width_of(backbone))
    encoder = build_encoder(model, method)
    if not has_predictor:
        encoder.predictor = None
    return encoder
