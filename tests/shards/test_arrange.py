import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.config import PackConfig
from shards.packing import arrange as arranging
from shards.packing.arrange import Digests, arrange
from shards.packing.content import DIGEST, split_of
from shards.packing.plan import Header, PackPlan, Split, TableWriter
from tests.shards.test_plan import shuffled


def write_listing(folder, names):
    """A listing of files of one folder."""
    folder.mkdir()
    with TableWriter(folder) as table:
        for number, name in enumerate(names):
            table.add(0, number % 3, name, number, 7 * number)
    Header(
        settings=PackConfig(sources=("in",), out="out").settings(),
        sources=[{"kind": "folder", "path": "in", "root": "/in", "follow_links": False}],
        class_names=(),
        splits=[Split(name="", first=0, num_positions=len(names), shard_samples=len(names))],
        depth_range="full",
        has_label_sets=False,
    ).write(folder)
    return PackPlan.open(str(folder))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_arranged_as_in_memory(tmp_path_factory, data):
    names = data.draw(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=40))
    # Some contents several times; 0 cannot be read.
    contents = data.draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names)))
    seed = data.draw(st.none() | st.integers(0, 9))
    shares = data.draw(st.sampled_from([(), (("val", 0.4),), (("val", 0.2), ("test", 0.3))]))
    dedup = data.draw(st.booleans())
    values = [0 if content == 0 else pow(3, 100 * content, 2**128) for content in contents]
    digests = np.array([(value >> 64, value & (2**64 - 1)) for value in values], dtype=DIGEST)
    folder = tmp_path_factory.mktemp("arrange")
    listed = write_listing(folder / "listed-1", names)
    (folder / "plan-1").mkdir()
    by_content = bool(shares) or dedup or data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arranging, "_CHUNK_ROWS", data.draw(st.integers(1, 20)))
        patch.setattr(arranging, "_PARTITION_ROWS", data.draw(st.integers(1, 20)))
        splits = arrange(
            listed,
            folder / "plan-1",
            seed=seed,
            shard_samples=3,
            digests=Digests(lambda start, stop: digests[start:stop], shares, dedup) if by_content else None,
        )
    order = list(range(len(names))) if seed is None else shuffled(len(names), seed)
    split = split_of(digests, [share for _, share in shares]).tolist()
    later = {row for row in order if dedup and values[row] and values.index(values[row]) < row}
    Header(
        settings=listed.settings,
        sources=listed.source_specs,
        class_names=(),
        splits=splits,
        depth_range="full",
        has_label_sets=False,
        listed=listed.name,
    ).write(folder / "plan-1")
    plan = PackPlan.open(str(folder / "plan-1"))
    for number, own in enumerate(splits):
        expected = [row for row in order if split[row] == number and row not in later]
        found = plan.rows(own.first, own.first + own.num_positions)
        assert found.table["offset"].tolist() == expected
        assert [name for _, name, *_ in plan.inputs(found)] == [names[row] for row in expected]
        dropped = [row for row in sorted(later) if split[row] == number]
        lines = [json.loads(line) for line in b"".join(plan.duplicates(number)).splitlines()]
        place = listed.source(0).describe
        assert [line["source"] for line in lines] == [place(names[row]) for row in dropped]
        first = [place(names[values.index(values[row])]) for row in dropped]
        assert [line["detail"] for line in lines] == [f"same bytes as {each}" for each in first]
    assert plan.num_inputs == len(names)
    left = {path.name for path in (folder / "plan-1").iterdir()}
    assert left <= {"plan.json", "rows.bin", "names.bin", *(f"duplicates-{number}.jsonl" for number in range(3))}
