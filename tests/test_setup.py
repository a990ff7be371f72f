"""deploy/setup.sh installs when something has changed, and costs nothing when nothing has."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.tool("uv", FAKE_UV)
        for program in PROGRAMS:
            (self.tools / program).symlink_to(shutil.which(program))

    def tool(self, name, text):
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def setup(self, **environment):
        """Run the script; returns its result and the uv commands that it ran."""
        self.calls.write_text("")
        result = subprocess.run(
            ["sh", "deploy/setup.sh"],
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


def test_names_the_pythons_that_work(checkout):
    old = checkout.tool("python3.9", "#!/bin/sh\nexit 1\n")
    result, calls = checkout.setup(PYTHON=str(old))
    assert (result.returncode, calls) == (1, [])
    assert result.stderr.startswith("setup: no Python 3.11, 3.12 or 3.13 found")
    assert str(old) in result.stderr


def test_names_the_command_that_brings_pip(checkout):
    (checkout.tools / "uv").unlink()
    bare = checkout.tool("python3", f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec {sys.executable} "$@"\n')
    result, _ = checkout.setup(PYTHON=str(bare))
    assert result.returncode == 1
    assert f"run: {bare} -m ensurepip --upgrade" in result.stderr
