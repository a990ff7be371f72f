"""What a machine with a GPU must show, part by part; `make gpu-check` runs it.

    python benchmarks/gpu_check.py --device cuda --out build/gpu-check [--part NAME ...]

Each part runs in a process of its own, within a time of its own, prints what it found and leaves NAME.json; a part
whose NAME.json is in the folder is not run again, so the same command goes on where it stopped. One that fails leaves
NAME.log instead, and the others go on. report.md puts together what is there. All parts stop after --minutes; the most
useful come first, and cifar10 runs only if it is named. A loader's figures carry the backend that made them.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

GOING_S = 10.0
"""Time that a killed process gets to go."""

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to show."""

    name: str
    """Names its file too."""
    kind: str
    """A function of gpu_parts.py; parts of a kind share a table."""
    limit_s: float
    options: Options = field(default_factory=dict)


def parts(device: str) -> list[Part]:
    """All parts but cifar10, in order of value."""
    return _on_a_gpu() if device == "cuda" else _on_a_cpu()


WHOLE: Options = {"encoder": "resnet50", "size": 224, "queue": 65536, "precision": "bf16"}


def _step(name: str, limit_s: float, **options: object) -> Part:
    base = WHOLE | {"batch": 256, "compile": False, "rounds": 5}
    return Part(name=f"step-{name}", kind="step", limit_s=limit_s, options=base | options)


def _loader(name: str, **data: object) -> Part:
    options = {"size": 224, "batch": 256, "seconds": 8, "data": data}
    return Part(name=f"loader-{name}", kind="loader", limit_s=40, options=options)


def _end_to_end(name: str, limit_s: float, **options: object) -> Part:
    base = WHOLE | {"batch": 256, "compile": False, "policy": "none"}
    return Part(name=f"end-to-end-{name}", kind="end_to_end", limit_s=limit_s, options=base | options)


def _beside(name: str, batch: int, **data: object) -> Part:
    options = WHOLE | {"batch": batch, "seconds": 3, "data": data}
    return Part(name=f"beside-{name}", kind="beside", limit_s=40, options=options)


def _decode(name: str, load: float) -> Part:
    options = {"batch": 256, "load": load, "seconds": 4.5}
    return Part(name=f"decode-{name}", kind="decode_rate", limit_s=40, options=options)


def _profile(name: str, limit_s: float, **options: object) -> Part:
    return Part(name=f"profile-{name}", kind="profile", limit_s=limit_s, options=WHOLE | {"steps": 5} | options)


def _tests(name: str, limit_s: float, *files: str, select: str = "") -> Part:
    options = {"paths": [f"tests/gpu/test_{file}.py" for file in files], "select": select}
    return Part(name=f"tests-{name}", kind="tests", limit_s=limit_s, options=options)


def _on_a_gpu() -> list[Part]:
    both: Options = {"stages": ["loader", "step", "end_to_end"], "seconds": 12}
    short: Options = {"stages": ["end_to_end"], "seconds": 6}
    return [
        Part(name="environment", kind="environment", limit_s=40),
        Part(name="data", kind="data", limit_s=90),
        _end_to_end("256", 75, seconds=20),
        _end_to_end("32", 60, batch=32, **both),
        _loader("engines-90", hw_decoder_load=0.9),
        _loader("engines-0", hw_decoder_load=0.0),
        _loader("engines-65", hw_decoder_load=0.65),
        _loader("engines-100", hw_decoder_load=1.0),
        _step("256-bf16", 60),
        _beside("256-engines-90", 256, hw_decoder_load=0.9),
        _beside("256-engines-0", 256, hw_decoder_load=0.0),
        _beside("256-torch", 256, backend="torch"),
        _beside("32-engines-90", 32, hw_decoder_load=0.9),
        _end_to_end("256-engines-65", 40, data={"hw_decoder_load": 0.65}, **short),
        _end_to_end("256-engines-90", 40, data={"hw_decoder_load": 0.9}, **short),
        _end_to_end("256-engines-100", 40, data={"hw_decoder_load": 1.0}, **short),
        _end_to_end("256-ordered", 40, ordered=True, **short),
        _end_to_end("32-ordered", 40, batch=32, ordered=True, **short),
        _decode("engines-100", 1.0),
        _decode("engines-90", 0.9),
        _decode("engines-0", 0.0),
        Part(name="host", kind="host", limit_s=50, options={"size": 224, "batches": [32, 256], "seconds": 4}),
        _tests("step", 100, "step", select="not compiled"),
        _tests("views", 120, "views", "colors"),
        _tests("world-and-apex", 90, "world_of_one", "apex"),
        _tests("transfer", 60, "transfer_decoding"),
        _profile("beside-the-loader", 50, batch=256, beside=True),
        Part(name="jpeg-kinds", kind="jpeg_kinds", limit_s=90, options={"batch": 64, "rounds": 5}),
        Part(name="momentum", kind="momentum", limit_s=30, options={"encoder": "resnet50"}),
        _step("32-bf16", 40, batch=32),
        _end_to_end("256-compiled", 120, compile=True, **both),
        _end_to_end("32-graphs", 120, batch=32, cuda_graphs=True, **both),
        _step("256-bf16-compiled", 120, compile=True, only=["ours", "supervised"]),
        _profile("compiled", 60, batch=256, compile=True),
        _tests("compiled", 200, "step", select="compiled"),
        _tests("resume", 150, "resume"),
        Part(name="memory", kind="memory", limit_s=90, options=WHOLE | {"batches": [1024, 512, 256]}),
        _loader("4-threads", num_threads=4),
        _loader("torch", backend="torch"),
        _step("256-fp32", 50, precision="fp32"),
        _end_to_end("256-virtual-groups", 60, policy="virtual", stages=["step"], seconds=6),
        _step("32-bf16-compiled", 100, batch=32, compile=True, only=["ours"]),
        _tests("demo", 200, "demo"),
    ]


