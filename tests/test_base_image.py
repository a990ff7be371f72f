"""What the Dockerfile adds to a base image leaves torch, torchvision, DALI and apex as they are."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "deploy" / "base_image.py"

NGC = {
    "apex": "0.1",
    "numpy": "2.1.0",
    "nvidia-dali-cuda130": "2.5.0",
    "nvidia-nccl-cu13": "2.30.4",
    "pillow": "12.0.0",
    "torch": "2.13.0a0+9186a08b2c.nv26.07",
    "torchvision": "0.28.0a0+6f4a2c1",
    "tqdm": "4.60.0",
}
DEPENDENCIES = [
    "numpy>=2.1",
    "nvidia-dali-cuda130>=2.4,<3",
    "pillow>=11",
    "torch>=2.11,<2.14",
    "torchvision>=0.26,<0.29",
]
DEPENDENCIES += ["timm>=1.0.31,<2", "tqdm>=4.66"]
LOCK = {
    "numpy": "2.4.6",
    "nvidia-dali-cuda130": "2.4.0",
    "pillow": "12.3.0",
    "torch": "2.13.0",
    "torchvision": "0.28.0",
}
LOCK |= {"timm": "1.0.31", "tqdm": "4.70.1", "safetensors": "0.8.0"}


@pytest.fixture(scope="module")
def base_image():
    spec = importlib.util.spec_from_file_location("base_image", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["base_image"] = module
    spec.loader.exec_module(module)
    return module


def test_installs_what_is_missing_or_too_old_and_pins_what_must_stay(base_image):
    plan = base_image.make_plan(NGC, DEPENDENCIES, LOCK)
    assert plan.requirements == ["timm==1.0.31", "tqdm==4.70.1"]
    for kept in ("apex", "numpy", "nvidia-dali-cuda130", "nvidia-nccl-cu13", "torch", "torchvision"):
        assert plan.kept[kept] == NGC[kept]
        assert f"{kept}=={NGC[kept]}" in plan.constraints
    assert "safetensors==0.8.0" in plan.constraints
    assert not any(line.startswith("pillow") for line in plan.constraints), "pip may follow other packages' needs"
    assert plan.notes == []


def test_dali_of_another_cuda_is_dali(base_image):
    base = {name: version for name, version in NGC.items() if "dali" not in name} | {"nvidia-dali-cuda140": "2.5.0"}
    plan = base_image.make_plan(base, DEPENDENCIES, LOCK)
    assert not any("dali" in line for line in plan.requirements)
    assert [line for line in plan.constraints if "dali" in line] == ["nvidia-dali-cuda140==2.5.0"]


def test_an_older_dali_stays_and_is_told(base_image):
    plan = base_image.make_plan(NGC | {"nvidia-dali-cuda130": "2.2.0"}, DEPENDENCIES, LOCK)
    assert "nvidia-dali-cuda130==2.2.0" in plan.constraints
    assert len(plan.notes) == 1
    assert "2.2.0" in plan.notes[0]


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.14.0a0+4fdf77b"), ("torch", None), ("nvidia-dali-cuda130", None)]
)
def test_refuses_a_base_that_does_not_fit(base_image, name, version):
    base = {key: value for key, value in NGC.items() if key != name} | ({name: version} if version else {})
    with pytest.raises(ValueError, match=f"{name} .*build from another BASE"):
        base_image.make_plan(base, DEPENDENCIES, LOCK)


def test_reads_every_direct_dependency_from_the_lock(base_image):
    pins = base_image.locked((ROOT / "requirements.lock").read_text())
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {base_image.canonicalize_name(base_image.Requirement(line).name) for line in dependencies}
    assert names <= pins.keys()
    here = base_image.installed()
    assert pins["torch"] == here["torch"].split("+")[0]


def run(command, folder, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), command, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_plan_of_this_environment_installs_nothing(tmp_path):
    assert run("plan", tmp_path).returncode == 0
    assert (tmp_path / "requirements.txt").read_text() == ""
    assert "torch==" in (tmp_path / "kept.txt").read_text()


def test_check_finds_a_package_that_was_replaced(tmp_path):
    (tmp_path / "kept.txt").write_text("torch==2.13.0a0+nv\n")
    result = run("check", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("base_image: torch 2.13.0a0+nv of the base image has become ")


@pytest.mark.slow
@pytest.mark.parametrize("apex_is_nvidias", [True, False])
def test_check_imports_what_was_kept(tmp_path, apex_is_nvidias):
    package = tmp_path / "site" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if apex_is_nvidias:
        (package / "optimizers.py").touch()
    run("plan", tmp_path)
    result = run("check", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert (result.returncode == 0) == apex_is_nvidias, result.stderr
    if not apex_is_nvidias:
        assert "apex.optimizers does not import" in result.stderr
