"""Runtime of a process: its ranks, device and precision. No other file but trackers.py uses accelerate.

Where both `accelerate launch` and our options make a choice, this decides:

- precision: `--run.precision` if given; else the launcher's `--mixed_precision` if that is bf16 or fp16; else bf16 on a
  GPU that supports it; else fp32. (The launcher exports "no" also when the user chose nothing, so "no" is ignored.)
- torch.compile: on when `--run.compile`, `--run.cuda-graphs` or the launcher's `--dynamo_backend` requests it, with the
  launcher's backend if given, else inductor.
- gradient accumulation: `--optim.accumulate` only; the launcher's option is for DeepSpeed.
- device: `--run.device` if given; else the CPU with `accelerate launch --cpu`; else a GPU if there is one.
- CPUs: those next to the GPU if the launcher's `--enable_cpu_affinity` requests it; affinity.py selects them.

On a GPU, `start` moves all work of the calling thread to a separate stream until `close`: libraries without stream
support (and all users of "the legacy default stream") use stream 0, and must not serialize the step.
"""

import os
import warnings
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
    gather_object,
    patch_environment,
)
from torch import Tensor, nn

from moco_fast.config import RunConfig
from moco_fast.training.affinity import stay_near_gpu
from moco_fast.training.compiled import keep_compiled
from moco_fast.training.process import NotMetError
from moco_fast.training.rendezvous import (
    INIT_METHOD,
    address_towards,
    choose_interface,
    interfaces,
    local_ranks,
    meeting,
    resolve,
)
from pipelines.world import World

__all__ = ["Runtime", "allow_tf32", "alone_by_mistake", "choose_compile", "choose_precision", "start"]

T = TypeVar("T")