def smaller(part: Part) -> Part:
    """The same part, so small that only mistakes show."""
    sizes = {"encoder": "resnet18_quarter", "size": 32, "batch": 16, "queue": 64, "seconds": 0.3, "rounds": 1}
    sizes |= {"steps": 1, "batches": [16], "select": "half_precision"}
    options = part.options | {name: value for name, value in sizes.items() if name in part.options}
    return replace(part, limit_s=120, options=options)


def _on_a_cpu() -> list[Part]:
    """A part of every kind, at tiny sizes and in a precision that a CPU has."""
    first: dict[str, Part] = {}
    for part in map(smaller, _on_a_gpu()):
        first.setdefault(part.kind, part)
    return [replace(part, options=_for_a_cpu(part.options)) for part in first.values()]


def _for_a_cpu(options: Options) -> Options:
    """The same options without what only a GPU has."""
    changed = {"precision": "fp32"} if "precision" in options else {}
    if "data" in options:
        changed["data"] = {name: value for name, value in options["data"].items() if name != "hw_decoder_load"}
    return options | changed


def cifar10(device: str, archive: Path | None, seconds: float) -> Part:
    """The authors' CIFAR-10 demo from images to kNN; stopped in time, it goes on the next time."""
    if archive is None or not archive.is_file():
        raise ValueError(
            f"--part cifar10 needs --cifar FILE, an archive of its images by split and class: got {archive}"
        )
    options: Options = {"archive": str(archive.resolve()), "seconds": seconds, "words": []}
    if device == "cpu":
        options["words"] = ["--run.steps", "2", "--model.encoder", "resnet18_quarter", "--data.batch-size", "16"]
    return Part(name="cifar10", kind="cifar10", limit_s=seconds + 120, options=options)


def job(part: Part, device: str, out: Path, data: Path, photos: Path | None) -> str:
    """Return what gpu_parts.py is told of a part."""
    told = {"kind": part.kind, "options": part.options, "device": device, "data": str(data)}
    told |= {"photos": str(photos.resolve()) if photos else None, "out": str(_file(out, part))}
    return json.dumps(told)


