import moco_fast
from moco_fast.versions import versions_of


def test_what_has_no_metadata_is_unknown_and_this_project_knows_itself():
    found = versions_of("torch", "a-package-that-is-only-on-the-path")
    assert found["moco-fast"] == moco_fast.__version__
    assert found["a-package-that-is-only-on-the-path"] == "unknown"
    assert found["torch"][0].isdigit()
