"""A GPU that is not there: what torch.cuda, NCCL and DALI do on one, as far as this project asks for it, on the CPU.

    DEVICE=cuda python -m pytest -p tests.fake_cuda tests/gpu     # or `install()` in a process of its own

Tensors stay on the CPU: a torch function mode reads every device "cuda" as "cpu". What is faked has torch's signatures
and refuses what torch refuses; the rest of torch.cuda is torch's own and raises, for there is no driver. Read in torch
2.15.0 and 2.11.0: torch/cuda/{__init__,memory,streams}.py, torch/csrc/cuda/Module.cpp (the warning about the sync debug
mode leaves the call after the mode is set), torch/_inductor/compile_fx.py (2.11 warns about TF32, 2.15 logs it).
"""

import contextlib
import inspect
import os
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from pipelines.backends import registry

PROTOTYPE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations (Triggered "
    "internally at /pytorch/torch/csrc/cuda/Module.cpp:1071.)"
)
NO_TF32 = (
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider setting "
    "`torch.set_float32_matmul_precision('high')` for better performance."
)
PROPERTIES = {
    "name": "NVIDIA Imaginary",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 << 30,
    "L2_cache_size": 50 << 20,
    "uuid": "00000000-0000-0000-0000-000000000000",
    "pci_domain_id": 0,
    "pci_bus_id": 4,
    "pci_device_id": 0,
}


class State:
    """What the driver would remember."""

    capturing = False
    sync_mode = 0
    has_warned = False
    compiled = 0
    now = 0
    """Rises with every event recorded."""
    done = 0
    """Events recorded up to here are complete."""


class Stream:
    """Work is done when it is asked for."""

    def __init__(self, device=None, priority=0):
        self.device, self.priority, self.cuda_stream = device, priority, id(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_event(self, event):
        assert isinstance(event, Event)

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def is_capturing(self):
        return False

    def query(self):
        return True

    def synchronize(self):
        _complete()


_STREAM = Stream()


class Event:
    """A point in time, complete once somebody has waited for it or asked twice."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.enable_timing, self.recorded, self._at, self._asked = enable_timing, None, 0.0, 0

    def record(self, stream=None):
        assert stream is None or isinstance(stream, Stream), stream
        State.now += 1
        self.recorded, self._at = State.now, time.perf_counter()

    def wait(self, stream=None):
        assert stream is None or isinstance(stream, Stream), stream

    def query(self):
        self._asked += 1
        return self.recorded is None or self.recorded <= State.done or self._asked > 1

    def synchronize(self):
        _refuse_to_wait()
        State.done = max(State.done, self.recorded or 0)

    def elapsed_time(self, end_event):
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.recorded is None or end_event.recorded is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if max(self.recorded, end_event.recorded) > State.done:
            raise ValueError("Both events must be completed before calculating elapsed time.")
        return 1e3 * (end_event._at - self._at)


def _complete(device=None):
    _refuse_to_wait()
    State.done = State.now


def _refuse_to_wait():
    if State.sync_mode == 2:
        raise RuntimeError("called a synchronizing CUDA operation")


def set_sync_debug_mode(debug_mode):
    State.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(debug_mode, debug_mode)
    assert State.sync_mode in (0, 1, 2), debug_mode
    if not State.has_warned:
        State.has_warned = True
        warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)


def compile_module(module, *args, **options):
    """Compiles nothing, but warns as inductor does, once a process."""
    assert options.get("backend", "inductor") == "inductor", options
    State.compiled += 1
    if State.compiled == 1 and torch.get_float32_matmul_precision() == "highest":
        _ = torch.backends.cudnn.allow_tf32  # inductor's templates read it
        warnings.warn(NO_TF32, UserWarning, stacklevel=2)


def _numbers_on_the_device(function):
    return function in (torch.tensor, torch.as_tensor, torch.asarray)


# Read the value of a tensor on the device: the host waits.
WAITING = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
} | {torch.nonzero, torch.masked_select, torch.unique, torch.equal}


class OnTheCpu(TorchFunctionMode):
    """Reads the device "cuda" as "cpu", and refuses to wait where torch would in the sync debug mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if State.sync_mode == 2 and self._waits(func, args, kwargs):
            raise RuntimeError("called a synchronizing CUDA operation")
        if func is torch.Tensor.pin_memory:
            return args[0]
        if "pin_memory" in kwargs:
            kwargs = kwargs | {"pin_memory": False}
        result = func(*map(_as_cpu, args), **{name: _as_cpu(value) for name, value in kwargs.items()})
        if str(kwargs.get("device")) == "cpu" and isinstance(result, torch.Tensor):
            result.is_on_host = True  # asked for there, by name
        return result

    @classmethod
    def _waits(cls, func, args, kwargs):
        reads = func in WAITING and not getattr(args[0], "is_on_host", False)
        return reads or cls._copies_and_waits(func, args, kwargs)

    @staticmethod
    def _copies_and_waits(func, args, kwargs):
        if _numbers_on_the_device(func):
            return _is_cuda(kwargs.get("device"))
        # By name: a device that was read off a tensor is the CPU's here, whatever it stands for.
        to_host = func is torch.Tensor.to and "cpu" in [each for each in args[1:] if isinstance(each, str)]
        return to_host and not kwargs.get("non_blocking", False)


def _is_cuda(value):
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _as_cpu(value):
    return torch.device("cpu") if _is_cuda(value) else value


def _in_every_thread():
    """Modes hold for one thread: enter one in each."""
    run = threading.Thread.run

    def run_in_mode(self):
        with OnTheCpu():
            run(self)

    threading.Thread.run = run_in_mode
    OnTheCpu().__enter__()


class Graph:
    """A graph that was recorded; playing it does nothing, where a GPU would do its work again."""

    def replay(self):
        assert not State.capturing


@contextlib.contextmanager
def record_graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    """What runs in here runs, where a GPU would only take it down."""
    assert isinstance(cuda_graph, Graph)
    State.capturing = True
    try:
        yield
    finally:
        State.capturing = False


FUNCTIONS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: PROPERTIES["name"],
    "get_device_properties": lambda device=None: SimpleNamespace(**PROPERTIES),
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (60 << 30, 80 << 30),
    "memory_allocated": lambda device=None: 1 << 30,
    "max_memory_allocated": lambda device=None: 2 << 30,
    "memory_reserved": lambda device=None: 3 << 30,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "synchronize": _complete,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "set_stream": lambda stream: None,
    "stream": lambda stream: contextlib.nullcontext(),
    "device": lambda device: contextlib.nullcontext(),
    "get_sync_debug_mode": lambda: State.sync_mode,
    "set_sync_debug_mode": set_sync_debug_mode,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
    "manual_seed_all": lambda seed: None,
    "is_current_stream_capturing": lambda: State.capturing,
    "CUDAGraph": Graph,
    "graph": record_graph,
    "_sleep": lambda cycles: None,
    "Event": Event,
    "Stream": Stream,
}


