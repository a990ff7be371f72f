"""Short cuts for names of images, against the rules that they stand for."""

from unittest.mock import patch

from hypothesis import example, given
from hypothesis import strategies as st

from shards.sources import samples
from shards.sources.beside import describe_sets, may_describe
from shards.sources.samples import SeveralImages, sifted, split_name
from shards.storage import file_kinds
from shards.storage.file_kinds import IMAGE_SUFFIXES, ends_as_image, key_of_plain_image, litter, may_be_archive

PARTS = [
    b"a",
    b"B2",
    b"0001",
    b"_x",
    b"@eaDir",
    b"__MACOSX",
    b"thumbs",
    b"x-00000-of-00001",
    b"tfrecord",
    b".",
    b"..",
    b" ",
]
ENDS = [b".jpg", b".JPEG", b".Png", b".tar", b".mds", b".json", b".gz", b".cls", b".seg", b"-idx3-ubyte", b".0", b""]
names = st.builds(
    lambda folders, base, ends: b"/".join([*folders, b"".join(base) + b"".join(ends)]),
    st.lists(st.sampled_from(PARTS), max_size=3),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=2),
    st.lists(st.sampled_from(ENDS), max_size=3),
)


@given(names)
@example(b"train/n01440764/n01440764_10026.JPEG")
@example(b"._photo.jpg")
@example(b"a\n/b.jpg")
def test_a_plain_image_is_what_all_other_rules_take_for_an_image(name):
    key = key_of_plain_image(name)
    if key is None:
        return
    split = split_name(name)
    assert key == split.folder + split.key
    assert split.extension.lower().decode() in IMAGE_SUFFIXES
    assert litter(name) is None
    assert not may_be_archive(name)


def test_usual_names_are_plain():
    for name in (b"a.jpg", b"train/n01440764/n01440764_10026.JPEG", b"00012/000123456.webp", b"a-b/c_d.Png"):
        assert key_of_plain_image(name) == name.rpartition(b".")[0]


@given(names)
def test_what_ends_as_an_image_is_called_no_archive(name):
    if ends_as_image(name):
        assert not file_kinds._may_be_archive(name)


@given(st.lists(names, max_size=12, unique=True))
def test_what_describes_a_set_is_among_what_may(found):
    assert describe_sets(found) == describe_sets([name for name in found if may_describe(name)])


@given(st.lists(names, max_size=12, unique=True))
def test_a_sifted_listing_is_the_same_without_short_cuts(found):
    def sift():
        several = SeveralImages()
        return list(sifted(sorted(found), (), several, lambda name: b"")), dict(several._samples)

    quick = sift()
    with patch.object(samples, "key_of_plain_image", lambda name: None):
        assert quick == sift()