_ACCELERATE_NAMES = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Rank, world size, device and precision of a process."""

    accelerator: Accelerator
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    precision: str
    compile_options: Mapping[str, str] | None
    """Options of torch.compile; None: encoders are not compiled."""
    notes: tuple[str, ...]
    """Decisions made on the user's behalf, one line each."""

    @property
    def world(self) -> World:
        """Rank and world size in the form that loaders take."""
        return World(rank=self.rank, world_size=self.world_size, local_world_size=self.local_world_size)

    @property
    def compile(self) -> bool:
        """Whether encoders are compiled."""
        return self.compile_options is not None

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context that computes in the run's precision."""
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, with loss scaling in fp16."""
        self.accelerator.backward(loss)

    def wrap_model(self, model: nn.Module, *, backwards_per_step: int) -> nn.Module:
        """Average gradients over ranks (DDP) and run the forward pass in the run's precision.

        Args:
            model: the model to train.
            backwards_per_step: backward passes between two optimizer steps. DDP optimizes for a single one if it is
                declared static; a second pass then fails with an internal assertion.
        """
        options = DistributedDataParallelKwargs(
            broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=backwards_per_step == 1
        )
        self.accelerator.ddp_handler = options  # pyright: ignore[reportAttributeAccessIssue] - declared as None
        with warnings.catch_warnings():
            # torch 2.13 renames the option, but accelerate passes only the old name.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self.accelerator.prepare_model(model)

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Undo loss scaling before a step, and skip the step after an overflow (fp16)."""
        return self.accelerator.prepare_optimizer(optimizer)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide gradients by what `backward` scaled them with (fp16)."""
        self.accelerator.unscale_gradients(optimizer)

    def tell_all(self, value: T) -> T:
        """Return the first rank's `value` on every rank."""
        return broadcast_object_list([value])[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, in the order of ranks."""
        return gather_object([value])

    def wait_for_all(self) -> None:
        """Wait until every rank has called this."""
        self.accelerator.wait_for_everyone()

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scaler's state, empty unless the precision is fp16."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Restore what `scaler_state` returned."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    def close(self) -> None:
        """Leave the process group and return to the default stream once all work is done."""
        self.accelerator.end_training()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.set_stream(torch.cuda.default_stream(self.device))


def start(config: RunConfig, *, env: MutableMapping[str, str] = os.environ) -> Runtime:
    """Join the other processes and choose device and precision.

    Raises:
        ValueError: the device does not exist, this process would train alone although several were started, or it
            cannot find the others.
    """
    if reason := alone_by_mistake(env):
        raise ValueError(reason)
    env.update(local_ranks(env))
    on_cpu = _choose_cpu(config.device, env)
    network = _choose_network(env, on_cpu=on_cpu)
    has_bf16 = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision, note = choose_precision(config.precision, env.get("ACCELERATE_MIXED_PRECISION"), has_bf16=has_bf16)
    if precision == "tf32" and on_cpu:
        raise ValueError("--run.precision tf32 needs a GPU's tensor cores: on the CPU use fp32 or bf16")
    if precision == "fp16" and on_cpu:
        raise ValueError("--run.precision fp16 needs a GPU for its loss scaling: on the CPU use fp32 or bf16")
    if not on_cpu:
        allow_tf32(precision == "tf32")
    if config.deterministic:
        _be_deterministic()
    if config.cuda_graphs and on_cpu:
        raise ValueError("--run.cuda-graphs needs a GPU: on the CPU use --run.compile")
    compile_options, compile_note = choose_compile(config, env.get("ACCELERATE_DYNAMO_BACKEND"))
    # For a CPU, inductor lets the compiler write under the final name: a start that is killed leaves half a library,
    # which no later start can load.
    if compile_options is not None and compile_options["backend"] == "inductor" and not on_cpu:
        compile_note = f"{compile_note}; compiled code: {keep_compiled(env)}"
    accelerator = _join(config, precision, env, on_cpu=on_cpu)
    notes = [note, *filter(None, (compile_note, network))]
    if not on_cpu and env.get("ACCELERATE_CPU_AFFINITY", "").lower() in ("1", "true"):
        notes.append(stay_near_gpu(accelerator.device))
    meant = int(env.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != meant:
        raise ValueError(
            f"{meant} processes were started, but this one sees {accelerator.num_processes} and would train alone: "
            "launch with --config_file $(moco-fast config-path gpu-8) or another of them"
        )
    if not on_cpu:
        # Before anything is built: DDP remembers the stream that was current when it was given the parameters.
        _leave_default_stream(accelerator.device)
    return Runtime(
        accelerator=accelerator,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        device=accelerator.device,
        precision=precision,
        compile_options=compile_options,
        notes=tuple(notes),
    )


def _join(config: RunConfig, precision: str, env: Mapping[str, str], *, on_cpu: bool) -> Accelerator:
    """Connect this process with the others. Raises NotMetError: it cannot find them."""
    # accelerate queries NVML by a number that ignores CUDA_VISIBLE_DEVICES, and fails where a CPU is not allowed.
    with meeting(env), patch_environment(ACCELERATE_CPU_AFFINITY="false"):
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=_ACCELERATE_NAMES[precision],
            dynamo_plugin=TorchDynamoPlugin(backend="no"),  # pyright: ignore[reportArgumentType] - a name will do
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s), init_method=INIT_METHOD)
            ],
        )
        if not on_cpu:
            # NCCL connects at its first collective.
            accelerator.wait_for_everyone()
    return accelerator


def _choose_network(env: MutableMapping[str, str], *, on_cpu: bool) -> str | None:
    """Choose gloo's network, and return a line about it; without one, a GPU's steps have NCCL's all the same."""
    try:
        return choose_interface(env, address_of=resolve, addresses=interfaces, towards=address_towards)
    except NotMetError as error:
        if on_cpu:
            raise
        return f"network: {error}"


def _leave_default_stream(device: torch.device) -> None:
    torch.cuda.set_stream(torch.cuda.Stream(device))


def choose_precision(asked: str, launcher: str | None, *, has_bf16: bool) -> tuple[str, str]:
    """Choose the precision from our option and the launcher's (see the top of this file).

    Returns:
        the precision (`fp32`, `tf32`, `bf16` or `fp16`) and one line that says where it comes from.

    Raises:
        ValueError: the launcher requests a precision that is not supported.
    """
    chosen_by_launcher = launcher not in (None, "no")
    if asked != "auto":
        over = f" (over the launcher's {launcher})" if chosen_by_launcher and launcher != asked else ""
        return asked, f"precision: {asked}, as --run.precision says{over}"
    if chosen_by_launcher:
        if launcher not in ("bf16", "fp16"):
            raise ValueError(f"accelerate launch --mixed_precision {launcher} is not supported: use bf16, fp16 or no")
        return launcher, f"precision: {launcher}, as `accelerate launch` says"
    if has_bf16:
        return "bf16", "precision: bf16, which this GPU supports (--run.precision fp32 for full precision)"
    return "fp32", "precision: fp32 (--run.precision tf32, bf16 or fp16 to choose another)"


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid rounding of float32 products to 10 bits on tensor cores; torch's default is convolutions only."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    # All flags of cuDNN: inductor reads the common one, which raises if those of convolutions and RNNs differ from it.
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = allowed
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"


def _be_deterministic() -> None:
    # cuBLAS reads it at its first use (torch's documentation of use_deterministic_algorithms).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def choose_compile(config: RunConfig, launcher: str | None) -> tuple[dict[str, str] | None, str | None]:
    """Choose the options of torch.compile from ours and the launcher's backend (see the top of this file).

    Returns:
        the options and one line that describes them; None and None without compilation.

    Raises:
        ValueError: CUDA graphs are requested from a backend that does not support them.
    """
    backend = (launcher or "no").lower()
    if backend == "no" and not (config.compile or config.cuda_graphs):
        return None, None
    who = "as asked" if backend == "no" else f"by {backend}, as `accelerate launch --dynamo_backend` says"
    backend = "inductor" if backend == "no" else backend
    if not config.cuda_graphs:
        return {"backend": backend}, f"compile: encoders, {who}"
    if backend != "inductor":
        raise ValueError(f"--run.cuda-graphs needs inductor, but the launcher's --dynamo_backend is {backend}")
    return {"backend": backend, "mode": "reduce-overhead"}, "compile: encoders, with CUDA graphs"


def alone_by_mistake(env: Mapping[str, str]) -> str | None:
    """Check the environment for several intended processes of which this one knows no other.

    Returns:
        the error to show, or None if there is none.
    """
    if "WORLD_SIZE" in env:
        return None
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return (
            f"srun started {env['SLURM_STEP_NUM_TASKS']} processes, but none knows the others, so each would train "
            "alone: start one `accelerate launch` per node (see `moco-fast config-path multi-node`)"
        )
    # For one process, accelerate exports no address. For several on CPUs without MPI it does, but starts only one.
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env:
        return (
            "accelerate launch was configured for several processes but started one, which would train alone: on CPUs "
            "use --config_file $(moco-fast config-path cpu-2) (or unset MASTER_ADDR to train with one process)"
        )
    return None


def _choose_cpu(device: str, env: Mapping[str, str]) -> bool:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--run.device cuda: torch finds no GPU here; use --run.device cpu")
    if device != "auto":
        return device == "cpu"
    return env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
