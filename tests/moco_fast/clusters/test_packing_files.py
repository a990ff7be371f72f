"""What `moco-fast launch` writes for packing: run by stand-ins, read by make-shards' own parser and Ray's schema."""

import json
import os
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from moco_fast.cli import main
from shards.cli import parse_pack
from tests.moco_fast.clusters.scheduler_tools import packings, tools, written

PACK = ["make-shards", "pack", "s3://bucket/my photos", "--labels", "none", "--out", "s3://bucket/shards"]


def parts_of(folder: Path) -> list[str | None]:
    """Return the parts that were packed, of which each has to have the words of PACK."""
    parts: list[str | None] = []
    for command, *words in packings(folder):
        assert command == "pack"
        options = parse_pack(words)
        assert (options.sources, options.labels, options.out) == (("s3://bucket/my photos",), "none", PACK[-1])
        parts.append(options.part)
    return parts


@pytest.mark.parametrize(("parts", "tasks"), [(3, 3), (2300, 1000)])
def test_an_array_writes_every_part_once_within_the_size_that_slurm_allows(
    parts: int, tasks: int, cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    monkeypatch.setenv("SLURM_NNODES", "1")
    script = written(["--slurm", "--nodes", "8", "--parts", str(parts), "--cpus", "4", "--", *PACK], capsys)
    assert f"#SBATCH --array=0-{tasks - 1}%8\n" in script
    assert "#SBATCH --cpus-per-task=4\n" in script
    for task in (0, 1, tasks - 1):
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", "-c", script], cwd=cluster, env=env, check=True)
    expected = [f"{part}/{parts}" for task in (0, 1, tasks - 1) for part in range(task, parts, tasks)]
    assert parts_of(cluster) == expected


def test_an_array_task_that_fails_ends_with_its_status(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    (cluster / "bin" / "make-shards").write_text("#!/bin/bash\nexit 1\n")
    monkeypatch.setenv("SLURM_NNODES", "1")
    script = written(["--slurm", "--parts", "9", "--", *PACK], capsys)
    env = os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    assert subprocess.run(["bash", "-c", script], cwd=cluster, env=env, check=False).returncode == 1


def test_an_array_task_whose_time_is_over_is_queued_again(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    # Slurm sends USR1 to the batch shell (--signal=B:USR1), here in the middle of a part.
    (cluster / "bin" / "make-shards").write_text('#!/bin/bash\nkill -USR1 "$SHELL_OF_JOB"\nexec sleep 600\n')
    monkeypatch.setenv("SLURM_NNODES", "1")
    script = written(["--slurm", "--parts", "9", "--", *PACK], capsys)
    assert "#SBATCH --signal=B:USR1@120\n" in script
    script = script.replace("set -eu\n", "set -eu\nexport SHELL_OF_JOB=$$\ntrap 'kill $(jobs -p)' EXIT\n")
    env = os.environ | {"SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(["bash", "-c", script], cwd=cluster, env=env, check=False)
    assert (cluster / "requeued.txt").read_text() == "4711\n"


@pytest.mark.parametrize("image", [[], ["--image", "reg/moco:1"], ["--image", "x.sif", "--container", "apptainer"]])
def test_an_array_says_how_the_set_is_finished(
    image: list[str], cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    monkeypatch.setenv("SLURM_NNODES", "1")
    script = written(["--slurm", "--parts", "9", *image, "--", *PACK], capsys)
    [line] = [line for line in script.splitlines() if "--wrap" in line]
    program, dependency, option, wrapped = shlex.split(line.removeprefix("#"))
    assert (program, dependency, option) == ("sbatch", "--dependency=afterok:$job", "--wrap")
    subprocess.run(["bash", "-c", wrapped], cwd=cluster, check=True)
    assert packings(cluster) == [["finish", "s3://bucket/shards"]]


def test_kubernetes_packs_every_part_and_then_finishes(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools(cluster)
    words = ["--kubernetes", "--image", "reg/moco:1", "--secret", "keys", "--nodes", "2", "--parts", "3", "--name", "p"]
    text = written([*words, "--namespace", "vision", "--", *PACK], capsys)
    pack, finish = yaml.safe_load_all(text)
    for job in (pack, finish):
        kubernetes_validate.validate(job, "1.34", strict=True)
        assert job["metadata"]["namespace"] == "vision"
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert (pack["spec"]["completions"], pack["spec"]["parallelism"]) == (3, 2)
    assert finish["spec"]["suspend"]
    assert f'patch job/{finish["metadata"]["name"]} -p \'{{"spec": {{"suspend": false}}}}\'' in text
    for index in range(3):
        args = pack["spec"]["template"]["spec"]["containers"][0]["args"]
        env = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index)}
        subprocess.run(args, cwd=cluster, env=env, check=True)
    assert parts_of(cluster) == ["0/3", "1/3", "2/3"]
    (cluster / "packed.txt").unlink()
    args = finish["spec"]["template"]["spec"]["containers"][0]["args"]
    subprocess.run(args, cwd=cluster, env={"PATH": os.environ["PATH"]}, check=True)
    assert packings(cluster) == [["finish", "s3://bucket/shards"]]


@pytest.mark.parametrize(
    ("machines", "workers"),
    [
        (["--nodes", "8", "--infra", "aws/us-east-1", "--instance", "m7i.8xlarge"], 7),
        (["--hosts", "a", "b", "c"], 2),
    ],
)
def test_ray_accepts_the_cluster_and_packs_on_it(
    machines: list[str], workers: int, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    text = written(["--ray", *machines, "--", *PACK], capsys)
    spec = find_spec("ray.autoscaler")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(text)
    jsonschema.validate(config, schema)
    assert config["max_workers"] == workers
    if types := config.get("available_node_types"):
        assert config["head_node_type"] in types
        # ray/autoscaler/_private/util.py, validate_config: or it is refused.
        assert sum(kind["min_workers"] for kind in types.values()) <= workers
    [line] = [line for line in text.splitlines() if line.startswith("# Pack with: ")]
    *_, file, command = shlex.split(line.removeprefix("# Pack with: "))
    assert file == "moco-fast.yaml"
    subprocess.run(["bash", "-c", command], cwd=cluster, check=True)
    [[_, *words]] = packings(cluster)
    options = parse_pack(words)
    assert (options.executor, options.sources, options.out) == ("ray", ("s3://bucket/my photos",), "s3://bucket/shards")


@pytest.mark.parametrize(
    "name",
    ["it's", 'a"b', "a`touch made`b", "a\\b", "x=y z;#", "!x", "$5", "a$", "$(touch made)", "`a$(touch made)'b\""],
)
@pytest.mark.parametrize("scheduler", [["--slurm"], ["--kubernetes", "--image", "i"], ["--ray", "--hosts", "a"]])
def test_names_reach_the_command_as_they_are(
    scheduler: list[str], name: str, cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    monkeypatch.setenv("SLURM_NNODES", "1")
    words = ["pack", f"photos/{name}", "--labels", "none", "--out", f"shards/{name}"]
    text = written([*scheduler, "--", "make-shards", *words], capsys)
    if scheduler[0] == "--slurm":
        [line] = [line for line in text.splitlines() if "--wrap" in line]
        commands = [["bash", "-c", text], ["bash", "-c", shlex.split(line.removeprefix("#"))[-1]]]
    elif scheduler[0] == "--kubernetes":
        jobs = yaml.safe_load_all(text)
        commands = [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs]
    else:
        [line] = [line for line in text.splitlines() if line.startswith("# Pack with: ")]
        # The shell here first, as it is what starts `ray exec`.
        (cluster / "bin" / "ray").write_text('#!/bin/bash\nexec bash -c "$3"\n')
        (cluster / "bin" / "ray").chmod(0o755)
        commands = [["bash", "-c", line.removeprefix("# Pack with: ")]]
    for command in commands:
        env = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "JOB_COMPLETION_INDEX": "0"}
        subprocess.run(command, cwd=cluster, env=env, check=True)
    packed, *finished = packings(cluster)
    assert packed[: len(words)] == words
    assert finished in ([], [["finish", f"shards/{name}"]])
    assert not (cluster / "made").exists()


@pytest.mark.parametrize("name", ["$HOME/x y", "${HOME}/`x`$5"])
def test_variables_are_those_of_the_machines(
    name: str, cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools(cluster)
    monkeypatch.setenv("HOME", "/there")
    text = written(["--kubernetes", "--image", "i", "--", "make-shards", "pack", name, "--out", "out"], capsys)
    args = next(yaml.safe_load_all(text))["spec"]["template"]["spec"]["containers"][0]["args"]
    subprocess.run(args, cwd=cluster, env=os.environ | {"JOB_COMPLETION_INDEX": "0"}, check=True)
    text = written(["--ray", "--hosts", "a", "--", "make-shards", "pack", name, "--out", "out"], capsys)
    [line] = [line for line in text.splitlines() if line.startswith("# Pack with: ")]
    subprocess.run(["bash", "-c", shlex.split(line.removeprefix("# "))[-1]], cwd=cluster, check=True)
    expected = name.replace("${HOME}", "$HOME").replace("$HOME", "/there")
    assert [words[1] for words in packings(cluster)] == [expected, expected]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--slurm", "--", *PACK, "--part", "0/3"], "--part is what this command writes"),
        (["--slurm", "--", *PACK, "--executor", "ray"], "--executor is what this command writes"),
        (["--slurm", "--", *PACK, "--dry-run"], "--dry-run writes nothing"),
        (["--slurm", "--", "make-shards", "verify", "x"], "pack alone is launched"),
        (["--slurm", "--gpus", "4", "--", *PACK], "--gpus is for a recipe and does nothing with `make-shards pack`"),
        (["--slurm", "--parts", "0", "--", *PACK], "--parts is 0"),
        (["--sky", "--", *PACK], "--sky starts a recipe, not `make-shards pack`: for that use --slurm, --kubernetes"),
        (["--slurm", *PACK], "make-shards and its options are read after `--`"),
        (["--ray", "--", *PACK], "--ray needs machines: give --infra aws/REGION"),
        (["--ray", "--infra", "gcp/x", "--", *PACK], "--ray needs machines"),
        (["--ray", "--infra", "aws/x", "--", *PACK], "--instance is missing"),
        (["--ray", "--hosts", "a", "--nodes", "3", "--", *PACK], "--hosts are own machines"),
        (["--kubernetes", "--", *PACK], "--image is missing"),
    ],
)
def test_what_packing_would_refuse_there_is_refused_here(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *words]) == 2
    assert says in capsys.readouterr().err


def test_options_that_packing_does_not_know_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--slurm", "--", *PACK, "--quality", "0"])
    assert ended.value.code == 2
    assert "--quality 0 must be" in capsys.readouterr().err
