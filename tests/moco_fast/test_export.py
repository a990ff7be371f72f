import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint, load_encoder
from moco_fast.config import Config, ModelConfig, to_dict
from moco_fast.encoders.encoder import ENCODERS, TIMM_NETWORKS, Encoder, build_encoder
from moco_fast.encoders.formats.base import OpenedEncoder, opened
from moco_fast.encoders.formats.detectron2 import from_detectron2, to_detectron2
from moco_fast.encoders.formats.torchvision import RESNETS
from moco_fast.encoders.open import open_encoder
from moco_fast.exporters.detectron2 import dense_pose_command
from moco_fast.exporters.registry import EXPORTERS, find_exporter
from moco_fast.exporters.write import export
from moco_fast.methods.base import Method
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from pipelines.config import DataConfig, ViewsConfig
from tests.moco_fast.encoders.layouts import as_if_trained, resnet_of_authors, save_as_authors


@pytest.mark.parametrize("name", [*ENCODERS, "resnet34", "convnext_atto"])
def test_timm_can_build_every_encoder_of_ours(name: str) -> None:
    assert find_exporter("timm").why_not(ModelConfig(encoder=name)) is None
    timm_name, options = TIMM_NETWORKS.get(name, (name, {}))
    with torch.device("meta"):
        ours = build_encoder(ModelConfig(encoder=name), MomentumContrast()).backbone
        theirs = timm.create_model(timm_name, num_classes=0, **options)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", RESNETS)
def test_torchvision_has_what_we_say(name: str) -> None:
    with torch.device("meta"):
        ours = build_encoder(ModelConfig(encoder=name), MomentumContrast()).backbone
        theirs = torchvision.models.get_model(name)
    classifier = {"fc.weight", "fc.bias"}
    assert shapes(ours) == {key: shape for key, shape in shapes(theirs).items() if key not in classifier}


METHOD = MomentumContrast(dim=8)


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def save_run(folder: Path, model: ModelConfig, *, size: int = 224, method: Method = METHOD) -> Path:
    views = ViewsConfig(size=size)
    config = to_dict(Config(data=DataConfig(shards="nowhere"), model=model, method=method, views=views))
    query = {f"query.{name}": tensor for name, tensor in as_if_trained(build(model, method)).state_dict().items()}
    saved = Checkpoint(step=7, config=config, model=query, optimizer={}, rng={})
    checkpoint.save(folder / "checkpoints", saved, keep=1)
    return folder


def build(model: ModelConfig, method: Method = METHOD) -> Encoder:
    torch.manual_seed(5)
    return build_encoder(model, method)


# Of those with 94 million parameters and more, the shapes of weights are all that their options change.
LARGE = ("resnet50_w2x", "resnet50_w4x", "resnet152", "resnext101_64x4d", "wide_resnet101_2")
OTHERS = (
    "resnet34",
    "resnet26d",
    "seresnet50",
    "convnext_atto",
    "efficientnet_b0",
    "regnety_002",
    "vit_tiny_patch16_224",
)


# What a graph is made of is not by name: a few networks of each kind show it, below.
WITH_WEIGHTS = [name for name in EXPORTERS if name not in ("onnx", "torch-export", "huggingface")]


@pytest.mark.parametrize("target", WITH_WEIGHTS)
@pytest.mark.parametrize("name", sorted({*ENCODERS, *RESNETS, *OTHERS} - {*LARGE}))
def test_every_encoder_gives_the_same_features_in_every_library_or_is_refused(
    name: str, target: str, tmp_path: Path
) -> None:
    model, exporter = ModelConfig(encoder=name), find_exporter(target)
    if exporter.why_not(model):
        assert target in ("torchvision", "mmdet", "detectron2")
        assert name not in RESNETS or (target == "mmdet" and name.startswith("wide"))
        return
    encoder = as_if_trained(build(model))
    encoder.image_size = size = 224 if "vit" in name else 64
    subject = opened(encoder, "here", "an encoder", model=model)
    exporter.write(subject, tmp_path / "out", head=False)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder.features(images, "backbone")
        (found,) = exporter.read_back(subject, tmp_path / "out", head=False)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3


