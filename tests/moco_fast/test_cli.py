import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

import moco_fast
from moco_fast.cli import main
from moco_fast.commands.config_path import LaunchConfig
from moco_fast.commands.preview import Preview
from moco_fast.commands.report import Report
from moco_fast.evaluation.registry import TASKS
from moco_fast.needs import OF_TRAINING
from moco_fast.presets import PRESETS
from pipelines.config import VIEWS, Color

COMMANDS = ("eval", *(f"eval {task}" for task in (*TASKS, "suite", "paper")))
COMMANDS += (
    "train",
    "train demo",
    "embed",
    "search",
    "explore",
    "transfer detect",
    "transfer segment",
    "preview",
    "report",
    "runs",
    "export",
    "bench",
)
COMMANDS += ("config-path",)


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_help_answers_without_loading_torch(words: str) -> None:
    program = f"""
import sys
from moco_fast.cli import main
try:
    code = main({[*words.split(), "--help"]!r})
except SystemExit as left:
    code = left.code
heavy = [name for name in ("torch", "nvidia.dali", "timm", "matplotlib", "numpy") if name in sys.modules]
sys.exit(f"loaded {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: moco-fast" in done.stdout
    unnamed = [line for line in done.stdout.splitlines() if line.startswith(("│ STR", "│ [[STR", "│ [STR"))]
    assert not unnamed, "arguments that the usage line does not name"
    assert not {"STR", "INT", "FLOAT", "PATH"} & set(re.split(r"[\s|\[\]]+", done.stdout))


def test_completion_in_bash_knows_the_options_of_training(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    words = [sys.executable, "-m", "moco_fast.cli", "--tyro-print-completion", "bash"]
    script.write_text(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    asked = f"source {script}; COMP_WORDS=(moco-fast train demo --data.sha); COMP_CWORD=3; _tyro_moco_fast"
    answer = subprocess.run(
        ["bash", "-c", f"{asked}; echo ${{COMPREPLY[@]}}"], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "--data.shards\n"


@pytest.mark.parametrize("name", get_args(LaunchConfig))
def test_a_configuration_of_accelerate_is_where_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-path", name]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.is_absolute()
    assert "compute_environment" in path.read_text()
    assert sorted(each.stem for each in path.parent.iterdir()) == sorted(get_args(LaunchConfig))


@pytest.mark.parametrize("program", ["moco_fast.cli", "moco_fast.cli train", "moco_fast.train", "shards.cli"])
def test_every_program_says_its_version(program: str) -> None:
    words = [sys.executable, "-m", *program.split(), "--version"]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert said.split()[-1] == moco_fast.__version__


@pytest.mark.parametrize("name", ["pipelines", "shards"])
def test_a_package_that_hides_one_of_ours_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    root = Path(moco_fast.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}

    def start(**variables: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "moco_fast.train", "--help"]
        return subprocess.run(
            words, cwd=tmp_path, env=environment | variables, check=False, capture_output=True, text=True
        )

    refused = start()
    assert refused.returncode == 1
    assert f"{tmp_path / name}/__init__.py hides the package '{name}'" in refused.stderr
    assert start(PYTHONSAFEPATH="1").returncode == 0


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert {name.split()[0] for name in COMMANDS} <= set(printed.replace(",", " ").replace("{", " ").split())
    assert "Draw the views" in printed


@pytest.mark.parametrize("words", [["fly"], ["eval", "fly"], ["eval fly", "--x"], []])
def test_an_unknown_command_is_refused_with_those_that_are_known(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert ("knn" if words[:1] == ["eval"] else "eval, embed") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("eval knn --encoder {nowhere}", "nowhere does not exist"),
        ("report {nowhere}", "is not a run's folder"),
        ("export {nowhere} --out {there}/x", "nowhere does not exist: give a run's folder"),
        ("preview {nowhere} --out {there}/x.png", "not a folder"),
        ("preview {nowhere} --views moco-v9 --out {there}/x.png", "choose one of moco-v1"),
        ("train demo --data.shards {nowhere} --batch_size=8", "did you mean --data.batch-size?"),
        ("train demo --no-compile", "did you mean --run.no-compile?"),
        ("train demo --log.no-tensorboard", "--log.no-tensorboard is now --log.trackers"),
        ("train demo --data.shards {nowhere}", "nowhere has no manifest.json"),
        ("preview {nowhere} --out {there}/x.tiff", "name a .png"),
        ("eval knn --encoder {run} --k 0", "--k is 0"),
        ("eval knn --encoder {run} --test {nowhere}", "nowhere is not a folder"),
        ("eval knn --encoder {run} --seeds 3", "--seeds 3 means nothing beside knn"),
        ("eval health --encoder {run} --test {nowhere}", "nowhere means nothing here: health"),
        ("eval linear --encoder {run} --seeds 0", "--seeds is 0"),
        ("eval knn --encoder {run} --crop 1.5", "--crop is 1.5"),
        ("eval knn --encoder {run} --out {nowhere}/x.json", "there is no such folder"),
        ("eval knn --encoder {run} --precision fp16 --device cpu", "--precision fp16 needs a GPU"),
        ("eval suite --encoder {run} --data {nowhere}", "has no set in a folder `train`"),
        ("eval suite --encoder {run} --tasks fly", "there is no task 'fly'"),
        ("eval paper {nowhere}", "does not exist"),
        ("eval knn --checkpoint {run}", "--checkpoint is now --encoder"),
        ("eval knn --encoder {run} --bank-shards x", "--bank-shards is now --train"),
        ("eval knn --encoder {run} --query_shards=x", "--query-shards is now --test"),
        ("eval knn --encoder {run} --json", "--json is now --out -"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(
    words: str, says: str, tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"nowhere": tmp_path / "nowhere", "there": tmp_path, "run": finished_run}
    assert main(words.format(**places).split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("color", ["torchvision", "linear"])
def test_preview_writes_a_sheet(
    color: Color, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.preview import draw, sheet
    from shards.sets import open_set

    out = tmp_path / "sheet.png"
    words = ["preview", str(packed_demo.train), "--views", "cifar10", "--num", "4", "--seed", "5", "--out", str(out)]
    assert main(words if color == "torchvision" else [*words, "--color", color]) == 0
    views = replace(VIEWS["cifar10"], color=color)
    expected = sheet(draw(open_set(packed_demo.train), views, seed=5, epoch=0, indices=[0, 96, 191, 287]))
    with Image.open(out) as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))
    assert "seed 5" in capsys.readouterr().out


def test_preview_draws_the_views_and_the_seed_of_a_run(packed_demo: Any, tmp_path: Path) -> None:
    from pipelines.preview import draw, sheet
    from shards.sets import open_set

    file, out = tmp_path / "run.yaml", tmp_path / "sheet.png"
    small = {"crop_scale": [0.05, 0.25]}
    views = {"size": 48, "num_small": 3, "small_size": 24, "small": small}
    file.write_text(json.dumps({"recipe": "moco-v2-multicrop", "views": views, "run": {"seed": 7}}))
    assert main(["preview", str(packed_demo.train), "--config", str(file), "--num", "2", "--out", str(out)]) == 0
    recipe = VIEWS["moco-v2-multicrop"]
    wanted = replace(recipe, size=48, num_small=3, small_size=24, small=replace(recipe.small, crop_scale=(0.05, 0.25)))
    previews = draw(open_set(packed_demo.train), wanted, seed=7, epoch=0, indices=[0, 287])
    assert [view.shape[0] for view in previews[0].views] == [48, 48, 24, 24, 24]
    with Image.open(out) as written:
        assert np.array_equal(np.asarray(written), np.asarray(sheet(previews)))


def test_preview_leaves_out_views_that_the_method_does_not_use(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: memory-bank")
    asked = Preview(shards="", out="", config=str(file))
    assert asked._specs_and_seed() == (PRESETS["memory-bank"][1].views.specs[:1], 0)
    with pytest.raises(ValueError, match="--views moco-v1 means nothing beside --config"):
        replace(asked, views="moco-v1").execute()


@pytest.mark.parametrize("name", sorted({*VIEWS, *PRESETS}))
def test_preview_takes_recipes_of_views_and_of_training(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        Preview(shards=str(tmp_path / "nowhere"), out=str(tmp_path / "x.png"), views=name).execute()


@pytest.mark.parametrize("words", ["train demo --data.shards {shards}", "export {shards} --out x", "report {run}"])
def test_what_is_not_installed_is_named(words: str, packed_demo: Any, finished_run: Path) -> None:
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "jinja2"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from moco_fast.cli import main
sys.exit(main({words.format(shards=packed_demo.train, run=finished_run).split()!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: (torch|jinja2) is not installed: pip install 'moco-fast\[gpu\]'.*\n", done.stderr)


def test_the_packer_needs_nothing_of_training(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    program = f"""
import sys
from moco_fast.needs import OF_TRAINING
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (*OF_TRAINING, "nvidia"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from shards.cli import main
sys.exit(main(["pack", {str(tmp_path / "one.png")!r}, "--out", {str(tmp_path / "out")!r}, "--workers", "1"]))
"""
    (tmp_path / "list.txt").write_text("one.png\n")
    program = program.replace("one.png", "list.txt")
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_extra_for_training_is_what_is_named() -> None:
    project = tomllib.loads((Path(moco_fast.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = [re.split(r"[<>=\[]", line)[0] for line in project["optional-dependencies"]["train"]]
    assert [{"scikit-learn": "sklearn"}.get(name, name) for name in extra] == list(OF_TRAINING)


def test_export_writes_and_tells_how_to_load(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoder"
    assert main(["export", str(finished_run), "--out", str(out)]) == 0
    assert (out / "model.safetensors").is_file()
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in capsys.readouterr().out


def test_report_prints_its_path_after_the_next_commands(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(own_run), "--num-samples", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Report: {own_run / 'report.html'}"
    assert f"moco-fast eval knn --encoder {own_run} --beside untrained" in printed
    longer = next(line for line in printed.splitlines() if "moco_fast.train" in line)
    assert longer.count("--run.out ") == longer.count("--run.steps ") == 1
    assert longer.endswith("-steps")


def test_a_missing_gpu_is_told(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["report", str(finished_run), "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_an_interrupted_command_says_so_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_self: Report) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "execute", interrupted)
    assert main(["report", "x"]) == 130
