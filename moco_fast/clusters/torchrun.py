"""torchrun without a scheduler: one script, started on every host by its number."""

from dataclasses import dataclass

from moco_fast.clusters.job import PORT, ClusterJob, commented, multi_line, network_variables, quoted, words_of

__all__ = ["Torchrun"]

_SCRIPT = """\
#!/bin/bash
{head}set -eu
rank=${{1:?"the number of this host, from 0 to {last}, is missing"}}
{exports}
exec {command}
"""


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """A script for bash."""

    first_node: str
    """Name or address by which all hosts reach the first one."""

    def text(self, job: ClusterJob) -> str:
        """Return the script."""
        head = commented(
            job,
            f"Start on every host, of which {self.first_node} is number 0: bash {job.file} NUMBER",
            "When one fails, the others end too; the same on all of them continues the run.",
        )
        run = [["torchrun", "--nnodes", str(job.nodes), "--nproc_per_node", str(job.gpus)]]
        if job.restarts:
            # The static rendezvous cannot bring restarted nodes together again.
            where = quoted(f"{self.first_node}:{PORT}")
            run.append(["--max_restarts", str(job.restarts), "--rdzv_id", job.name, "--rdzv_backend", "c10d"])
            run.append(["--rdzv_endpoint", where, "--rdzv_conf", '"is_host=$((rank == 0))"'])
        else:
            run.append(["--node_rank", '"$rank"', "--master_addr", quoted(self.first_node), "--master_port", str(PORT)])
        # Each rank stays on the cores next to its GPU, as `accelerate launch` asks for in gpu-8.yaml.
        exports = f"export ACCELERATE_CPU_AFFINITY=1 {network_variables(job)}".rstrip()
        command = multi_line([*run, *words_of(job, ["-m", "moco_fast.train"])])
        return _SCRIPT.format(head=head, last=job.nodes - 1, exports=exports, command=command)
