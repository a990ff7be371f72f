"""The Dockerfile, executed without Docker: its instructions in a stand-in for the base image, then the image's use.

    python deploy/docker/rehearse_image.py FOLDER   as root, on Debian or Ubuntu with debootstrap; about 8 GB in FOLDER

The stand-in is a plain Debian with torch, torchvision and DALI of requirements.lock, and with what is awkward about
NVIDIA's image: versions as NVIDIA numbers them (so that the packages' metadata contradict each other), an old numpy, a
list of constraints, no apex, and packages of the system that pip cannot remove. An overlay of it takes what the
Dockerfile's own instructions do. The commands of docs/docker.md then run in it as the Dockerfile's user, with a
read-only root, caches and results on volumes, and /tmp mounted as Docker mounts it. It needs no GPU.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PACKAGES = "python3,python3-dev,python-is-python3,g++,ca-certificates"
# As NVIDIA's images have it, from 26.01 to 26.08 at least; the lock's is newer.
NUMPY = "numpy==2.1.0"
# As 26.09 has them. By the rules of versions an alpha of 2.14 is older than the 2.14 that torchvision asks for.
NUMBERED = {
    "torch": "2.14.0a0+b2c75dd062.nv26.9.68203377",
    "torchvision": "0.29.0a0+0fba2e84.nv26.9.68203377",
}
# NVIDIA's images bind every pip to the versions that they were built with.
CONSTRAINTS = {"pillow": "12.3.0", "setuptools": "68.1.2"}
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PIP_CONSTRAINT": "/etc/pip/constraint.txt",
}
# How this machine reaches package indexes; Docker has options of its own for it.
NETWORK_VARIABLES = re.compile(r"(?i)(PIP|UV)_.*|.*_PROXY|SSL_CERT_\w+|\w+_CA_BUNDLE")
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/etc/pip.conf")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of a Dockerfile, its lines joined."""

    name: str
    text: str


def instructions(dockerfile: str) -> list[Instruction]:
    """Return the instructions of a Dockerfile's text."""
    # Docker leaves out comments and empty lines, also between lines that belong together.
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\[ \t]*\n", "", "\n".join(lines))
    return [
        Instruction(name=name.upper(), text=text.strip())
        for name, _, text in (line.strip().partition(" ") for line in joined.splitlines())
    ]


def expand(text: str, variables: dict[str, str]) -> str:
    """Return `text` with $NAME and ${NAME} replaced, as Docker does outside of RUN.

    Raises:
        ValueError: a variable is not set, or has one of the shell's forms.
    """

    def value(found: re.Match[str]) -> str:
        name = found.group(1) or found.group(2)
        if name not in variables:
            raise ValueError(f"the Dockerfile uses {found.group()}, which no ARG or ENV before it sets")
        return variables[name]

    return re.sub(r"\$(?:(\w+)|\{([^}]*)\})", value, text)


def ignored(path: PurePosixPath, patterns: Iterable[str]) -> bool:
    """Return whether a .dockerignore keeps a path, relative to the folder of the build, from the build."""
    names = [str(path), *(str(parent) for parent in path.parents if parent.name)]
    result = False
    for line in patterns:
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            kept = pattern.startswith("!")
            pattern = pattern.removeprefix("!").strip("/")
            variants = {pattern, pattern.removeprefix("**/")}
            if any(fnmatch.fnmatch(name, variant) for name in names for variant in variants):
                result = not kept
    return result


def sources(context: Path, pattern: str) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield the files that COPY takes for `pattern`, each with its name below the destination.

    Raises:
        ValueError: there are none, or .dockerignore leaves none.
    """
    patterns = (context / ".dockerignore").read_text().splitlines()
    top = context / pattern
    files = sorted(path for path in top.rglob("*") if path.is_file()) if top.is_dir() else [top]
    found = [
        path for path in files if path.exists() and not ignored(PurePosixPath(path.relative_to(context)), patterns)
    ]
    if not found:
        raise ValueError(f"COPY {pattern}: no such file, or .dockerignore leaves it out")
    for path in found:
        yield path, PurePosixPath(path.relative_to(top) if top.is_dir() else path.name)


@dataclass(kw_only=True)
class Image:
    """The state that a Dockerfile's instructions change, beside the files."""

    base: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(BASE_ENVIRONMENT))
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    user: str = "0"
    labels: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        """What RUN sees and what other instructions may name."""
        return self.arguments | self.environment


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the rehearsal keeps what."""

    top: Path

    @property
    def base(self) -> Path:
        """The stand-in for the base image."""
        return self.top / "base"

    @property
    def layer(self) -> Path:
        """What the Dockerfile adds to it."""
        return self.top / "layer"

    @property
    def volumes(self) -> Path:
        """What the commands write."""
        return self.top / "volumes"


def overlay(folders: Folders) -> str:
    """Return the shell commands that mount the image, for writing, and enter its folder."""
    for name in ("layer", "work", "image"):
        (folders.top / name).mkdir(exist_ok=True)
    layers = shlex.quote(f"lowerdir={folders.base},upperdir={folders.layer},workdir={folders.top / 'work'}")
    return f"cd {shlex.quote(str(folders.top))}; mount -t overlay -o {layers} overlay image; cd image"


def devices() -> str:
    """Return the shell commands that fill /dev and /proc of the image as a container's are."""
    binds = "; ".join(f"touch dev/{name}; mount --bind /dev/{name} dev/{name}" for name in DEVICES)
    return (
        f"mount -t tmpfs -o mode=755 tmpfs dev; {binds}; ln -s /proc/self/fd dev/fd; "
        "mkdir dev/shm; mount -t tmpfs -o mode=1777 tmpfs dev/shm; mount -t proc proc proc"
    )


