"""deploy/setup.sh installs when something has changed, and costs nothing when nothing has."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

SCRIPT = Path(__file__).parent.parent / "deploy" / "setup.sh"

# Stands for uv: notes how it was called, and makes an environment that is only an interpreter.
FAKE_UV = f"""#!/bin/sh
echo "$*" >>"$UV_CALLS"
case $1 in
venv) mkdir -p .venv/bin && ln -sf {sys.executable} .venv/bin/python ;;
esac
exit "${{UV_FAILS:-0}}"
"""


# All that the script may count on; what else this machine has must not matter.
PROGRAMS = ("awk", "cat", "cksum", "df", "dirname", "id", "ln", "mkdir", "sh")


class Checkout:
    """A folder with what the script reads, and a uv that notes its calls."""

    def __init__(self, folder):
        self.root = folder / "checkout"
        self.tools = folder / "tools"
        self.calls = folder / "calls"
        (self.root / "deploy").mkdir(parents=True)
        self.tools.mkdir()
        shutil.copy(SCRIPT, self.root / "deploy")
        (self.root / "requirements.lock").write_text("numpy==2.4.6\n")
        (self.root / "requirements-ffcv.lock").write_text("ffcv==1.0.2\n")
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.tool("uv", FAKE_UV)
        # What Python 3.14 needs for its one package without a wheel.
        self.tool("g++", "#!/bin/sh\n")
        for program in PROGRAMS:
            (self.tools / program).symlink_to(shutil.which(program))

    def tool(self, name, text):
        path = self.tools / name
        # It may be a link to the machine's own, which must not be written through.
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def setup(self, *parts, **environment):
        """Run the script; returns its result and the uv commands that it ran."""
        self.calls.write_text("")
        result = subprocess.run(
            ["sh", "deploy/setup.sh", *parts],
            cwd=self.root,
            env={"PATH": str(self.tools), "UV_CALLS": str(self.calls), "PYTHON": sys.executable} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result, [line.split()[0] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_second_call_does_nothing(checkout):
    result, calls = checkout.setup()
    assert (result.returncode, calls) == (0, ["venv", "pip", "pip"]), result.stderr
    result, calls = checkout.setup()
    assert (result.returncode, calls, result.stdout) == (0, [], "")


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_installs_again_when_a_file_changes(checkout, name):
    checkout.setup()
    (checkout.root / name).write_text("changed\n")
    assert checkout.setup()[1] == ["pip", "pip"]
    assert checkout.setup()[1] == []


def test_installs_again_in_a_folder_that_was_moved(checkout):
    checkout.setup()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.setup()[1] == ["pip", "pip"]


def test_makes_the_environment_anew_when_its_interpreter_is_gone(checkout):
    checkout.setup()
    (checkout.root / ".venv/bin/python").unlink()
    assert checkout.setup()[1] == ["venv", "pip", "pip"]


def test_an_installation_that_failed_is_done_again(checkout):
    result, _ = checkout.setup(UV_FAILS="1")
    assert result.returncode != 0
    result, calls = checkout.setup()
    assert (result.returncode, calls) == (0, ["pip", "pip"])


def test_the_environment_does_not_make_itself(checkout):
    checkout.setup()
    (checkout.root / "requirements.lock").write_text("changed\n")
    (checkout.tools / "uv").unlink()
    first_in_path = checkout.root / ".venv" / "bin"
    (first_in_path / "python3").symlink_to(sys.executable)
    checkout.tool("python3", '#!/bin/sh\n[ "$1" = -m ] && exit 1\nexit 0\n')
    result, _ = checkout.setup(PYTHON="python3", PATH=f"{first_in_path}:{checkout.tools}")
    assert f"{checkout.tools}/python3 has no pip" in result.stderr


def test_names_the_pythons_that_work_and_what_it_tried(checkout):
    old = checkout.tool("python3.9", '#!/bin/sh\n[ "$1" = -V ] || exit 1\necho Python 3.9.2\n')
    result, calls = checkout.setup(PYTHON=f"{old} python3.77")
    assert (result.returncode, calls) == (1, [])
    assert result.stderr.startswith("setup: no Python 3.11 to 3.14 found")
    assert f"{old} (Python 3.9.2), python3.77 (not found)" in result.stderr


@pytest.mark.parametrize(
    ("version", "free_threaded", "taken"),
    [
        ((3, 10, 19), 0, False),
        ((3, 11, 0), 0, True),
        ((3, 12, 12), None, True),
        ((3, 13, 0), 0, False),
        ((3, 13, 1), 0, True),
        ((3, 14, 2), 0, True),
        ((3, 14, 2), 1, False),
        ((3, 15, 0), 0, False),
    ],
)
def test_takes_the_versions_of_pyproject(version, free_threaded, taken):
    shell = SCRIPT.read_text()
    check = re.search(r"^supported='(.*?)'", shell, flags=re.MULTILINE | re.DOTALL)[1]
    pretend = (
        f"import sys, sysconfig; sys.version_info = {version}; sysconfig.get_config_var = lambda _: {free_threaded}; "
    )
    result = subprocess.run([sys.executable, "-c", pretend + check], check=False)
    assert (result.returncode == 0) is taken
    if free_threaded != 1:
        project = tomllib.loads((SCRIPT.parent.parent / "pyproject.toml").read_text())["project"]
        assert (".".join(map(str, version)) in SpecifierSet(project["requires-python"])) is taken


def test_names_the_command_that_brings_pip(checkout):
    (checkout.tools / "uv").unlink()
    bare = checkout.tool("python3", f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec {sys.executable} "$@"\n')
    result, _ = checkout.setup(PYTHON=str(bare))
    assert result.returncode == 1
    assert f"run: {bare} -m ensurepip --upgrade" in result.stderr


def test_what_has_no_wheel_for_a_new_python_is_built_with_what_that_takes(checkout):
    checkout.setup()
    python = checkout.root / ".venv/bin/python"
    python.unlink()
    for name, has in (("g++", 1), ("python3-dev", 1), (None, 0)):
        # Stands for 3.14: pyjpegio has no wheel, and headers are there or not.
        answers = f'#!/bin/sh\ncase "$*" in *x86_64*) exit 0 ;; *Python.h*) exit {has} ;; esac\n'
        python.write_text(f'{answers}exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (checkout.root / "requirements.lock").write_text(f"{name}\n")
        (checkout.tools / "g++").unlink(missing_ok=True)
        if name != "g++":
            checkout.tool("g++", "#!/bin/sh\n")
        result, calls = checkout.setup()
        if name:
            assert (result.returncode, calls) == (1, [])
            assert "pyjpegio is built here" in result.stderr
            assert f"install what your system calls {name} and try again" in result.stderr
        else:
            assert (result.returncode, calls) == (0, ["pip", "pip"]), result.stderr


@pytest.fixture
def with_headers(checkout):
    """What FFCV is built with is there."""
    checkout.tool("pkg-config", "#!/bin/sh\n")
    checkout.tool("g++", "#!/bin/sh\n")
    has_headers = f'#!/bin/sh\ncase "$*" in *Python.h*) exit 0 ;; esac\nexec {sys.executable} "$@"\n'
    return checkout.tool("python3", has_headers)


def test_ffcv_is_added_once_and_again_when_its_lock_changes(checkout, with_headers):
    checkout.setup()
    # The environment's interpreter is a link to ours, which may lack headers here.
    python = checkout.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to(with_headers)
    checkout.setup()
    result, calls = checkout.setup("ffcv")
    assert (result.returncode, calls) == (0, ["pip"]), result.stderr
    assert checkout.setup("ffcv")[1] == []
    assert checkout.setup()[1] == []
    (checkout.root / "requirements-ffcv.lock").write_text("ffcv==1.0.3\n")
    assert checkout.setup()[1] == []
    assert checkout.setup("ffcv")[1] == ["pip"]


def test_what_ffcv_is_built_against_is_named_where_it_cannot_be_installed(checkout):
    result, calls = checkout.setup("ffcv")
    assert (result.returncode, calls) == (1, ["venv", "pip", "pip"])
    assert "install what your system calls libopencv-dev libturbojpeg0-dev pkg-config g++" in result.stderr
    checkout.tool("apt-get", "#!/bin/sh\n")
    checkout.tool("id", "#!/bin/sh\necho 1000\n")
    result, _ = checkout.setup("ffcv")
    assert "run as root: apt-get update && apt-get install -y --no-install-recommends libopencv-dev" in result.stderr


def test_system_packages_are_installed_as_root(checkout):
    checkout.setup()
    checkout.tool("id", "#!/bin/sh\necho 0\n")
    checkout.tool("env", '#!/bin/sh\nshift\nexec "$@"\n')
    installs = f'#!/bin/sh\necho apt "$*" >>"$UV_CALLS"\nln -sf {shutil.which("true")} {checkout.tools}/g++\n'
    checkout.tool("apt-get", installs)
    result, _ = checkout.setup("ffcv")
    calls = checkout.calls.read_text()
    assert "apt update" in calls
    assert "apt install -y -qq --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config g++" in calls
    assert "installing the system packages libopencv-dev" in result.stdout


def test_an_unknown_part_is_refused(checkout):
    result, calls = checkout.setup("ffvc")
    assert (result.returncode, calls) == (1, [])
    assert "there is no part ffvc" in result.stderr
