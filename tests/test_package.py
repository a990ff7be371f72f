"""What `pip install moco-fast` would bring."""

import email
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("moco_fast", "pipelines", "shards")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built of a copy: setuptools writes beside what it builds."""
    source = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    [path] = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_has_every_module_and_what_they_read(wheel: zipfile.ZipFile) -> None:
    wanted = [
        path
        for name in PACKAGES
        for pattern in ("*.py", "*.html", "*.js", "*.yaml", "py.typed")
        for path in (ROOT / name).rglob(pattern)
    ]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= set(wheel.namelist())
    launch = [name for name in wheel.namelist() if name.startswith("moco_fast/launch/")]
    assert len(launch) == 5
    assert all(b"compute_environment" in wheel.read(name) for name in launch)


def test_its_description_stands_alone(wheel: zipfile.ZipFile) -> None:
    found = metadata(wheel)
    text = found.get_payload()
    assert isinstance(text, str)
    assert "make-shards pack" in text
    assert re.findall(r"\]\((?!https://)", text) == []
    commands = set(re.findall(r"^ +(?:moco-fast|make-shards) ([a-z-]+)", text, flags=re.MULTILINE))
    assert commands == {"pack", "report", "embed", "search"}


def test_packing_needs_neither_torch_nor_dali(wheel: zipfile.ZipFile) -> None:
    needed = metadata(wheel).get_all("Requires-Dist") or []
    of_all = [line for line in needed if "extra ==" not in line]
    assert len(of_all) > 5
    assert [line for line in of_all if re.match(r"torch|nvidia|timm|accelerate", line)] == []
    of_gpu = [line for line in needed if 'extra == "gpu"' in line]
    assert any(line.startswith("moco-fast[train]") for line in of_gpu)
    assert any(line.startswith("nvidia-dali") for line in of_gpu)
