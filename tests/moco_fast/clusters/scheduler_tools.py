"""Stand-ins for what schedulers bring to a node, and what the commands that they run are given."""

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import moco_fast
from moco_fast.cli import main
from moco_fast.commandline import parse
from moco_fast.config import Config

RECIPE = ["moco-v2", "--data.shards", "shards/my train", "--data.batch-size", "1024", "--eval.tasks", "health"]

# What each of these does of its own: srun starts a task on every node, scontrol lists nodes and queues again.
TOOLS = {
    "srun": """\
#!/bin/bash
printf '%s\\n' "$@" > srun.txt
while [[ $1 == --* ]]; do shift; done
if [[ $1 == apptainer ]]; then until [[ $# == 0 || $1 =~ ^(bash|make-shards)$ ]]; do shift; done; fi
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_NNODES; SLURM_NODEID++)); do
    export SLURM_NODEID
    "$@" || failed=1
done
exit ${failed:-0}
""",
    "scontrol": """\
#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'node%s\\n' 7 8 9 ;;
    requeue*) echo "$2" >> requeued.txt ;;
    *) exit 1 ;;
esac
""",
    "moco-fast": """\
#!/bin/bash
[[ $1 == config-path ]] && echo "{launch}/$2.yaml"
""",
    "accelerate": """\
#!/bin/bash
node=${{SLURM_NODEID:-${{JOB_COMPLETION_INDEX:-${{PET_NODE_RANK:-${{SKYPILOT_NODE_RANK:-0}}}}}}}}
for word in "$@"; do printf '%s\\0' "$word"; done > "words-$node"
while [[ $# -gt 0 ]]; do [[ $1 == --run.out ]] && run=$2; shift; done
mkdir -p "$run" && printf '{{\\n "outcome": "{outcome}",\\n "step": 3\\n}}\\n' > "$run/outcome.json"
exit {status}
""",
    "torchrun": """\
#!/bin/bash
printf '%s\\0' "$@" > "words-of-$$"
""",
    "make-shards": """\
#!/bin/bash
printf '%s\\0' "$@" >> packed.txt
echo >> packed.txt
""",
}


def tools(folder: Path, *, outcome: str = "finished", status: int = 0) -> None:
    launch = Path(moco_fast.__file__).parent / "launch"
    for name, text in TOOLS.items():
        file = folder / "bin" / name
        is_form = "{launch}" in text or "{outcome}" in text
        file.write_text(text.format(launch=launch, outcome=outcome, status=status) if is_form else text)
        file.chmod(0o755)


def written(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["launch", *words]) == 0
    return capsys.readouterr().out


def asked_of_accelerate(folder: Path, node: int) -> tuple[Any, Config]:
    """Return what accelerate and training read of the words that a node was given."""
    words = (folder / f"words-{node}").read_text().split("\0")[:-1]
    assert words[0] == "launch"
    options = launch_command_parser().parse_args(words[1:])
    assert options.module
    assert options.training_script == "moco_fast.train"
    return options, parse(options.training_script_args, here=False)


def packings(folder: Path) -> list[list[str]]:
    """Return what `make-shards` was given, each time."""
    return [line.split("\0")[:-1] for line in (folder / "packed.txt").read_text().splitlines()]
