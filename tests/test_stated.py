"""Every figure that documents state is the one of the results, and one that is not is noticed on either side."""

import shutil
from pathlib import Path

import pytest

from tests.scripts import load

ROOT = Path(__file__).parent.parent
PAGE = "# Loader\n\n| a / b | 727 samples/s | 192 samples/s | **3.81** (3.59 to 3.84) | 4: MISSED |\n"
TEXT = "By `benchmarks/loader.py` it is {} times as fast,\nat 730 samples/s.\n"


@pytest.fixture(scope="module")
def stated():
    return load("stated")


@pytest.fixture(scope="module")
def statements(stated):
    return stated.read_statements()


def a_statement(stated, **other):
    row = "| a / b | {rate} samples/s | {} | **{times}**"
    known = {"document": "docs/a.md", "page": "loader", "rows": (row,)}
    return stated.Statement(**known | {"says": "is {times} times as fast, at {rate} samples/s"} | other)


@pytest.fixture
def project(stated, tmp_path):
    """A project of one figure and a page of results, with what is asked of every project."""
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("README.md", "CHANGELOG.md"):
        (tmp_path / name).write_text("Text.\n")
    (tmp_path / stated.PERFORMANCE).write_text(f"before\n{stated.MISSED_BEGIN}\n{stated.MISSED_END}\nafter\n")
    (tmp_path / stated.RESULTS / "loader.md").write_text(PAGE)
    (tmp_path / "docs" / "a.md").write_text(TEXT.format("3.8"))
    return tmp_path


def test_documents_state_what_the_results_have(stated, statements):
    assert len(statements) > 50
    assert stated.problems(ROOT, statements) == []


def test_a_change_of_any_figure_in_documents_or_results_is_noticed(stated, statements):
    pages = stated.read_pages(ROOT)
    texts = stated.documents(ROOT, statements)
    num_figures = 0
    for each in statements:
        text = texts[each.document]
        for spot in stated.compare(each, text, pages)[0]:
            last = len(spot.word) - 1
            while spot.word[last] in ("0," if "." not in spot.word and last > 1 else ","):
                last -= 1
            other = f"{spot.word[:last]}{(int(spot.word[last]) + 2) % 10}{spot.word[last + 1 :]}"
            changed = f"{text[: spot.start]}{other}{text[spot.start + len(spot.word) :]}"
            spots, troubles = stated.compare(each, changed, pages)
            assert troubles or not all(again.agrees for again in spots), (each.says, spot.name, other)
            num_figures += 1
        page = pages.get(each.page, "")
        for row in each.rows:
            for name, at in stated.pattern(row).search(page).groupdict().items():
                start = stated.pattern(row).search(page).start(name)
                other = f"{1.2 * float(at.replace(',', '')) + 1:.4f}"
                changed = pages | {each.page: f"{page[:start]}{other}{page[start + len(at) :]}"}
                spots, troubles = stated.compare(each, text, changed)
                assert troubles or not all(again.agrees for again in spots), (each.says, name, other)
    assert num_figures > 150


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("3.8", None),
        ("3.81", None),
        ("3.80", "should be 3.81"),
        ("3.82", "should be 3.81"),
        ("3.9", "should be 3.8,"),
        ("4", None),
        ("3.814", "should be 3.810"),
        ("three", "is there 0 times"),
    ],
)
def test_a_figure_is_the_result_rounded_to_its_digits(stated, project, says, why):
    (project / "docs" / "a.md").write_text(TEXT.format(says))
    found = stated.problems(project, [a_statement(stated)])
    assert not found if why is None else why in found[0]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"page": "none"}, "there is no benchmarks/results/none.md"),
        ({"rows": ("| c / d | {rate} samples/s | {} | **{times}**",)}, "is there 0 times in"),
        ({"rows": ("| a / b | {rate} samples/s",)}, "holes ['times'] are on one side only"),
        ({"says": "is {times} times as fast"}, "730 (... "),
        ({"says": "is {times} times as"}, "holes ['rate'] are on one side only"),
        ({"says": "at 730 samples/s", "rows": (), "page": "", "source": "a guess"}, "3.8 (... "),
    ],
)
def test_what_cannot_be_compared_and_what_is_not_listed_is_said(stated, project, other, why):
    assert any(why in line for line in stated.problems(project, [a_statement(stated, **other)]))


def test_figures_are_only_asked_for_beside_benchmarks_and_speeds(stated, project):
    (project / "docs" / "a.md").write_text("A chunk has 1 MiB, a tenth of that is 10%.\n")
    assert stated.problems(project, []) == []
    (project / "docs" / "a.md").write_text("A chunk has 1 MiB (`benchmarks/loader.py`).\n\nIt is 2 times as fast.\n")
    assert len(stated.problems(project, [])) == 2


def test_writing_puts_the_results_figures_into_documents(stated, project):
    (project / "docs" / "a.md").write_text(TEXT.format("5.2"))
    changes = stated.write(project, [a_statement(stated)])
    assert (project / "docs" / "a.md").read_text() == TEXT.format("3.8")
    assert [line.split(":")[0] for line in changes] == ["docs/a.md", "docs/performance.md"]
    missed = (
        "[a / b](../benchmarks/results/loader.md) | 727 samples/s | 192 samples/s | **3.81** (3.59 to 3.84) | 4 | 5% |"
    )
    assert missed in (project / stated.PERFORMANCE).read_text()
    assert stated.write(project, [a_statement(stated)]) == []


def test_goals_that_are_missed_are_in_the_page_about_performance(stated):
    text = (ROOT / stated.PERFORMANCE).read_text()
    assert text == stated.with_missed(text, stated.read_pages(ROOT)), "python benchmarks/stated.py --write"
    for name, page in stated.read_pages(ROOT).items():
        for line in page.splitlines():
            if "MISSED" in line:
                assert f"[{line.split(' | ')[0].removeprefix('| ')}](../benchmarks/results/{name}.md)" in text


def test_the_claims_are_those_of_the_pages(stated):
    run_all, alternating = load("run_all"), load("alternating")
    pages = stated.read_pages(ROOT)
    for name, claims in run_all.read_claims(ROOT / stated.RESULTS / "claims.json").items():
        assert claims
        lines = pages[name].splitlines()
        for claim in claims:
            # Other measurements may stand beside it, but none under its name.
            shown = [line for line in lines if line.startswith(f"| {claim.claim} | ")]
            assert shown == [alternating.claims_table([claim]).splitlines()[2]], name


def test_make_bench_writes_documents_only_beside_the_projects_own_readme(stated, project, monkeypatch, capsys):
    run_all = load("run_all")
    shutil.copy(ROOT / "README.md", project / "README.md")
    monkeypatch.setattr(run_all, "ROOT", project)
    monkeypatch.setattr(run_all, "BENCHMARKS", ())
    monkeypatch.setattr(stated, "read_statements", lambda: [a_statement(stated)])
    (project / "docs" / "a.md").write_text(TEXT.format("5.2"))
    words = ["run_all", "--results", str(project / stated.RESULTS), "--build", str(project / "build")]
    monkeypatch.setattr("sys.argv", [*words, "--readme", str(project / "CHANGELOG.md")])
    (project / "CHANGELOG.md").write_text((project / "README.md").read_text())
    run_all.main()
    assert (project / "docs" / "a.md").read_text() == TEXT.format("5.2")
    monkeypatch.setattr("sys.argv", [*words, "--readme", str(project / "README.md")])
    run_all.main()
    assert (project / "docs" / "a.md").read_text() == TEXT.format("3.8")
    assert "docs/a.md: 5.2 is 3.8 now" in capsys.readouterr().out
