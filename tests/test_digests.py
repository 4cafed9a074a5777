"""Keys as 16 bytes: the same by value and by column, looked up, and found twice."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from formats import digests
from formats.digests import (
    DIGEST_BYTES,
    DigestSet,
    image_digest,
    image_digests,
    key_digest,
    key_digests,
    place_digest,
    place_digests,
    repeated_rows,
    standing,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NEAR = st.binary(min_size=1, max_size=1).flatmap(  # digests of which many begin alike
    lambda a: st.sampled_from([a * 8 + b * 8 for b in (b"\0", b"\1", b"\xff")])
)


@given(st.lists(st.tuples(TEXT, st.none() | st.integers(0, 2**40))))
def test_columns_have_the_digests_of_their_values(places):
    sources = pa.array([source for source, _ in places], pa.string())
    indices = pa.array([index for _, index in places], pa.int64())
    assert key_digests(sources) == b"".join(key_digest(source) for source, _ in places)
    images = b"".join(image_digest(f"k{source}", source, index) for source, index in places)
    keys = pa.array([f"k{source}" for source, _ in places], pa.string())
    assert image_digests(keys, sources, indices) == images
    assert place_digests(sources, indices) == b"".join(place_digest(*place) for place in places)


def test_a_digest_is_of_all_of_its_key():
    keys = ["", "a", "b", "a\n", "é", "\udc80"]  # of a file name that is no UTF-8
    assert len({key_digest(key) for key in keys}) == len(keys)
    assert {len(key_digest(key)) for key in keys} == {DIGEST_BYTES}


@given(st.lists(NEAR), st.lists(NEAR))
def test_a_set_holds_what_it_was_made_of(inside, asked):
    made = DigestSet.of(b"".join(inside))
    again = DigestSet.stored(b"".join(made.store()))
    for found in (made, again):
        assert len(found) == len(inside)
        assert [digest in found for digest in asked] == [digest in inside for digest in asked]


def test_a_stored_set_is_not_copied_to_be_asked():
    """numpy's search copies what is not contiguous: all of it, at every question."""
    stored = b"".join(DigestSet.of(b"".join(key_digest(str(n)) for n in range(100))).store())
    found = DigestSet.stored(np.frombuffer(stored, np.uint8))
    assert all(half.flags.c_contiguous and not half.flags.owndata for half in
               (found._firsts, found._seconds))  # fmt: skip


@given(st.lists(st.lists(NEAR, max_size=8), max_size=5))
def test_rows_that_stand_twice(files):
    counts = Counter(digest for digests in files for digest in digests)
    expected = {
        index: rows
        for index, digests in enumerate(files)
        if (rows := [row for row, digest in enumerate(digests) if counts[digest] > 1])
    }
    assert repeated_rows([b"".join(digests) for digests in files]) == expected


@given(st.lists(st.lists(NEAR, max_size=8), max_size=5), st.lists(NEAR))
def test_which_digests_stand_in_files(files, wanted):
    there = {digest for digests in files for digest in digests}
    assert standing(wanted, [b"".join(digests) for digests in files]) == there & set(wanted)


def test_rows_are_only_looked_at_singly_where_they_may_stand_twice():
    files = [b"".join(key_digest(f"{n} {m}") for m in range(1000)) for n in range(3)]
    with mock.patch.object(digests, "_among", side_effect=AssertionError):
        assert repeated_rows(files) == {}