def identity(root: Path, user: str) -> str:
    """Return the numbers of a user and of its group, as USER of Docker finds them in the image."""
    for line in (root / "etc" / "passwd").read_text().splitlines():
        name, _, uid, gid = line.split(":")[:4]
        if user in (name, uid):
            return f"{uid}:{gid}"
    return f"{user}:0"


def execute(folders: Folders, image: Image, command: list[str], mounts: str, environment: dict[str, str]) -> None:
    """Run a command in the image, in mount and process namespaces of its own.

    Raises:
        ValueError: it fails.
    """
    passwd = folders.layer if (folders.layer / "etc" / "passwd").exists() else folders.base
    inside = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    inside += ["sh", "-c", f"cd {shlex.quote(image.folder)} && exec {shlex.join(command)}"]
    enter = ["chroot", f"--userspec={identity(passwd, image.user)}", "--groups=", ".", *inside]
    script = f"set -e; {mounts}; exec {shlex.join(enter)}"
    outside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    result = subprocess.run([*outside, "sh", "-c", script], stdin=subprocess.DEVNULL)  # noqa: S603 (the Dockerfile says what runs)
    if result.returncode:
        raise ValueError(f"{shlex.join(command)} ended with {result.returncode}")


def run_instruction(folders: Folders, image: Image, text: str) -> None:
    """Do what RUN does."""
    network = {name: value for name, value in os.environ.items() if NETWORK_VARIABLES.fullmatch(name)}
    mounts = f"{overlay(folders)}; {devices()}"
    for name in NETWORK_FILES:
        if Path(name).exists():
            make = f"mkdir -p .{name}" if Path(name).is_dir() else f"touch .{name}"
            mounts += f"; {make}; mount --bind {name} .{name}"
    execute(folders, image, [*image.shell, text], mounts, network | image.variables)


def copy_instruction(folders: Folders, image: Image, text: str) -> None:
    """Do what COPY does, into the layer above the base.

    Raises:
        ValueError: it has an option other than --chown, or a source is not there.
    """
    words = shlex.split(expand(text, image.variables))
    options = [word for word in words if word.startswith("--")]
    *patterns, target = [word for word in words if not word.startswith("--")]
    owner = image_owner(folders, options)
    for pattern in patterns:
        into = PurePosixPath(image.folder) / target
        if not (target.endswith("/") or len(patterns) > 1 or (ROOT / pattern).is_dir()):
            raise ValueError(f"COPY {pattern} {target}: write a folder with / at its end")
        for path, name in sources(ROOT, pattern):
            copied = folders.layer / str(into).lstrip("/") / name
            for parent in reversed(copied.parents):
                if parent.is_relative_to(folders.layer) and not parent.exists():
                    copy_folder(folders, parent, owner)
            shutil.copyfile(path, copied)
            copied.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
            os.chown(copied, *owner)


def copy_folder(folders: Folders, folder: Path, owner: tuple[int, int]) -> None:
    """Make a folder of the layer; one that the base has keeps its owner and mode."""
    below = folders.base / folder.relative_to(folders.layer)
    folder.mkdir()
    if below.is_dir():
        shutil.copystat(below, folder)
        os.chown(folder, below.stat().st_uid, below.stat().st_gid)
    else:
        folder.chmod(0o755)
        os.chown(folder, *owner)


def image_owner(folders: Folders, options: list[str]) -> tuple[int, int]:
    """Return the owner that COPY's options name; root without any.

    Raises:
        ValueError: there is another option.
    """
    owner = (0, 0)
    for option in options:
        name, _, value = option.partition("=")
        if name != "--chown":
            raise ValueError(f"COPY {option}: the rehearsal knows only --chown")
        uid, gid = identity(folders.layer, value).split(":")
        owner = (int(uid), int(gid))
    return owner