NORMALIZED = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


@pytest.mark.parametrize(
    ("encoder", "target"), [("resnet18_quarter", "timm"), ("vit_small", "timm"), ("resnet18", "torchvision")]
)
def test_the_lines_it_prints_load_the_same_network(encoder: str, target: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder=encoder, **NORMALIZED))
    written = export(run, target, tmp_path / "encoder")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scope: dict[str, Any] = {}
    exec(written.usage, scope)
    network = scope["model"].eval()
    if target == "torchvision":
        network.fc = torch.nn.Identity()
        normalize = scope["normalize"]
    else:
        data = timm.data.resolve_model_data_config(network)
        normalize = torchvision.transforms.Normalize(mean=data["mean"], std=data["std"])
        assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bilinear")
    _, trained = load_encoder(run)
    with torch.no_grad():
        expected = trained.features(images, "backbone")
        torch.testing.assert_close(network(normalize(images / 255)), expected, rtol=1e-4, atol=1e-4)
    assert written.num_parameters == sum(p.numel() for p in trained.backbone.parameters())


def test_a_transformer_of_other_heads_is_not_what_timm_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="vit_small"))
    export(run, "timm", tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["num_heads"]) == ("vit_small_patch16_224", 12)
    monkeypatch.setitem(TIMM_NETWORKS, "vit_small", ("vit_small_patch16_224", {}))
    with pytest.raises(ValueError, match="timm builds a different network for these weights"):
        export(run, "timm", tmp_path / "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "run"]


def test_what_is_written_says_what_it_is_and_nothing_of_timms_own_weights(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    export(run, "timm", tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architecture"] == "resnet18"
    assert config["model_args"]["stem_width"] == 8
    assert not {"tag", "license", "origin_url", "paper_ids"} & config["pretrained_cfg"].keys()
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    run = save_run(tmp_path / "other", ModelConfig(encoder="resnet18", **NORMALIZED), size=64)
    written = export(run, "torchvision", tmp_path / "encoder.safetensors")
    with safe_open(written.path, framework="pt") as file:
        facts = json.loads(file.metadata()["architecture"])
        assert not any(name.startswith(("head", "backbone", "fc")) for name in file.keys())  # noqa: SIM118 - the file has no iterator
    of_pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 64, "crop": 0.875}
    assert facts == {"library": "torchvision", "name": "resnet18", **of_pixels}


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    for _ in range(2):
        export(run, "timm", tmp_path / "encoder")
    (tmp_path / "encoder" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="with other contents"):
        export(run, "timm", tmp_path / "encoder")
    with pytest.raises(ValueError, match="name a folder"):
        export(run, "timm", tmp_path / "encoder.safetensors")
    other = save_run(tmp_path / "other", ModelConfig(encoder="resnet18"), size=64)
    with pytest.raises(ValueError, match="with other contents"):
        export(other, "torchvision", tmp_path / "encoder")
    assert (tmp_path / "encoder" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "target", "says"),
    [
        (ModelConfig(encoder="resnet18_quarter", stem="cifar"), "timm", "timm has no .* with a cifar stem"),
        (ModelConfig(encoder="resnet18_quarter"), "torchvision", "torchvision has no resnet18_quarter"),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_nothing_is_written(
    model: ModelConfig, target: str, says: str, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", model)
    with pytest.raises(ValueError, match=says):
        export(run, target, tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_encoder_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"))
    monkeypatch.setitem(TIMM_NETWORKS, "resnet18_quarter", ("resnet18", {}))
    with pytest.raises(ValueError, match="timm's resnet18 does not take these weights"):
        export(run, "timm", tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_encoder_that_has_diverged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: ModelConfig, method: Method) -> Encoder:
        encoder = build_encoder(model, method)
        next(encoder.backbone.parameters()).data.fill_(float("nan"))
        return encoder

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "build", poisoned)
        run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    with pytest.raises(ValueError, match="it has diverged"):
        export(run, "timm", tmp_path / "encoder")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"))
    with pytest.raises(ValueError, match="there is no folder"):
        export(run, "timm", tmp_path / "nowhere" / "encoder")


class ToyExporter:
    """A library that takes anything and keeps it as torch does."""

    place = "encoder.toy"
    has_head = False

    def why_not(self, model: ModelConfig | None) -> str | None:
        return None if model and model.stem == "imagenet" else "toys have one stem"

    def check(self, out: Path) -> None:
        assert out.suffix == ".toy"

    def write(self, opened: OpenedEncoder, path: Path, *, head: bool) -> None:
        torch.save(opened.encoder.backbone.state_dict(), path)

    def read_back(self, opened: OpenedEncoder, path: Path, *, head: bool) -> Any:
        encoder = build(ModelConfig(encoder="resnet18_quarter")).eval()
        encoder.backbone.load_state_dict(torch.load(path, weights_only=True))
        return lambda pixels: (encoder.features(pixels, "backbone"),)

    def usage(self, opened: OpenedEncoder, out: Path) -> str:
        return f"toy.load({str(out)!r})"


def test_an_exporter_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18_quarter"), size=64)
    monkeypatch.setitem(EXPORTERS, "toy", f"{__name__}:ToyExporter")
    written = export(run, "toy", tmp_path / "encoder.toy")
    assert written.usage == f"toy.load({str(tmp_path / 'encoder.toy')!r})"
    assert written.path.stat().st_size > 0
    with pytest.raises(ValueError, match=r"there is no exporter 'toys': choose timm or torchvision or .* or toy"):
        export(run, "toys", tmp_path / "other.toy")


V3 = MomentumContrastV3(dim=8, mlp_dim=16)


@pytest.mark.parametrize(
    ("target", "encoder", "method"),
    [
        ("onnx", "resnet18_quarter", METHOD),
        ("torch-export", "resnet18_half", V3),
        ("huggingface", "resnet18_quarter", METHOD),
        ("huggingface", "resnet18_half", V3),
        ("huggingface", "test_vit", V3),
        ("torch-export", "test_vit", V3),
        pytest.param("onnx", "test_vit", V3, marks=pytest.mark.slow),
    ],
)
def test_the_head_goes_along_where_there_is_a_place(target: str, encoder: str, method: Method, tmp_path: Path) -> None:
    model = ModelConfig(encoder=encoder, mean=(0.1, 0.2, 0.3))
    run = save_run(tmp_path / "run", model, method=method, size=224 if "vit" in encoder else 64)
    written = export(run, target, tmp_path / find_exporter(target).place, head=True)
    _, trained = load_encoder(run)
    of_both = [parameter for part in (trained.backbone, trained.head) for parameter in part.parameters()]
    assert written.num_parameters == sum(parameter.numel() for parameter in of_both)
    if target == "huggingface":
        back = open_encoder(str(written.path))
        images = torch.randint(0, 256, (2, 3, trained.image_size, trained.image_size), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(back.encoder(images), trained(images), rtol=1e-5, atol=1e-5)
        assert back.method == method


@pytest.mark.parametrize(("target", "head"), [("onnx", True), ("torch-export", True), ("onnx", False)])
def test_a_program_takes_pixels_of_any_number_of_images(target: str, head: bool, tmp_path: Path) -> None:
    model = ModelConfig(encoder="resnet18_quarter", stem="cifar", mean=(0.1, 0.2, 0.3))
    run = save_run(tmp_path / "run", model, size=32)
    written = export(run, target, tmp_path / find_exporter(target).place, head=head)
    _, trained = load_encoder(run)
    for num_images in (1, 2, 7):
        images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8)
        scope: dict[str, Any] = {"pixels": images if target == "torch-export" else images.numpy()}
        exec(written.usage, scope)
        with torch.no_grad():
            expected = [trained.features(images, layer) for layer in ("backbone", "head")[: 1 + head]]
        for found, wanted in zip((scope["features"], *scope["projection"]), expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(found).detach(), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_without_a_place_is_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18"), size=64)
    for target in ("timm", "torchvision", "detectron2", "mmdet"):
        with pytest.raises(ValueError, match=f"--head: {target} cannot hold a projection head"):
            export(run, target, tmp_path / find_exporter(target).place, head=True)
    bare = export(run, "timm", tmp_path / "bare").path
    with pytest.raises(ValueError, match=r"--head: .*bare .* has no projection head"):
        export(bare, "onnx", tmp_path / "encoder.onnx", head=True)


def test_packages_that_are_missing_are_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moco_fast.exporters.graph.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"needs onnxscript, which is not installed: pip install 'moco-fast\[onnx\]'"):
        export(tmp_path / "nowhere", "onnx", tmp_path / "encoder.onnx")


# detectron2's ResNet-18 (detectron2/modeling/backbone/resnet.py, d5e5b0f): its modules' names, restated.
def detectron2_shapes() -> dict[str, tuple[int, ...]]:
    def conv(name: str, width_in: int, width: int, side: int) -> dict[str, tuple[int, ...]]:
        norm = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.weight": (width, width_in, side, side)} | {f"{name}.norm.{each}": (width,) for each in norm}

    shapes = conv("stem.conv1", 3, 64, 7)
    for stage, width in enumerate((64, 128, 256, 512), 2):
        for block in range(2):
            width_in = width // 2 if block == 0 and stage > 2 else width
            shapes |= conv(f"res{stage}.{block}.conv1", width_in, width, 3)
            shapes |= conv(f"res{stage}.{block}.conv2", width, width, 3)
            if width_in != width:
                shapes |= conv(f"res{stage}.{block}.shortcut", width_in, width, 1)
    return shapes


def test_detectron2_finds_its_names_and_shapes(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18", **NORMALIZED), size=64)
    written = export(run, "detectron2", tmp_path / "encoder.pth")
    content = torch.load(written.path, weights_only=True)
    found = {name: tuple(tensor.shape) for name, tensor in content["model"].items() if "num_batches" not in name}
    assert found == detectron2_shapes()
    # What its checkpointer looks for (detectron2/checkpoint/detection_checkpoint.py).
    assert content["matching_heuristics"] is True
    # RES2_OUT_CHANNELS: without it, its builder refuses networks of this depth (modeling/backbone/resnet.py).
    for line in (
        "cfg.MODEL.PIXEL_MEAN = [25.5, 51.0, 76.5]",
        "cfg.INPUT.FORMAT = 'RGB'",
        "cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64",
    ):
        assert line in written.usage.splitlines()
    with pytest.raises(ValueError, match=r"chooses the format by the file's extension: name it encoder\.pth"):
        export(run, "detectron2", tmp_path / "encoder.pkl")


# Keys that an export sets, with detectron2's defaults (detectron2/config/defaults.py, 02b5c4e). yacs refuses keys that
# are not there, and values of another type than the default's.
DETECTRON2_DEFAULTS: dict[str, object] = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.FPN.NORM": "",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.PIXEL_MEAN": [103.530, 116.280, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "INPUT.FORMAT": "BGR",
    "TEST.PRECISE_BN.ENABLED": False,
}


def merged_from_list(words: list[str]) -> dict[str, object]:
    """Values as `merge_from_list` of yacs reads them from a command line."""
    found = {}
    for name, word in zip(words[::2], words[1::2], strict=True):
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError):
            value = word
        assert type(value) is type(DETECTRON2_DEFAULTS[name]), name
        found[name] = value
    return found


def dense_pose_keys() -> set[str]:
    """Keys of DensePose R-CNN with a pyramid on a ResNet-18 (detectron2, 02b5c4e: modeling/backbone/fpn.py,
    modeling/proposal_generator/rpn.py, modeling/roi_heads/{box_head,fast_rcnn}.py; of projects/DensePose,
    densepose/modeling/roi_heads/v1convx.py and densepose/modeling/predictors/chart.py)."""
    norm = ("weight", "bias", "running_mean", "running_var")
    keys = {f"backbone.bottom_up.{name}" for name in detectron2_shapes()}
    for level in range(2, 6):
        for kind in ("lateral", "output"):
            keys |= {f"backbone.fpn_{kind}{level}.weight"}
            keys |= {f"backbone.fpn_{kind}{level}.norm.{each}" for each in norm}
    layers = [f"proposal_generator.rpn_head.{name}" for name in ("conv", "objectness_logits", "anchor_deltas")]
    layers += [f"roi_heads.box_head.fc{number}" for number in (1, 2)]
    layers += [f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred")]
    layers += [f"roi_heads.densepose_head.body_conv_fcn{number}" for number in range(1, 9)]
    layers += [f"roi_heads.densepose_predictor.{name}_lowres" for name in ("ann_index", "index_uv", "u", "v")]
    return keys | {f"{layer}.{each}" for layer in layers for each in ("weight", "bias")}


def test_dense_pose_finds_every_weight_of_its_backbone_and_takes_the_settings(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18", **NORMALIZED), size=64)
    written = export(run, "detectron2", tmp_path / "encoder.pth")
    tensors = torch.load(written.path, weights_only=True)["model"]
    # align_and_update_state_dicts (detectron2/checkpoint/c2_model_loading.py): a key of the model takes the longest one
    # of the file that is its whole suffix, and two of them must not take the same.
    taken = {}
    for key in dense_pose_keys():
        fitting = [name for name in tensors if key == name or key.endswith(f".{name}")]
        if fitting:
            taken[key] = max(fitting, key=len)
    assert set(taken) == {key for key in dense_pose_keys() if key.startswith("backbone.bottom_up.")}
    assert len(set(taken.values())) == len(taken)
    assert {name for name in tensors if "num_batches" not in name} == set(taken.values())
    words = shlex.split(written.usage.splitlines()[-1].removeprefix("# "))
    # configs/ and train_net.py of projects/DensePose.
    config = "configs/densepose_rcnn_R_50_FPN_s1x_legacy.yaml"
    assert words[:6] == ["python", "train_net.py", "--config-file", config, "--num-gpus", "8"]
    told = merged_from_list(words[6:])
    assert told == {
        "MODEL.WEIGHTS": str(written.path.absolute()),
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.PIXEL_MEAN": [25.5, 51.0, 76.5],
        "MODEL.PIXEL_STD": [102.0, 127.5, 153.0],
        "INPUT.FORMAT": "RGB",
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.FPN.NORM": "SyncBN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "TEST.PRECISE_BN.ENABLED": True,
    }
    # The lines for Python set the same.
    lines = [line.removeprefix("cfg.").split(" = ") for line in written.usage.splitlines() if line.startswith("cfg.")]
    assert {name: ast.literal_eval(value) for name, value in lines} == told | {"MODEL.WEIGHTS": str(written.path)}


def test_the_command_of_the_documentation_is_that_of_an_export() -> None:
    text = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
    shown = text[text.index("    python train_net.py") :].partition("\n\n")[0].replace("\\\n", " ")
    assert shlex.split(shown) == shlex.split(dense_pose_command(ModelConfig(encoder="resnet50"), Path("/encoder.pth")))


# The authors' detection/convert-pretrain-to-detectron2.py (facebookresearch/moco, 0d6137a), case by case.
@pytest.mark.parametrize(
    ("theirs", "detectron2s"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer3.5.bn3.bias", "res4.5.conv3.norm.bias"),
        ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
        ("layer4.0.downsample.1.running_var", "res5.0.shortcut.norm.running_var"),
    ],
)
def test_names_for_detectron2_are_the_authors(theirs: str, detectron2s: str) -> None:
    assert to_detectron2(theirs) == detectron2s
    assert from_detectron2(detectron2s) == theirs


@pytest.mark.parametrize("name", RESNETS)
def test_every_name_for_detectron2_leads_back(name: str) -> None:
    with torch.device("meta"):
        names = list(torchvision.models.get_model(name).state_dict())
    renamed = [to_detectron2(each) for each in names if not each.startswith("fc.")]
    assert len(set(renamed)) == len(renamed)
    assert [from_detectron2(each) for each in renamed] == [each for each in names if not each.startswith("fc.")]


def test_mmdet_finds_torchvisions_names_below_backbone(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18", **NORMALIZED), size=64)
    written = export(run, "mmdet", tmp_path / "encoder.pth")
    # mmpretrain's tools/model_converters/torchvision_to_mmpretrain.py: `backbone.` before all but `fc`.
    tensors = torch.load(written.path, weights_only=True)["state_dict"]
    with torch.device("meta"):
        theirs = shapes(torchvision.models.resnet18())
    expected = {f"backbone.{name}": shape for name, shape in theirs.items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    scope: dict[str, Any] = {}
    exec(written.usage, scope)
    assert scope["backbone"]["init_cfg"] == {
        "type": "Pretrained",
        "checkpoint": str(written.path),
        "prefix": "backbone.",
    }
    assert scope["data_preprocessor"]["mean"] == [25.5, 51.0, 76.5]


@pytest.mark.parametrize("target", ["timm", "torchvision", "huggingface", "detectron2", "mmdet"])
def test_what_was_written_is_opened_again(target: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="resnet18", **NORMALIZED), size=64)
    written = export(run, target, tmp_path / find_exporter(target).place)
    back, trained = open_encoder(str(written.path)), open_encoder(str(run))
    assert (back.encoder.image_size, back.encoder.crop, back.model) == (64, 0.875, trained.model)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = trained.encoder.features(images, "backbone")
        torch.testing.assert_close(back.encoder.features(images, "backbone"), expected, rtol=1e-5, atol=1e-5)
    # And once more: an export is as good as a run.
    again = export(written.path, "torchvision", tmp_path / "again.safetensors")
    assert torch.equal(
        open_encoder(str(again.path)).encoder.features(images, "backbone"), back.encoder.features(images, "backbone")
    )


def test_a_transformer_for_another_size_is_exported_as_it_is(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", ModelConfig(encoder="vit_small"))
    written = export(run, "timm", tmp_path / "encoder", image_size=96)
    back = open_encoder(str(written.path)).encoder
    expected = open_encoder(str(run), image_size=96).encoder
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(back(images), expected.features(images, "backbone"), rtol=1e-5, atol=1e-5)


def test_a_network_that_only_its_library_builds_is_a_program_alone(tmp_path: Path) -> None:
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "weights.pth")
    where = f"torchvision:mobilenet_v3_small@{tmp_path / 'weights.pth'}"
    for target in ("timm", "torchvision", "huggingface", "detectron2", "mmdet"):
        with pytest.raises(ValueError, match="network that only its own library builds: export it with --format onnx"):
            export(where, target, tmp_path / find_exporter(target).place)
    assert export(where, "torch-export", tmp_path / "encoder.pt2").path.is_file()


def test_the_model_card_says_data_recipe_and_figures(finished_run: Path, tmp_path: Path) -> None:
    card = (export(finished_run, "huggingface", tmp_path / "encoder").path / "README.md").read_text()
    for fact in (
        "library_name: timm",
        "# resnet18_quarter, pretrained without labels",
        "- data: train, 288 images",
        "- recipe: `cifar10` (momentum-contrast), with",
        "--run.steps: None -> 40",
        "- length: 40 steps of 32 images, 4.444 epochs",
        "- knn/top1: 0.65",
    ):
        assert fact in card, fact
    assert str(finished_run.parent) not in card
    earlier = finished_run / "checkpoints" / "step-00000040"
    assert "- knn/top1: 0.65" in (export(earlier, "huggingface", tmp_path / "other").path / "README.md").read_text()


def test_the_model_card_of_a_file_says_that_nothing_is_known(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    card = (export(tmp_path / "weights.pth", "huggingface", tmp_path / "encoder").path / "README.md").read_text()
    assert "# resnet18\n" in card
    assert "self-supervised" not in card
    assert "From `weights.pth`, which does not record its training data or results." in card


def test_the_authors_encoder_is_exported_as_a_runs(tmp_path: Path) -> None:
    torch.manual_seed(3)
    query = resnet_of_authors("resnet18", "v2")
    path = save_as_authors(tmp_path / "moco.pth.tar", {"encoder_q": query, "encoder_k": query}, "resnet18")
    export(path, "torchvision", tmp_path / "encoder.safetensors", which="key")
    export(path, "huggingface", tmp_path / "encoder", head=True)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    back = open_encoder(str(tmp_path / "encoder")).encoder
    with torch.no_grad():
        torch.testing.assert_close(back(images), query(back.normalize(images)), rtol=1e-5, atol=1e-5)
