"""The training step: ours against the authors' and a supervised one, and what each part of ours costs.

    python benchmarks/step.py --encoder resnet18 --batch 64                              # two CPU cores
    python benchmarks/step.py --device cuda --encoder resnet50 --batch 256 --precision bf16 [--compile]
    python benchmarks/step.py --shuffle --batch 64                                       # two gloo ranks

Alternating, in one process, on one batch; ratios are taken round by round. The authors' step is restated with what
theirs does: a Python loop for the momentum update, logits that are concatenated, a queue that is cloned, torch's SGD
with its defaults. It gets images that are normalized already, the same memory format and the same precision.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from alternating import alternate, bars, claims_table, compare, header, table, write_claims
from torch import Tensor, nn

from moco_fast.config import ModelConfig, OptimConfig
from moco_fast.encoders.encoder import Encoder, build_encoder, unit_vectors
from moco_fast.methods.discrimination import Discrimination
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.keys import MomentumKeys
from moco_fast.methods.loss import feature_std, info_nce
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.methods.shuffle import Exchange, Gather, Together
from moco_fast.optimizers.optim import build_optimizer
from moco_fast.training.runtime import allow_tf32
from moco_fast.training.step import TrainStep
from pipelines.batch import Batch

MOMENTUM, TEMPERATURE, LR = 0.999, 0.2, 0.03
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    encoder: str
    batch: int
    size: int
    queue: int
    device: torch.device
    precision: str
    compile: bool

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the setting's precision."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=enabled)

    def build(self) -> tuple[Encoder, Encoder]:
        """A query encoder and its key encoder."""
        # float32 as a run computes it: torch alone lets convolutions round.
        allow_tf32(False)
        torch.manual_seed(0)
        query = build_encoder(ModelConfig(encoder=self.encoder), MomentumContrast()).to(
            self.device, memory_format=torch.channels_last
        )
        key = copy_as_key_encoder(query)
        if self.compile:
            query.compile()
            key.compile()
        return query, key

    def network(self, encoder: Encoder) -> nn.Module:
        """The same encoder for images that are normalized already."""
        network = nn.Sequential(encoder.backbone, encoder.head)
        if self.compile:
            network.compile()
        return network

    def views(self) -> list[Tensor]:
        """Two uint8 views on the device."""
        shape = (self.batch, 3, self.size, self.size)
        views = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2)]
        return [view.to(self.device, memory_format=torch.channels_last) for view in views]


class Ours:
    """The step of a run, and its parts one by one."""

    def __init__(self, setting: Setting, views: list[Tensor]):
        self.setting, self.views = setting, views
        self.query, self.key = setting.build()
        self.queue = Queue(128, setting.queue, torch.Generator().manual_seed(0)).to(setting.device)
        self.update = MomentumUpdate(self.query, self.key)
        self.optimizer = build_optimizer(self.query, OptimConfig())
        keys = MomentumKeys(self.key, self.update, Together(), setting.autocast)
        self.train_step = TrainStep(
            query=self.query,
            objective=Discrimination(keys=keys, dictionary=self.queue, temperature=TEMPERATURE),
            optimizer=self.optimizer,
            autocast=setting.autocast,
        )
        none = torch.full((setting.batch,), -1)
        self.batch = Batch(views=tuple(views), index=none, label=none)

    def step(self) -> None:
        """One step."""
        self.train_step([self.batch], lr=LR, scheduled={"momentum": MOMENTUM})

    def parts(self) -> dict[str, Callable[[], object]]:
        """What a step is made of. Encoder work is named so."""
        with torch.no_grad(), self.setting.autocast():
            normalized = self.key.normalize(self.views[0])
            features = self.key(self.views[0]).float()
        query, key = self.setting.network(self.query), self.setting.network(self.key)
        keys = unit_vectors(features)
        queries = unit_vectors(torch.randn_like(features)).requires_grad_()
        gradient = torch.randn_like(features)

        def key_forward() -> None:
            with torch.no_grad(), self.setting.autocast():
                key(normalized)

        def query_forward_backward() -> None:
            with self.setting.autocast():
                outputs = query(normalized)
            outputs.float().backward(gradient)

        def loss() -> None:
            value, _ = info_nce(unit_vectors(queries), keys, self.queue.keys, TEMPERATURE)
            value.backward()
            feature_std(queries.detach())

        def gradient_norm() -> None:
            nn.utils.get_total_norm([p.grad for p in self.query.parameters() if p.grad is not None])

        return {
            "encoder: key forward": key_forward,
            "encoder: query forward and backward": query_forward_backward,
            "normalize images": lambda: [self.key.normalize(view) for view in self.views],
            "momentum update": lambda: self.update(MOMENTUM),
            "loss, forward and backward": loss,
            "queue": lambda: self.queue.enqueue(keys),
            "gradient norm": gradient_norm,
            "optimizer": self.optimizer.step,
        }


class Authors:
    """The authors' step (moco/builder.py, main_moco.py), restated."""

    def __init__(self, setting: Setting, views: list[Tensor]):
        self.setting = setting
        query, key = setting.build()
        self.query, self.key = setting.network(query), setting.network(key)
        self.queue = F.normalize(torch.randn(128, setting.queue), dim=0).to(setting.device)
        self.pointer = 0
        self.optimizer = torch.optim.SGD(self.query.parameters(), LR, momentum=0.9, weight_decay=1e-4)
        self.views = [query.normalize(view) for view in views]
        self.labels = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)

    def step(self) -> None:
        """One step."""
        with self.setting.autocast():
            queries = F.normalize(self.query(self.views[0]).float(), dim=1)
            with torch.no_grad():
                for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                    k.data = k.data * MOMENTUM + q.data * (1 - MOMENTUM)
                keys = F.normalize(self.key(self.views[1]).float(), dim=1)
        positives = torch.einsum("nc,nc->n", queries, keys).unsqueeze(-1)
        negatives = torch.einsum("nc,ck->nk", queries, self.queue.clone().detach())
        logits = torch.cat([positives, negatives], dim=1) / TEMPERATURE
        end = self.pointer + len(keys)
        self.queue[:, self.pointer : end] = keys.T
        self.pointer = end % self.queue.shape[1]
        loss = F.cross_entropy(logits, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Supervised:
    """Plain classification with the same backbone, one view a sample."""

    def __init__(self, setting: Setting, views: list[Tensor]):
        self.setting, self.view = setting, views[0]
        query, _ = setting.build()
        self.normalize = query.normalize
        self.model = nn.Sequential(query.backbone, nn.LazyLinear(1000, device=setting.device))
        with torch.no_grad():
            self.model(query.normalize(self.view[:2]))
        if setting.compile:
            self.model.compile()
        self.optimizer = build_optimizer(self.model, OptimConfig())
        self.labels = torch.randint(0, 1000, (setting.batch,), device=setting.device)

    def step(self) -> None:
        """One step."""
        with self.setting.autocast():
            logits = self.model(self.normalize(self.view))
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare_steps(setting: Setting, rounds: int, json: Path | None, plot: Path | None) -> None:
    """Print and draw whole steps, then the parts of ours; write the claims."""
    views = setting.views()
    ours = Ours(setting, views)
    alternatives = {"ours": ours.step, "authors'": Authors(setting, views).step}
    alternatives["supervised, one view"] = Supervised(setting, views).step
    warmup = 10 if setting.device.type == "cuda" else 1
    steps = alternate(alternatives, rounds=rounds, device=setting.device, warmup=warmup)
    title = f"{setting.encoder}, {setting.size} px, batch {setting.batch}, K {setting.queue}, {setting.precision}"
    title += f"{', compiled' if setting.compile else ''}, {setting.device}"
    rates = {name: [setting.batch / each for each in values] for name, values in steps.items()}
    claims = [
        compare(f"step: {title} / authors'", rates["ours"], rates["authors'"], unit="samples/s", goal=1.0),
        compare(f"step: {title} / supervised", rates["ours"], rates["supervised, one view"], unit="samples/s"),
    ]
    parts = alternate(ours.parts(), rounds=rounds, device=setting.device, warmup=warmup)
    # The parts' share of the parts, round by round: steps of other rounds met other disturbances.
    whole = [1e3 * sum(of_round) for of_round in zip(*parts.values(), strict=True)]
    not_encoder = [values for name, values in parts.items() if not name.startswith("encoder")]
    other = [1e3 * sum(of_round) for of_round in zip(*not_encoder, strict=True)]
    allowed = [0.03 * each for each in whole]
    claims.append(compare(f"not encoder work: {title} / 3%", other, allowed, unit="ms", less_is_better=True, goal=1.0))
    write_claims(json, claims)
    print(f"{header(setting.device.type)}\n\n{claims_table(claims)}\n")
    print(f"Whole steps: {title}\n\n{table(steps, base='ours')}\n")
    print(f"Parts of ours\n\n{table(parts, base='encoder: key forward')}\n")
    share = median(a / b for a, b in zip(other, whole, strict=True))
    print(f"Not encoder work: {100 * share:.2f}% of the step")
    print(f"Samples/s: {', '.join(f'{name} {setting.batch / median(values):.1f}' for name, values in steps.items())}")
    if setting.device.type == "cuda":
        print(f"Peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    bars(plot, {title: steps, "Parts of ours": parts})


def shuffle_on_rank(
    rank: int, store: str, batch: int, size: int, rounds: int, json: Path | None, plot: Path | None
) -> None:
    """One of two gloo ranks: the exchange against the authors' gather, at equal dtype and as each is used."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(memory_format=torch.channels_last)
    keys, floats = torch.randn(batch, 128), images.float()
    exchange, gather = Exchange(None), Gather()

    def both_ways(policy: Exchange | Gather, of: Tensor) -> None:
        policy.shuffle(of)
        policy.unshuffle(keys)

    alternatives = {
        "exchange, uint8 (ours)": lambda: both_ways(exchange, images),
        "gather, uint8": lambda: both_ways(gather, images),
        "exchange, float32": lambda: both_ways(exchange, floats),
        "gather, float32 (authors')": lambda: both_ways(gather, floats),
    }
    seconds = alternate(alternatives, rounds=rounds, device=torch.device("cpu"), warmup=2)
    if rank == 0:
        title = f"Shuffling BN, two gloo ranks, batch {batch} a rank, {size} px"
        millis = {name: [1e3 * each for each in values] for name, values in seconds.items()}
        ours, unit = millis["exchange, uint8 (ours)"], {"unit": "ms", "less_is_better": True}
        used, equal = f"{title}: exchange / gather, as used", f"{title}: exchange / gather, both uint8"
        claims = [
            compare(used, ours, millis["gather, float32 (authors')"], goal=4.0, **unit),
            compare(equal, ours, millis["gather, uint8"], goal=1.0, **unit),
        ]
        write_claims(json, claims)
        print(f"{header()}\n\n{claims_table(claims)}\n")
        print(f"{title}\n\n{table(seconds, base='exchange, uint8 (ours)')}")
        bars(plot, {title: seconds})
    dist.destroy_process_group()


def step_options(description: str | None, *, encoder: str, batch: int, size: int) -> argparse.ArgumentParser:
    """Return a parser of what benchmarks of a step are told; `setting_of` makes a Setting of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=encoder)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--size", type=int, default=size)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    return parser


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what was asked for."""
    return Setting(
        encoder=options.encoder,
        batch=options.batch,
        size=options.size,
        queue=options.queue,
        device=torch.device(options.device),
        precision=options.precision,
        compile=getattr(options, "compile", False),
    )


def main() -> None:
    parser = step_options(__doc__, encoder="resnet18", batch=64, size=224)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--plot", type=Path, help="where to draw the times")
    options = parser.parse_args()
    if options.shuffle:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (f"{folder}/store", options.batch, options.size, options.rounds, options.json, options.plot)
            torch.multiprocessing.spawn(shuffle_on_rank, arguments, nprocs=2)
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    compare_steps(setting_of(options), options.rounds, options.json, options.plot)


if __name__ == "__main__":
    main()