def run(part: Part, device: str, out: Path, data: Path, photos: Path | None, limit_s: float) -> str:
    """Run a part in a process; return how it ended: done, failed (with the last line it said) or out of time."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "DEVICE": device,
        # What one part compiled, the next need not.
        "TORCHINDUCTOR_CACHE_DIR": str(data / "inductor"),
    }
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), job(part, device, out, data, photos)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Loaders have processes of their own, which must not disturb the next part.
            _kill_session(process)
    if code == 0:
        log.unlink()
        return "done"
    if code is None:
        return "out of time"
    told = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"failed: {told[-1][:200]}" if told else "failed"


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    """Kill a part and what it has started, and wait until all of it is gone, with what it held of the GPU."""
    members = _open_session(process.pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
        for member in members:
            select.select([member], [], [], GOING_S)
            os.close(member)


def _open_session(session: int) -> list[int]:
    """A descriptor of each process of a session: readable once the process has ended."""
    members: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name of the program, in parentheses, may hold blanks.
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                members.append(os.pidfd_open(int(stat.parent.name)))
    return members


def report(wanted: Sequence[Part], out: Path, endings: dict[str, str]) -> str:
    """Markdown of all that is in the folder."""
    lines = ["# GPU check", ""]
    for kind in dict.fromkeys(part.kind for part in wanted):
        of_kind = [part for part in wanted if part.kind == kind]
        found = {part.name: json.loads(path.read_text()) for part in of_kind if (path := _file(out, part)).is_file()}
        lines += [f"## {kind.replace('_', ' ')}", ""]
        lines += _table({name: row for name, each in found.items() for row in each["rows"] for name in [row["part"]]})
        for each in found.values():
            lines += [*each["notes"], ""] if each["notes"] else []
        for part in of_kind:
            if part.name in endings and part.name not in found:
                lines += [f"**{part.name}: {endings[part.name]}**; see {part.name}.log", ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: dict[str, dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        return []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows.values()]
    return [*lines, ""]


def _told(out: Path, part: Part) -> str:
    """What a part found, on lines of its own: a run that is cut short has said what it knows."""
    if not _file(out, part).is_file():
        return ""
    found = json.loads(_file(out, part).read_text())
    rows: list[dict[str, str]] = found["rows"]
    each = [", ".join(f"{name} {value}" for name, value in row.items() if value and name != "part") for row in rows]
    lines = [f"\n    {row['part']}: {line}" for row, line in zip(rows, each, strict=True)]
    return f", {found['cpu_s']:.0f} s of CPU{''.join(lines)}"


def _file(out: Path, part: Part) -> Path:
    return out / f"{part.name}.json"


def check(arguments: argparse.Namespace) -> int:
    """Run what is wanted and not there yet; return the exit code."""
    every = parts(arguments.device)
    wanted = [part for part in every if not arguments.part or part.name in arguments.part]
    if "cifar10" in arguments.part:
        wanted.append(cifar10(arguments.device, arguments.cifar, arguments.cifar_seconds))
    if unknown := set(arguments.part) - {part.name for part in wanted}:
        names = ", ".join([*(part.name for part in every), "cifar10"])
        raise ValueError(f"--part {' '.join(sorted(unknown))}: there are {names}")
    out, data = arguments.out.resolve(), arguments.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    endings: dict[str, str] = {}
    for part in wanted:
        left_s = deadline - time.monotonic() if part.kind != "cifar10" else part.limit_s
        if _file(out, part).is_file():
            print(f"{part.name}: was done before", flush=True)
            continue
        if left_s < 15:
            endings[part.name] = f"not begun: the {arguments.minutes:g} minutes are over; run the same command again"
            continue
        started = time.monotonic()
        endings[part.name] = run(part, arguments.device, out, data, arguments.photos, min(part.limit_s, left_s))
        print(f"{part.name}: {endings[part.name]} in {time.monotonic() - started:.0f} s{_told(out, part)}", flush=True)
        (out / "report.md").write_text(report(wanted, out, endings))
    (out / "report.md").write_text(report(wanted, out, endings))
    print(f"\n{(out / 'report.md').read_text()}\nwritten to {out}")
    missing = [part for part in wanted if not _file(out, part).is_file()]
    wrong = [part.name for part in wanted if part not in missing and not json.loads(_file(out, part).read_text())["ok"]]
    return 1 if missing or wrong else 0


def main() -> int:
    """Check, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"))
    parser.add_argument("--data", type=Path, default=Path("build/gpu-check-data"), help="what parts share, not results")
    parser.add_argument("--part", nargs="+", default=[], help="only these")
    parser.add_argument("--photos", type=Path, help="tar of photographs to load instead of scikit-image's")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--cifar", type=Path, help="archive of CIFAR-10 as files, split/class/number.jpg")
    parser.add_argument("--cifar-seconds", type=float, default=1200.0, help="for training, in this call")
    arguments = parser.parse_args()
    try:
        if arguments.device == "cuda":
            _need_a_gpu()
        return check(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _need_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here: add DEVICE=cpu for the small version")


if __name__ == "__main__":
    sys.exit(main())
