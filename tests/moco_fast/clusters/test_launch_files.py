"""What `moco-fast launch` writes: run by stand-ins of the schedulers, and read by the parsers that will read it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

import moco_fast
from moco_fast.cli import main
from moco_fast.commandline import parse

RECIPE = ["moco-v2", "--data.shards", "shards/my train", "--data.batch-size", "1024", "--eval.tasks", "health"]

# What each of these does of its own: srun starts a task on every node, scontrol lists nodes and queues again.
TOOLS = {
    "srun": """\
#!/bin/bash
printf '%s\\n' "$@" > srun.txt
while [[ $1 == --container* ]]; do shift; done
if [[ $1 == apptainer ]]; then while [[ $1 != bash ]]; do shift; done; fi
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
for word in "$@"; do printf '%s\\0' "$word"; done > "words-${{SLURM_NODEID:-$JOB_COMPLETION_INDEX}}"
while [[ $# -gt 0 ]]; do [[ $1 == --run.out ]] && run=$2; shift; done
mkdir -p "$run" && printf '{{\\n "outcome": "{outcome}",\\n "step": 3\\n}}\\n' > "$run/outcome.json"
exit {status}
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with the schedulers' tools in PATH; `tools` fills in what training does."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_NNODES": "3"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


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


def asked_of_accelerate(folder: Path, node: int) -> tuple[Any, Any]:
    """Return what accelerate and training read of the words that a node was given."""
    words = (folder / f"words-{node}").read_text().split("\0")[:-1]
    assert words[0] == "launch"
    options = launch_command_parser().parse_args(words[1:])
    assert options.module
    assert options.training_script == "moco_fast.train"
    return options, parse(options.training_script_args, here=False)


def test_slurm_starts_one_launcher_per_node(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools(cluster)
    words = ["--slurm", "--nodes", "3", "--gpus", "4", "--restarts", "2", "--partition", "big", "--time", "8:00:00"]
    script = written([*words, "--", *RECIPE, "--data.batch-size", "1020"], capsys)
    directives = dict(
        line[9:].split("=", 1) for line in script.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    assert {"--nodes": "3", "--ntasks-per-node": "1", "--gpus-per-node": "4"}.items() <= {
        f"--{name.lstrip('-')}": value for name, value in directives.items()
    }.items()
    assert "#SBATCH --partition=big\n" in script
    assert "#SBATCH --time=8:00:00\n" in script
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=cluster, check=True)
    for node in range(3):
        options, config = asked_of_accelerate(cluster, node)
        assert (options.num_machines, options.num_processes, options.machine_rank) == (3, 12, node)
        assert (options.main_process_ip, options.rdzv_backend, options.max_restarts) == ("node7", "c10d", 2)
        assert Path(options.config_file).name == "multi-node.yaml"
        assert Path(options.config_file).is_file()
        assert (config.data.shards, config.data.batch_size) == ("shards/my train", 1020)
        # Under the job's id, which stays the same when it is queued again.
        assert config.run.out == "runs/4711"
    assert not (cluster / "requeued.txt").exists()


@pytest.mark.parametrize(
    ("outcome", "status", "is_queued_again"), [("stopped", 1, True), ("failed", 1, False), ("finished", 0, False)]
)
def test_only_a_job_that_was_stopped_is_queued_again(
    outcome: str, status: int, is_queued_again: bool, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster, outcome=outcome, status=status)
    script = written(["--slurm", "--nodes", "2", "--", *RECIPE, "--run.out", "my runs/first"], capsys)
    done = subprocess.run(["bash", "-c", script], cwd=cluster, env=os.environ | {"SLURM_NNODES": "2"}, check=False)
    assert done.returncode == status
    assert (cluster / "requeued.txt").exists() == is_queued_again
    assert asked_of_accelerate(cluster, 1)[1].run.out == "my runs/first"


@pytest.mark.parametrize("folder", ["shards/my train", "a'b\"c", "runs/`x`", "runs/$SLURM_JOB_ID"])
@pytest.mark.parametrize("is_joined", [False, True])
def test_the_folder_of_the_run_is_what_was_given(
    folder: str, is_joined: bool, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster, outcome="stopped")
    given = [f"--run.out={folder}"] if is_joined else ["--run.out", folder]
    script = written(["--slurm", "--", *RECIPE, *given], capsys)
    subprocess.run(["bash", "-c", script], cwd=cluster, env=os.environ | {"SLURM_NNODES": "1"}, check=True)
    config = asked_of_accelerate(cluster, 0)[1]
    assert config.run.out == folder.replace("$SLURM_JOB_ID", "4711")
    # Not what else is called so.
    assert config.data.shards == "shards/my train"
    assert (cluster / "requeued.txt").exists()


def test_the_folder_of_a_file_of_options_is_kept(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools(cluster)
    (cluster / "run.yaml").write_text("recipe: moco-v2\ndata:\n  shards: x\nrun:\n  out: runs/mine\n")
    script = written(["--slurm", "--", "--config", str(cluster / "run.yaml")], capsys)
    subprocess.run(["bash", "-c", script], cwd=cluster, env=os.environ | {"SLURM_NNODES": "1"}, check=True)
    assert asked_of_accelerate(cluster, 0)[1].run.out == "runs/mine"


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_slurm_runs_the_ranks_in_an_image(container: str, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools(cluster)
    words = ["--slurm", "--image", "reg/moco:1", "--container", container, "--", *RECIPE]
    script = written(words, capsys)
    subprocess.run(["bash", "-c", script], cwd=cluster, env=os.environ | {"SLURM_NNODES": "1"}, check=True)
    given = (cluster / "srun.txt").read_text().splitlines()
    mount = f"{cluster}:{cluster}"
    if container == "pyxis":
        assert given[:3] == [
            "--container-image=reg/moco:1",
            f"--container-mounts={mount}",
            f"--container-workdir={cluster}",
        ]
    else:
        assert given[:8] == ["apptainer", "exec", "--nv", "--bind", mount, "--pwd", str(cluster), "reg/moco:1"]
    options, _ = asked_of_accelerate(cluster, 0)
    assert (options.num_processes, options.num_machines, Path(options.config_file).name) == (8, None, "gpu-8.yaml")


def test_the_script_has_no_fault_that_shellcheck_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.sbatch"
    assert main(["launch", "--slurm", "--nodes", "2", "--out", str(out), "--", *RECIPE]) == 0
    assert f"written to {out}" in capsys.readouterr().err
    assert f"# Submit with: sbatch {out}\n" in out.read_text()
    # Variables in the single-quoted command are meant for the shell of the node.
    subprocess.run([Path(sys.executable).parent / "shellcheck", "--exclude", "SC2016", str(out)], check=True)


def test_kubernetes_accepts_the_job_and_its_pods_find_each_other(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    words = ["--kubernetes", "--image", "reg/moco:1", "--claim", "data", "--nodes", "2", "--name", "first-run"]
    text = written([*words, "--", *RECIPE], capsys)
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    service, job = documents
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    for node in range(2):
        subprocess.run(
            container["args"],
            cwd=cluster,
            env={"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(node)},
            check=True,
        )
        options, config = asked_of_accelerate(cluster, node)
        assert (options.num_machines, options.num_processes, options.machine_rank) == (2, 16, node)
        # The first pod, by the name that the headless service gives it.
        assert options.main_process_ip == "first-run-0.first-run"
        assert (config.data.shards, config.run.out) == ("shards/my train", "runs/first-run")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--slurm", "--", "moco-v2", "--data.batch-size", "100", "--data.shards", "x"], "not divisible by 8 ranks"),
        (["--slurm", "--name", "My Run", "--", *RECIPE], "--name My Run: use lowercase letters"),
        (["--slurm", "--nodes", "0", "--", *RECIPE], "--nodes is 0"),
        (["--slurm", "--restarts", "-1", "--", *RECIPE], "--restarts is -1"),
        (["--slurm", "--out", "{there}/no/x", "--", *RECIPE], "there is no such folder to write to"),
        (["--slurm", "--", *RECIPE, "--batch-size", "3"], "did you mean --data.batch-size?"),
        (["--slurm", "--", *RECIPE, "--run.device", "cpu"], "leave --run.device out"),
        (["--slurm", "--", *RECIPE, "--optim.lr", "-1"], "--optim.lr"),
        (["--slurm", *RECIPE], "moco-v2 and its options are read after `--`"),
        (["--slurm", "--", *RECIPE, "--run.out"], "--run.out needs"),
        (["--slurm", "--out", "{there}", "--", *RECIPE], "is a folder: give the name of a file"),
        (["--slurm", "--claim", "x", "--", *RECIPE], "--claim is of --kubernetes"),
        (["--slurm", "--time", "soon", "--", *RECIPE], "--time soon: give it as Slurm does"),
        (["--slurm", "--partition", "a b", "--", *RECIPE], "no space"),
        (["--kubernetes", "--image", "x", "--claim", "x", "--time", "1", "--", *RECIPE], "--time is of --slurm"),
        (["--kubernetes", "--claim", "x", "--", *RECIPE], "--image is missing"),
        (["--kubernetes", "--image", "x", "--", *RECIPE], "--claim is missing"),
    ],
)
def test_what_would_fail_there_is_refused_here(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *(word.format(there=tmp_path) for word in words)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--", *RECIPE], ["--slurm", "--kubernetes", "--", *RECIPE]])
def test_one_scheduler_is_chosen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", *words])
    assert ended.value.code == 2
    assert "slurm" in capsys.readouterr().err
