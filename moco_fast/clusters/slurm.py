"""Slurm: batch scripts that go on under their job's id when it is queued again; arrays of packing parts."""

from dataclasses import dataclass, replace
from typing import Literal

from moco_fast.clusters.job import GRACE_S, ClusterJob, PackingJob, commented, node_script, quoted

__all__ = ["Container", "Slurm"]

Container = Literal["pyxis", "apptainer"]

_MAX_ARRAY_TASKS = 1000
"""What Slurm's own default of MaxArraySize (1001) allows."""

# Slurm substitutes nothing in #SBATCH lines but its own patterns: %x is the job's name, %j its id, %A and %a those of
# an array and of the task in it.
_TRAINING = """\
#!/bin/bash
{head}#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --signal=TERM@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
{more}
set -u
run={run}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export run first_node

srun {srun}bash -c '
{script}'
status=$?

# Slurm queues a job again by itself after a preemption or when a node fails, but not when its time is over.
if grep -qs '"outcome": "stopped"' "$run/outcome.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""

# A task of the array takes every TASKS-th part, so that there may be more parts than tasks. The shell that waits is
# told by --signal=B when time is nearly over; what it started is ended with the job, and a part goes on where it was.
_PACKING = """\
#!/bin/bash
{head}#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{at_once}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --signal=B:USR1@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
{more}
set -eu
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
for ((part = SLURM_ARRAY_TASK_ID; part < {parts}; part += {tasks})); do
    export part
    srun --cpus-per-task={cpus} {srun}bash -c '
exec {command}
' &
    wait $!
done
"""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Scripts for `sbatch`."""

    time: str
    """Time limit, as Slurm writes it."""
    partition: str | None = None
    account: str | None = None
    image: str | None = None
    """Image that the work is done in; None: what is installed on the nodes."""
    container: Container = "pyxis"
    """What runs images there."""

    def text(self, job: ClusterJob) -> str:
        """Return the script that trains."""
        head = commented(
            job,
            f"Submit with: sbatch {job.file}",
            "When its time is nearly over or it is preempted, the ranks save and stop, and the job is queued again;",
            "under the same id it continues the same run. `scancel` ends it.",
        )
        words = list(job.words)
        place = words.index("--run.out") + 1
        run, words[place] = words[place], "$run"
        script = node_script(replace(job, words=tuple(words)), rank='"$SLURM_NODEID"', first='"$first_node"')
        return _TRAINING.format(
            head=head,
            name=job.name,
            nodes=job.nodes,
            gpus=job.gpus,
            time=self.time,
            grace=GRACE_S,
            more=self._more(),
            run=quoted(run),
            srun=self._srun(),
            script=_inside_single_quotes(script),
        )

    def packing(self, job: PackingJob) -> str:
        """Return the script of an array job, which packs."""
        tasks = min(job.parts, _MAX_ARRAY_TASKS)
        head = commented(
            job,
            f"Submit with: job=$(sbatch --parsable {job.file})",
            f"             sbatch --dependency=afterok:$job --wrap {quoted(f'srun {self._srun()}{job.finish}')}",
            "A task that dies or is preempted, or whose time is over, is queued again and goes on where it was.",
        )
        return _PACKING.format(
            head=head,
            name=job.name,
            last=tasks - 1,
            at_once=job.nodes,
            cpus=job.cpus,
            time=self.time,
            grace=GRACE_S,
            more=self._more(),
            parts=job.parts,
            tasks=tasks,
            srun=self._srun(),
            command=_inside_single_quotes(job.command("$part")),
        )

    def _more(self) -> str:
        given = {"partition": self.partition, "account": self.account}
        return "".join(f"#SBATCH --{option}={value}\n" for option, value in given.items() if value is not None)

    def _srun(self) -> str:
        if self.image is None:
            return ""
        if self.container == "pyxis":
            return f'--container-image={quoted(self.image)} --container-mounts="$PWD:$PWD" --container-workdir="$PWD" '
        return f'apptainer exec --nv --bind "$PWD:$PWD" --pwd "$PWD" {quoted(self.image)} '


def _inside_single_quotes(text: str) -> str:
    return text.replace("'", "'\\''")
