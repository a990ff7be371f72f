import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("moco_fast", "pipelines", "shards")
MAX_LINES = 60
# Tests, and what has the names of the library that it stands in for.
LEFT_OUT = ("test_", "fake_cuda")


def nodes(kind: type | tuple[type, ...], *, tests: bool = False) -> Iterator[tuple[Path, ast.AST]]:
    """What our modules define; with `tests`, also the modules that tests share."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    if tests:
        paths += [path for path in sorted((ROOT / "tests").rglob("*.py")) if not path.name.startswith(LEFT_OUT)]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path.relative_to(ROOT), node


def test_no_function_is_longer_than_sixty_lines() -> None:
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    lengths = {f"{path}:{node.name}": node.end_lineno - node.lineno + 1 for path, node in functions}
    assert len(lengths) > 500
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_two_classes_have_one_name() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path, node in nodes(ast.ClassDef, tests=True):
        places[node.name.lstrip("_")].append(str(path))
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_has_the_name_of_one_of_the_standard_library(package: str) -> None:
    stems = {path.stem for path in (ROOT / package).rglob("*.py")}
    assert stems & sys.stdlib_module_names == set()
