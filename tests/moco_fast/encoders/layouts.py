"""Files in the layouts of others, made of networks that their libraries build, with weights of no meaning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def as_if_trained(network: nn.Module) -> nn.Module:
    """Other scales and statistics than the first ones, so that no layer is the identity."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm) and layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.1)
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return network.eval()


def pixels(size: int = 64) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def mlp_of_v3(num_layers: int, dim_in: int, hidden: int, dim: int, *, last_bn: bool = True) -> nn.Sequential:
    """moco/builder.py of moco-v3 (c349e6e): linear without bias, batch norm, ReLU; the last norm without scale."""
    layers: list[nn.Module] = []
    for number in range(num_layers):
        is_last = number == num_layers - 1
        width = dim if is_last else hidden
        layers.append(nn.Linear(dim_in if number == 0 else hidden, width, bias=False))
        if not is_last:
            layers += [nn.BatchNorm1d(width), nn.ReLU()]
        elif last_bn:
            layers.append(nn.BatchNorm1d(width, affine=False))
    return nn.Sequential(*layers)


class V3ViT(nn.Module):
    """vits.py of moco-v3 (c349e6e): a plain vision transformer with 12 heads in every width, eps 1e-6, token first."""

    def __init__(self, width: int, depth: int = 12) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 197, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.ModuleList(V3Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class V3Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            each.unflatten(2, (12, -1)).transpose(1, 2) for each in self.attn["qkv"](self.norm1(tokens)).chunk(3, dim=2)
        )
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=3)
        tokens = tokens + self.attn["proj"]((weights @ value).transpose(1, 2).flatten(2))
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))


def resnet_of_authors(name: str, head: str) -> nn.Module:
    """A ResNet with the head of MoCo v1, v2 or v3 in the place of its classifier."""
    network = torchvision.models.get_model(name)
    width = network.fc.in_features
    network.fc = {
        "v1": lambda: nn.Linear(width, 16),
        "v2": lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16)),
        "v3": lambda: mlp_of_v3(2, width, 32, 16),
    }[head]()
    return as_if_trained(network)


def vit_of_authors(width: int = 384) -> nn.Module:
    vit = V3ViT(width)
    vit.head = mlp_of_v3(3, width, 32, 16)
    return as_if_trained(vit)


def save_as_authors(path: Path, modules: Mapping[str, nn.Module], arch: str | None, **others: Any) -> Path:
    """A checkpoint as their main_moco.py writes it: DDP's names, the optimizer beside it, the queue in v1 and v2."""
    tensors = {
        f"module.{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    if "encoder_q" in modules:
        tensors |= {"module.queue": torch.randn(16, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    content = {"epoch": 200, "state_dict": tensors, "optimizer": optimizer} | ({} if arch is None else {"arch": arch})
    torch.save(content | others, path)
    return path
