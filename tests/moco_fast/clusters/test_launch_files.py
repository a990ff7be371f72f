"""What `moco-fast launch` writes: run by stand-ins of the schedulers, and read by the parsers that will read it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from moco_fast.cli import main
from moco_fast.clusters.registry import PACKS, TRAINS
from moco_fast.commandline import parse
from tests.moco_fast.clusters.forms import COMPOSE, SKY_TASK, TRAIN_JOB, TRAINING_RUNTIME, problems
from tests.moco_fast.clusters.scheduler_tools import RECIPE, asked_of_accelerate, tools, written

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "deploy" / "clusters").iterdir())


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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_what_their_commands_write(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text()
    [line] = [line for line in text.splitlines() if line.startswith("# Made by: ")]
    program, *words = shlex.split(line.removeprefix("# Made by: "))
    assert program == "moco-fast"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deploy" / "clusters").mkdir(parents=True)
    assert main(words) == 0
    assert (tmp_path / path.relative_to(ROOT)).read_text() == text


def test_there_is_an_example_for_every_scheduler() -> None:
    commands = [path.read_text().partition("# Made by: ")[2].split(" ")[:3] for path in EXAMPLES]
    assert {command[2].removeprefix("--") for command in commands} == {*TRAINS, *PACKS}


@pytest.mark.parametrize("word", ["a\nrm -rf x", "a\r\nb"])
def test_nothing_of_the_options_leaves_the_comments(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = written(["--slurm", "--", *RECIPE, "--run.out", word], capsys)
    before = script.partition("\nset -u\n")[0]
    assert all(line.startswith("#") or not line for line in before.splitlines())


def test_kubeflow_accepts_the_job_and_its_pods_find_each_other(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    words = ["--trainjob", "--image", "reg/moco:1", "--claim", "data", "--nodes", "2", "--secret", "keys"]
    runtime, job = yaml.safe_load_all(written([*words, "--namespace", "vision", "--", *RECIPE], capsys))
    assert problems(runtime, TRAINING_RUNTIME) == problems(job, TRAIN_JOB) == []
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["metadata"]["namespace"] == runtime["metadata"]["namespace"] == "vision"
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # What Trainer looks for: pkg/constants/constants.go.
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = node["template"]["spec"]["template"]["spec"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": node["template"]["spec"]}
    kubernetes_validate.validate(inner, "1.34", strict=True)
    [container] = pod["containers"]
    assert container["name"] == "node"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    for rank in range(2):
        # Trainer's torch plugin sets these (pkg/runtime/framework/plugins/torch/torch.go).
        env = {"PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "j-node-0-0.j", "PET_MASTER_PORT": "29500"}
        subprocess.run(container["args"], cwd=cluster, env={"PATH": os.environ["PATH"], **env}, check=True)
        options, config = asked_of_accelerate(cluster, rank)
        assert (options.num_machines, options.num_processes, options.machine_rank) == (2, 16, rank)
        assert (options.main_process_ip, options.main_process_port) == ("j-node-0-0.j", 29500)
        assert config.run.out == "runs/moco-fast"


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_accepts_the_task_and_its_machines_find_each_other(
    nodes: int, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    words = ["--sky", "--spot", "--gpu", "A100", "--infra", "aws/us-east-1", "--nodes", str(nodes)]
    mirror = ["--checkpoint.mirror", "s3://bucket/first"]
    volume = ["--claim", "shared", "--mount", str(cluster)] if nodes == 2 else []
    task = yaml.safe_load(written([*words, *volume, "--", *RECIPE, *mirror], capsys))
    assert problems(task, SKY_TASK) == []
    assert task["resources"] == {"accelerators": "A100:8", "use_spot": True, "infra": "aws/us-east-1"}
    assert task.get("volumes", {}) == ({str(cluster): "shared"} if nodes == 2 else {})
    for rank in range(nodes):
        # sky/skylet/constants.py
        env = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
        subprocess.run(["bash", "-c", task["run"]], cwd=cluster, env={"PATH": os.environ["PATH"], **env}, check=True)
        options, config = asked_of_accelerate(cluster, rank)
        expected = (2, 16, rank, "10.0.0.1") if nodes == 2 else (None, 8, None, None)
        found = (options.num_machines, options.num_processes, options.machine_rank, options.main_process_ip)
        assert found == expected
        assert config.checkpoint.mirror == "s3://bucket/first"


def test_compose_accepts_the_file_and_starts_the_ranks(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools(cluster)
    file = yaml.safe_load(written(["--compose", "--image", "moco-fast", "--gpus", "4", "--", *RECIPE], capsys))
    assert problems(file, COMPOSE) == []
    service = file["services"]["train"]
    assert {volume.partition(":")[0] for volume in service["volumes"]} - set(file["volumes"]) == {"."}
    assert service["read_only"]
    # Compose makes one sign of two, and a variable of what follows a single one.
    command = [word.replace("$$", "\0") for word in service["command"]]
    assert not any("$" in word for word in command)
    words = [word.replace("\0", "$") for word in command]
    subprocess.run(words, cwd=cluster, env={"PATH": os.environ["PATH"]}, check=True)
    options, config = asked_of_accelerate(cluster, 0)
    assert (options.num_processes, Path(options.config_file).name) == (4, "gpu-8.yaml")
    assert config.data.shards == "shards/my train"


@pytest.mark.parametrize("restarts", [0, 2])
def test_torchrun_is_started_on_each_host_by_its_number(
    restarts: int, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    words = ["--torchrun", "--nodes", "2", "--first-node", "node0", "--restarts", str(restarts), "--interface", "eth1"]
    script = written([*words, "--", *RECIPE], capsys)
    (cluster / "env.sh").write_text("#!/bin/bash\n" + script)
    for rank in range(2):
        subprocess.run(["bash", "env.sh", str(rank)], cwd=cluster, check=True)
        [words_file] = cluster.glob("words-of-*")
        given = words_file.read_text().split("\0")[:-1]
        words_file.unlink()
        options = get_args_parser().parse_args(given)
        assert (options.nnodes, options.nproc_per_node, options.module) == ("2", "8", True)
        config = parse(options.training_script_args, here=False)
        assert (config.data.shards, config.run.out) == ("shards/my train", "runs/moco-fast")
        if restarts:
            meeting = (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_conf, options.max_restarts)
            assert meeting == ("c10d", "node0:29500", f"is_host={1 - rank}", 2)
        else:
            assert (options.node_rank, options.master_addr, options.master_port) == (rank, "node0", 29500)
    failed = subprocess.run(["bash", "env.sh"], cwd=cluster, check=False, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "the number of this host, from 0 to 1, is missing" in failed.stderr


@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        ("--slurm", []),
        ("--torchrun", ["--first-node", "a"]),
        ("--sky", ["--claim", "x"]),
        ("--kubernetes", ["--image", "x", "--claim", "x"]),
    ],
)
def test_the_network_is_named_for_gloo_and_nccl(
    scheduler: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = written([scheduler, *more, "--nodes", "2", "--interface", "eth1", "--", *RECIPE], capsys)
    # NCCL would take eth1 for eth10, too; gloo takes a name as it is.
    assert "GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME==eth1\n" in text.replace("'\\''", "")


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
        (["--slurm", "--claim", "x", "--", *RECIPE], "--claim is of --kubernetes, --trainjob, --sky and does"),
        (
            ["--slurm", "--parts", "3", "--", *RECIPE],
            "--parts is for `make-shards pack` and does nothing with a recipe",
        ),
        (["--ray", "--", *RECIPE], "--ray starts `make-shards pack`, not a recipe: for that use --slurm, --kubernetes"),
        (["--compose", "--image", "x", "--nodes", "2", "--", *RECIPE], "--nodes is of --slurm"),
        (["--compose", "--", *RECIPE], "--image is missing"),
        (["--torchrun", "--", *RECIPE], "--first-node is missing"),
        (["--sky", "--", *RECIPE], "lost with its machine: give --checkpoint.mirror"),
        (["--sky", "--nodes", "2", "--", *RECIPE, "--checkpoint.mirror", "s3://b/x"], "--claim is missing"),
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