def _replace_nccl():
    start, build = dist.init_process_group, DistributedDataParallel.__init__

    def init_process_group(backend=None, **options):
        options.pop("device_id", None)
        return start("gloo" if backend == "nccl" else backend, **options)

    def build_on_cpu(self, module, device_ids=None, output_device=None, **options):
        assert device_ids == [0], device_ids
        return build(self, module, **options)

    dist.init_process_group = init_process_group
    DistributedDataParallel.__init__ = build_on_cpu


def _replace_dali():
    """Pipelines for a GPU are built for the CPU, with the same operators."""
    with contextlib.suppress(ImportError):
        from nvidia.dali import fn, pipeline

        decode, build = fn.decoders.image, pipeline.Pipeline.__init__

        def decode_on_cpu(*inputs, device="cpu", **options):
            return decode(*inputs, device="cpu" if device == "mixed" else device, **options)

        def build_on_cpu(self, *args, device_id=None, **options):
            assert device_id in (None, 0), device_id
            build(self, *args, device_id=None, **options)

        # DALI tells a pipeline's own arguments from its graph's by this.
        build_on_cpu.__signature__ = inspect.signature(build)
        fn.decoders.image, pipeline.Pipeline.__init__ = decode_on_cpu, build_on_cpu
    # An image takes Triton's interpreter 50 ms. Batches that are decoded together: tests/pipelines/test_together.py.
    registry.BACKENDS["dali"] = replace(registry.BACKENDS["dali"], gpu_images_at_once=1)


def _interpret_kernels():
    """Triton's kernels run on the CPU, in fewer and larger blocks, for a block takes the interpreter milliseconds."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import InterpretedFunction

    from pipelines.backends import color_kernels

    color_kernels._BLOCK = 1 << 14
    # It would prepare its language for every call within a kernel, as it did for the kernel: a third of the time.
    InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)


def _replace_the_profiler():
    """What the CPU's operators took stands for the kernels."""
    import torch.profiler

    build, write = torch.profiler.profile.__init__, torch.profiler.profile.export_chrome_trace

    def build_for_cpu(self, *, activities, **options):
        assert torch.profiler.ProfilerActivity.CUDA in activities
        build(self, activities=[torch.profiler.ProfilerActivity.CPU], **options)

    def export_chrome_trace(self, path):
        write(self, path)
        trace = Path(path)
        trace.write_text(trace.read_text().replace('"cat": "cpu_op"', '"cat": "kernel"'))

    torch.profiler.profile.__init__ = build_for_cpu
    torch.profiler.profile.export_chrome_trace = export_chrome_trace


def _autocast_on_the_cpu():
    """Let the GPU's autocast be the CPU's, which casts the same operations that have weights."""
    autocast = torch.amp.autocast_mode.autocast
    begin = autocast.__init__

    def begin_on_the_cpu(self, device_type, *arguments, **options):
        begin(self, "cpu" if device_type == "cuda" else device_type, *arguments, **options)

    autocast.__init__ = begin_on_the_cpu


def install():
    """Replace all of it, for the rest of this process."""
    for name, replacement in FUNCTIONS.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, replacement)
    torch.accelerator.current_stream = FUNCTIONS["current_stream"]
    torch.nn.Module.compile = compile_module
    _autocast_on_the_cpu()
    _in_every_thread()
    _replace_nccl()
    _replace_dali()
    _interpret_kernels()
    _replace_the_profiler()


def pytest_configure(config):
    install()


def pytest_terminal_summary(terminalreporter):
    told = f"warned of the sync debug mode: {State.has_warned}, of TF32: {State.compiled > 0}, events: {State.now > 0}"
    terminalreporter.write_line(f"fake GPU: {told}")