def build(folders: Folders, dockerfile: str) -> Image:
    """Execute a Dockerfile's instructions, one after the other.

    Raises:
        ValueError: one of them fails, or is one that the rehearsal does not know.
    """
    image = Image()
    for instruction in instructions(dockerfile):
        step(folders, image, instruction)
    return image


def step(folders: Folders, image: Image, instruction: Instruction) -> None:
    """Execute one instruction."""
    text = instruction.text
    say(f"{instruction.name} {re.sub(r' +', ' ', text)}")
    match instruction.name:
        case "ARG":
            name, _, value = text.partition("=")
            image.arguments[name] = expand(value, image.variables)
        case "FROM":
            image.base = expand(text, image.variables)
            image.arguments.clear()
        case "SHELL":
            image.shell = json.loads(text)
        case "CMD":
            image.command = json.loads(text)
        case "WORKDIR":
            image.folder = str(PurePosixPath(image.folder) / expand(text, image.variables))
            run_as_root(folders, image, f"mkdir -p {shlex.quote(image.folder)}")
        case "USER":
            image.user = expand(text, image.variables)
        case "ENV" | "LABEL":
            pairs = dict(word.split("=", 1) for word in shlex.split(expand(text, image.variables)))
            (image.environment if instruction.name == "ENV" else image.labels).update(pairs)
        case "COPY":
            copy_instruction(folders, image, text)
        case "RUN":
            run_instruction(folders, image, text)
        case _:
            raise ValueError(
                f"the rehearsal does not know {instruction.name}: add it to deploy/docker/rehearse_image.py"
            )


def run_as_root(folders: Folders, image: Image, text: str) -> None:
    """Run a shell command that Docker does by itself."""
    execute(folders, Image(), ["sh", "-c", text], overlay(folders), image.variables)


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


STARTED = time.monotonic()


def run(*command: str | Path) -> None:
    """Run a command of this machine.

    Raises:
        ValueError: it fails.
    """
    result = subprocess.run([str(part) for part in command])  # noqa: S603 (the callers name the program)
    if result.returncode:
        raise ValueError(f"{shlex.join(str(part) for part in command)} ended with {result.returncode}")


def pins_of(lock: str, *, but: str) -> list[str]:
    """Return the lock's pins without hashes, markers kept, as constraints."""
    pins = re.findall(r"^([\w.-]+(?:\[[\w,-]+\])?==\S+(?: ; .+?)?) \\$", lock, flags=re.MULTILINE)
    return [pin for pin in pins if not pin.startswith(f"{but}==")]


