import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import shards
from tests.shards.pictures import contents, fill

ROOT = Path(__file__).parents[2]


def examples(documented) -> list[str]:
    """The indented blocks of code before a docstring's sections."""
    text = documented.__doc__ if inspect.ismodule(documented) else inspect.getdoc(documented).partition("\nArgs:")[0]
    lines = [line for line in text.splitlines()[1:] if not line or line.startswith("    ")]
    return textwrap.dedent("\n".join(lines)).strip()


@pytest.mark.parametrize("name", ["shards", "pack", "open", "verify", "finish"])
def test_the_example_of_each_docstring_runs(tmp_path, monkeypatch, capsys, name):
    fill(tmp_path / "photos", 12, classes=2)
    monkeypatch.chdir(tmp_path)
    if name in ("open", "verify"):
        shards.pack(shards.PackConfig(sources=("photos",), out="packed", workers=1))
    code = examples(shards if name == "shards" else getattr(shards, name))
    assert "shards." in code
    exec(compile(code, f"<{name}>", "exec"), {})
    said = capsys.readouterr().out
    assert {"shards": "12 ('class0', 'class1')", "open": "shard-000000.tar", "verify": ""}.get(name, "") in said
    if name == "finish":
        assert "num_samples=12" in said


def test_a_script_packs_with_several_workers_and_needs_no_main_guard(tmp_path):
    fill(tmp_path / "photos", 12, classes=2)
    script = tmp_path / "script.py"
    options = 'sources=("photos",), shard_samples=3'
    script.write_text(
        "import shards\n"
        f'shards.pack(shards.PackConfig({options}, out="two", workers=2))\n'
        f'shards.pack(shards.PackConfig({options}, out="one", workers=1))\n'
        'print(shards.open("two").num_samples)\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("12\n", 0), done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_package_is_light_and_names_what_it_offers():
    code = "import sys, shards; print(sorted({'numpy', 'PIL', 'obstore', 'tyro'} & set(sys.modules)), dir(shards))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.startswith("[] ")
    for name in shards.__all__:
        assert f"'{name}'" in said
        assert getattr(shards, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'close'"):
        shards.close  # noqa: B018 - looking it up is what raises


@pytest.mark.parametrize("package", ["moco_fast", "pipelines", "shards"])
def test_the_packages_tell_type_checkers_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text().partition(f"\n{package} = [")[2].partition("]")[0]
