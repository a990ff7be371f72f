"""One rank of `run_ranks` (conftest.py): runs functions of test files in gloo process groups."""

import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Client

import torch
import torch.distributed as dist


@cache
def load(path):
    spec = importlib.util.spec_from_file_location(f"ranks_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NoProcessGroupError(Exception):
    """A process group that did not come about."""


def connect(job):
    rank, world_size = str(job["rank"]), str(job["world_size"])
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=world_size)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job['store']}",
            rank=job["rank"],
            world_size=job["world_size"],
            timeout=timedelta(seconds=job["timeout_s"]),
        )
    except RuntimeError as error:
        raise NoProcessGroupError from error


def run(job):
    connect(job)
    try:
        torch.manual_seed(0)
        return getattr(load(job["path"]), job["function"])(*job["arguments"])
    finally:
        if dist.is_initialized():  # The end of a run leaves the group, too.
            dist.destroy_process_group()


def main():
    connection = Client(sys.argv[1])
    warnings.simplefilter("error")
    while True:
        job = pickle.loads(connection.recv_bytes())
        try:
            outcome = ("result", run(job))
        except NoProcessGroupError:
            outcome = ("unconnected", traceback.format_exc())
        except BaseException:
            outcome = ("error", traceback.format_exc())
        # Not `send`, which torch makes share memory between the processes.
        connection.send_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    main()