def make_stand_in(folders: Folders, suite: str) -> None:
    """Make the stand-in for the base image: a Debian, then what NVIDIA's image has on top."""
    say(f"debootstrap {suite}")
    folders.top.mkdir(parents=True, exist_ok=True)
    unfinished = folders.top / "unfinished"
    remove(unfinished)
    # Its mounts end with its namespace.
    bootstrap = ["debootstrap", "--variant=minbase", f"--include={SYSTEM_PACKAGES}", suite, str(unfinished)]
    log = folders.top / "debootstrap.log"
    try:
        run(
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            f"{shlex.join(bootstrap)} >{shlex.quote(str(log))}",
        )
    except ValueError as error:
        raise ValueError(f"{error}; see {log}") from None
    python = (unfinished / "usr" / "bin" / "python3").readlink().name
    site = unfinished / "usr" / "local" / "lib" / python / "dist-packages"
    constraints = folders.top / "constraints.txt"
    constraints.write_text("\n".join(pins_of((ROOT / "requirements.lock").read_text(), but="numpy")))
    say(f"torch, torchvision and DALI of requirements.lock for {python}")
    uv = shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
    brought = ["torch", "torchvision", "nvidia-dali-cuda130", "packaging", "pip", NUMPY]
    where = ["--target", site, "--python-version", python.removeprefix("python"), "--constraint", constraints]
    run(uv, "pip", "install", "--quiet", "--only-binary", ":all:", *where, *brought)
    number_as_nvidia_does(site)
    constraint = unfinished / BASE_ENVIRONMENT["PIP_CONSTRAINT"].lstrip("/")
    constraint.parent.mkdir()
    constraint.write_text("".join(f"{name}=={version}\n" for name, version in CONSTRAINTS.items()))
    old = unfinished / "usr" / "lib" / "python3" / "dist-packages" / "tqdm-4.60.0.egg-info"
    old.mkdir()
    (old / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 4.60.0\n")
    unfinished.rename(folders.base)


def number_as_nvidia_does(site: Path) -> None:
    """Give torch and torchvision the versions of NVIDIA's builds."""
    for name, version in NUMBERED.items():
        info = next(site.glob(f"{name}-*.dist-info"))
        text = re.sub(r"(?m)^Version: .*$", f"Version: {version}", (info / "METADATA").read_text(), count=1)
        # The file may be one with uv's cache: replaced, not written to.
        (info / "METADATA").unlink()
        (info / "METADATA").write_text(text)
        info.rename(site / f"{name}-{version}.dist-info")


SHARDS = "--data.shards runs/shards --eval.shards runs/shards --run.out runs/first"
# As docs/docker.md and the README have them, small.
COMMANDS = (
    "bash -c 'test $(id -u) = 10001 && ! touch /moco/new'",
    "python -m moco_fast.demo runs/images",
    "make-shards pack runs/images/val --out runs/shards",
    f"accelerate launch --config_file deploy/accelerate/cpu-1.yaml -m moco_fast.train demo {SHARDS} --run.steps 4",
    "moco-fast eval knn --encoder runs/first",
    "moco-fast report runs/first",
    "moco-fast preview runs/shards --views moco-v2 --out runs/sheet.png",
)
COMPILED = "import torch; print('compiled:', torch.compile(lambda x: x * 2 + 1)(torch.ones(3)).tolist())"
# The image has no such user: what --user "$(id -u):$(id -g)" gives.
ANOTHER_USER = "12345"
COMMANDS_OF_ANOTHER_USER = (
    "bash -c 'test $(id -u) = 12345'",
    "make-shards verify runs/shards",
    f"python -c {shlex.quote(COMPILED)}",
)


def use(folders: Folders, image: Image, commands: Iterable[list[str]]) -> None:
    """Run commands in the image as docs/docker.md says for a read-only container: its caches begin empty.

    Raises:
        ValueError: one of them fails.
    """
    cache, runs = folders.volumes / "cache", folders.volumes / "runs"
    remove(cache)
    # A new volume of Docker's takes over the image's folder; a folder of the host belongs to who made it.
    place = folders.layer / "var" / "cache" / "moco"
    shutil.copytree(place, cache)
    os.chown(cache, place.stat().st_uid, place.stat().st_gid)
    runs.mkdir(exist_ok=True, parents=True)
    mounts = f"{overlay(folders)}; mkdir -p moco/runs; mount --bind ../volumes/runs moco/runs"
    # The overlay itself turns read-only, what is mounted in it does not.
    mounts += f"; mount --bind ../volumes/cache var/cache/moco; {devices()}"
    mounts += "; mount -t tmpfs -o nosuid,nodev,noexec,mode=1777 tmpfs tmp; mount -o remount,ro ."
    uid, gid = identity(folders.layer, image.user).split(":")
    os.chown(runs, int(uid), int(gid))
    for command in commands:
        say(f"as {image.user}: {shlex.join(command)}")
        execute(folders, image, command, mounts, image.environment)
    say(f"caches: {', '.join(sorted(path.name for path in cache.iterdir())) or 'none'}")


def size_gb(folder: Path) -> float:
    """Return the size of a folder's files in GB."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e9


def remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def refuse_what_cannot_work() -> None:
    """Raise ValueError where this machine cannot do it."""
    if os.geteuid() != 0:
        raise ValueError("chroot and mount need root: run it with sudo, or in a virtual machine")
    for program in ("debootstrap", "unshare", "chroot", "mount"):
        if shutil.which(program) is None:
            raise ValueError(f"{program} is missing: apt-get install debootstrap util-linux coreutils mount")


def main() -> None:
    """Rehearse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the stand-in and the image are made; must not be in memory")
    parser.add_argument("--suite", default="trixie", help="release of Debian to stand on: its Python is the image's")
    parser.add_argument("--keep", action="store_true", help="leave the stand-in for the next time, and the image")
    chosen = parser.parse_args()
    folders = Folders(top=chosen.folder.absolute())
    try:
        refuse_what_cannot_work()
        for name in ("layer", "work"):
            remove(folders.top / name)
        if not folders.base.exists():
            make_stand_in(folders, chosen.suite)
        image = build(folders, (ROOT / "Dockerfile").read_text())
        say(f"the Dockerfile adds {size_gb(folders.layer):.2f} GB to its base")
        remove(folders.volumes)
        use(folders, image, [image.command, *map(shlex.split, COMMANDS)])
        use(folders, replace(image, user=ANOTHER_USER), map(shlex.split, COMMANDS_OF_ANOTHER_USER))
        say("done: the image would build and run")
    except ValueError as error:
        sys.exit(f"rehearse_image: {error}")
    finally:
        if not chosen.keep:
            remove(folders.top)


if __name__ == "__main__":
    main()
