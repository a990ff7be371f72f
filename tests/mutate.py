"""Mutation testing: one place of a module is changed at a time, and at least one of the tests has to fail.

    python tests/mutate.py moco_fast/methods/loss.py [--num 20] [--lines 10-40] -- tests/moco_fast/test_loss.py [...]

What follows `--` is pytest's. Works on a copy of the repository, in a process per mutant that is forked with torch
imported; processes that tests start see the mutant, too. Tests that ran the changed line come first. Prints what
survives: each either needs a test, or changes nothing that anyone can see.
"""

import argparse
import ast
import compileall
import copy
import importlib
import os
import pickle
import py_compile
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
COMMUTATIVE = ("max", "min", "np.maximum", "np.minimum", "isinstance")
SKIPPED = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr)
"""Statements and texts in which nothing is changed."""
PRELOADED = ("accelerate", "hypothesis", "safetensors.torch", "timm", "torch")
"""What a test takes longest to import."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of a module."""

    line: int
    what: str
    """The changed piece, before and after."""
    source: str
    """The whole module with the change."""


def mutants(source: str) -> Iterator[Mutant]:
    """Give every mutant of a module: operators, constants, conditions, dropped statements, swapped arguments."""
    tree = ast.parse(source)
    skipped = {id(node) for node in _skipped(tree)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for change in _changes(node):
            changed = copy.deepcopy(tree)
            target = next(each for place, each in enumerate(ast.walk(changed)) if place == number)
            after = change(target)
            if after is not target:
                _replace(changed, target, after)
            text = ast.unparse(ast.fix_missing_locations(changed))
            what = f"{ast.unparse(node)} -> {ast.unparse(after)}".replace("\n", " ")
            yield Mutant(line=getattr(node, "lineno", 0), what=what, source=text)


def _skipped(tree: ast.AST) -> Iterator[ast.AST]:
    """Give what has no effect, or whose only effect is a text: docstrings, annotations, messages, `__all__`."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, SKIPPED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            parts.append(node)
        if isinstance(node, ast.Raise):
            parts += [node.exc, node.cause]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            parts.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            parts.append(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            # Whether a dataclass takes positional arguments or slots is no behavior of the run.
            parts += node.decorator_list
        for part in parts:
            if part is not None:
                yield from ast.walk(part)


def _changes(node: ast.AST) -> Iterator[Callable[[Any], ast.AST]]:
    """Give functions that change such a node in place, or return what takes its place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield lambda it: _set(it, "ops", [OPERATORS[type(it.ops[0])](), *it.ops[1:]])
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield lambda it: _set(it, "op", OPERATORS[type(it.op)]())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda it: _set(it, "value", not it.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield lambda it: _set(it, "value", it.value + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield lambda it: it.operand
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield lambda it: _set(it, "test", ast.UnaryOp(ast.Not(), it.test))
    if isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func) not in COMMUTATIVE:
        yield lambda it: _set(it, "args", [it.args[1], it.args[0], *it.args[2:]])
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    is_stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    if is_call or is_stored or isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break):
        yield lambda _: ast.Pass()


def _set(node: ast.AST, name: str, value: object) -> ast.AST:
    setattr(node, name, value)
    return node


def _replace(tree: ast.AST, before: ast.AST, after: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is before:
                setattr(parent, name, after)
            elif isinstance(value, list) and any(each is before for each in value):
                value[:] = [after if each is before else each for each in value]


@dataclass(eq=False)  # pytest keeps its plugins in sets
class Recorder:
    """Plugin of pytest: the lines of a file that each test runs, and the seconds that it takes."""

    path: str
    lines: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Begin a test."""
        lines = self.lines[nodeid] = set()

        def local(frame: FrameType, event: str, _: object) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return local

        self.seconds[nodeid] = -time.monotonic()
        sys.settrace(lambda frame, _, __: local if frame.f_code.co_filename == self.path else None)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """End a test."""
        sys.settrace(None)
        self.seconds[nodeid] += time.monotonic()


@dataclass(eq=False)
class LineFirst:
    """Plugin of pytest: tests that ran a line come first, the quick ones before the slow ones; keeps what fails."""

    recorder: Recorder
    line: int

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort."""
        lines, seconds = self.recorder.lines, self.recorder.seconds
        items.sort(key=lambda item: (self.line not in lines[item.nodeid], seconds[item.nodeid]))


def in_fork(work: Callable[[], Any], log: Path, timeout_s: float) -> Any:
    """Return what `work` returns in a forked process, or None if it dies or the time is over."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # The process is killed as soon as the pipe is closed.
        with os.fdopen(writer, "wb") as pipe:
            try:
                pipe.write(pickle.dumps(work()))
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)
    os.close(writer)
    found = bytearray()
    deadline = time.monotonic() + timeout_s
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        found += piece
    os.close(reader)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # with all that it started
    os.waitpid(pid, 0)
    return pickle.loads(found) if found else None


def run_tests(words: list[str], scratch: Path, plugin: object) -> int:
    """Run pytest in this process, on the copy; return its exit code."""
    os.chdir(scratch)
    sys.path.insert(0, str(scratch))
    os.environ["PYTHONPATH"] = str(scratch)
    common = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--basetemp", str(scratch / "tmp"), "-o", "addopts="]
    common += ["--import-mode=importlib", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*common, *words], plugins=[plugin]))


def copy_repository(scratch: Path) -> None:
    """Copy what git tracks or would."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.splitlines()):
        if (ROOT / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, scratch / name, follow_symlinks=False)
    # Checked by content: a mutant is compiled again, and what it was compiled to is not kept.
    compileall.compile_dir(scratch, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def main() -> int:
    """Run, and return 0 if no mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="path of the file, from the repository's root")
    parser.add_argument("--num", type=int, default=20, help="mutants, drawn at random of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", help="only those of lines such as 10-40")
    parser.add_argument("tests", nargs="+", help="what pytest is given")
    options = parser.parse_args()
    source = (ROOT / options.module).read_text()
    first, last = map(int, options.lines.split("-")) if options.lines else (1, sys.maxsize)
    every = [each for each in mutants(source) if first <= each.line <= last]
    chosen = random.Random(options.seed).sample(every, min(options.num, len(every)))
    for name in PRELOADED:
        importlib.import_module(name)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        scratch, log = Path(folder).resolve() / "copy", Path(folder) / "log"
        copy_repository(scratch)
        file = scratch / options.module

        def base() -> tuple[int, Recorder]:
            recorder = Recorder(str(file))
            return run_tests(options.tests, scratch, recorder), recorder

        began = time.monotonic()
        code, recorder = in_fork(base, log, 600) or (1, None)
        if recorder is None or code:
            sys.exit(f"the tests fail without a mutant:\n{log.read_text()}")
        took = time.monotonic() - began
        print(f"{options.module}: {len(every)} mutants, {len(chosen)} tried; the tests take {took:.0f} s", flush=True)
        survived = 0
        for mutant in sorted(chosen, key=lambda each: each.line):
            file.write_text(mutant.source)
            plugin = LineFirst(recorder, mutant.line)
            code = in_fork(partial(run_tests, options.tests, scratch, plugin), log, 30 + 4 * took)
            if code is not None and code > pytest.ExitCode.INTERRUPTED:
                sys.exit(f"pytest itself failed at {mutant.what}:\n{log.read_text()}")
            if code == 0:
                survived += 1
                print(f"SURVIVED {options.module}:{mutant.line}: {mutant.what}", flush=True)
        print(f"{options.module}: {len(chosen) - survived} of {len(chosen)} killed")
    return 0 if not survived else 1


if __name__ == "__main__":
    sys.exit(main())
