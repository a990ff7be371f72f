import subprocess
import sys
from pathlib import Path

import pytest

from moco_fast.config import RunConfig
from moco_fast.training.compiled import keep_compiled
from moco_fast.training.runtime import start

_ONE = "processor : 0\nmodel name : A\ncpu MHz : 1000\nflags : sse avx\n"


def test_compiled_code_is_kept_in_the_user_s_cache(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = keep_compiled(env)
    assert env["TORCHINDUCTOR_CACHE_DIR"] == folder
    assert folder.startswith(str(tmp_path / "moco-fast" / "compiled"))
    assert Path(folder).is_dir()
    # A second start, and a rank that inherits the variable, find the same.
    assert keep_compiled({"XDG_CACHE_HOME": str(tmp_path)}) == keep_compiled(env) == folder


def test_a_folder_that_is_named_is_left_alone(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "/named"}
    assert keep_compiled(env) == "/named" == env["TORCHINDUCTOR_CACHE_DIR"]
    assert not list(tmp_path.iterdir())


def test_without_a_place_torch_s_own_choice_stays(tmp_path):
    (tmp_path / "file").touch()
    env = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert keep_compiled(env).startswith("not kept, since ")
    assert "TORCHINDUCTOR_CACHE_DIR" not in env


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (_ONE, True),
        (_ONE + _ONE.replace("processor : 0", "processor : 1").replace("1000", "2000"), True),
        (_ONE.replace("avx", "avx avx512f"), False),
        (_ONE.replace("name : A", "name : B"), False),
    ],
)
def test_other_cpus_have_other_folders(tmp_path, other, same):
    (tmp_path / "one").write_text(_ONE)
    (tmp_path / "other").write_text(other)
    folders = {keep_compiled({"XDG_CACHE_HOME": str(tmp_path)}, cpuinfo=tmp_path / name) for name in ("one", "other")}
    assert (len(folders) == 1) == same


def test_on_a_cpu_nothing_is_kept(tmp_path):
    # What a killed compiler leaves there would fail every later start.
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    start(RunConfig(device="cpu", compile=True), env=env).close()
    assert "TORCHINDUCTOR_CACHE_DIR" not in env
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["moco_fast.training.compiled", "moco_fast.training.startup"])
def test_neither_imports_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
