"""TFRecord framing: a fault at every byte, both ways against TensorFlow, and its speed."""

import gzip
import io
import os
import random
import tracemalloc
import zlib

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.streams import ExactStream, InflatedStream
from formats.tfrecord import (
    Damage,
    Record,
    _masked_crc,
    is_tfrecord,
    looks_like_tfrecord_name,
    missing_shards,
    read_records,
    write_record,
)

PAYLOADS = [b"first record", b"", b"the third: \x00\xff\x1f\x8b" + bytes(range(40))]
STARTS = [0, 28, 44]


def framed(payloads=PAYLOADS):
    stream = io.BytesIO()
    for payload in payloads:
        write_record(stream, payload)
    return stream.getvalue()


PLAIN = framed()
RECORDS = [Record(*row) for row in zip(STARTS, range(3), PAYLOADS, strict=True)]


def read(data, size=None, **options):
    return list(read_records(io.BytesIO(data), size, **options))


def flips(data):
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            yield position, bytes(damaged)


def decodable(data):
    """What zlib makes of gzip members one byte at a time, and whether it came to a clean end."""
    out, rest = [], data
    while rest:
        member = zlib.decompressobj(wbits=31)
        for end in range(1, len(rest) + 1):
            try:
                out.append(member.decompress(rest[end - 1 : end]))
            except zlib.error:
                return b"".join(out), False
            if member.eof:
                break
        rest = rest[end:]
        if not member.eof:
            return b"".join(out), False
    return b"".join(out), True


def reachable(data):
    return [row for row in read(decodable(data)[0]) if isinstance(row, Record)]


def test_records_carry_offset_index_and_payload():
    assert read(PLAIN, len(PLAIN)) == RECORDS
    assert read(PLAIN) == RECORDS


def test_a_file_of_zero_bytes_has_no_records_and_no_damage():
    assert read(b"", 0) == read(b"") == []
    assert read(gzip.compress(b"")) == []


@pytest.mark.parametrize("sized", [True, False])
def test_plain_cut_at_each_length(sized):
    for length in range(len(PLAIN)):
        whole = sum(length >= end for end in STARTS[1:])
        rows = read(PLAIN[:length], length if sized else None)
        if length in STARTS:
            assert rows == RECORDS[:whole]
            continue
        *records, last = rows
        assert records == RECORDS[:whole], length
        assert (last.error_class, last.index, last.offset) == (
            "TruncatedRecord",
            whole,
            STARTS[whole],
        )
        assert last.bytes == (length - STARTS[whole] if sized else None)


def test_plain_cut_shorter_than_its_size_is_never_silent():
    for length in range(len(PLAIN)):
        *records, last = read(PLAIN[:length], len(PLAIN))
        whole = sum(length >= end for end in STARTS[1:])
        assert records == RECORDS[:whole]
        assert (last.error_class, last.index) == ("TruncatedFile", whole)
        assert f"after {length} of the file's {len(PLAIN)} bytes" in last.message


@pytest.mark.parametrize("sized", [True, False])
def test_plain_bit_flip_at_each_byte(sized):
    size = len(PLAIN) if sized else None
    for position, damaged in flips(PLAIN):
        hit = max(i for i, start in enumerate(STARTS) if start <= position)
        rows = read(damaged, size)
        bad = [row for row in rows if isinstance(row, Damage)]
        assert [(row.index, row.offset) for row in bad] == [(hit, STARTS[hit])], position
        if position - STARTS[hit] < 12:
            assert (bad[0].error_class, rows) == ("BadLength", [*RECORDS[:hit], bad[0]])
        else:
            others = [*RECORDS[:hit], bad[0], *RECORDS[hit + 1 :]]
            assert (bad[0].error_class, rows) == ("BadChecksum", others)
            assert bad[0].bytes == len(PAYLOADS[hit])


@pytest.mark.parametrize("junk", [b"\0", b"\0" * 11, b"\0" * 12, b"\0" * 500, b"junk" * 9])
def test_trailing_junk_is_one_damage_behind_the_records(junk):
    data = PLAIN + junk
    *records, last = read(data, len(data))
    assert records == RECORDS
    assert (last.offset, last.index, last.bytes) == (len(PLAIN), 3, len(junk))
    assert last.error_class == ("TruncatedRecord" if len(junk) < 12 else "BadLength")


ONE_MEMBER = gzip.compress(PLAIN, 9, mtime=0)
STORED = gzip.compress(PLAIN, 0, mtime=0)
FIRST_MEMBER = gzip.compress(framed(PAYLOADS[:1]), mtime=0)
TWO_MEMBERS = FIRST_MEMBER + gzip.compress(PLAIN[28:], mtime=0)
GZIPS = pytest.mark.parametrize("data", [ONE_MEMBER, STORED, TWO_MEMBERS])


@GZIPS
def test_gzip_cut_at_each_length(data):
    assert read(data, len(data)) == RECORDS
    for length in range(1, len(data)):
        rows = read(data[:length])
        records = reachable(data[:length])
        if data[:length] == FIRST_MEMBER:
            assert rows == RECORDS[:1]
        else:
            assert rows[:-1] == records, length
            # One byte is no sign of gzip yet.
            expected = "GzipDamage" if length > 1 else "TruncatedRecord"
            assert (rows[-1].error_class, rows[-1].index) == (expected, len(records))
            assert rows[-1].bytes is None
        *records, last = read(data[:length], len(data))
        assert records == reachable(data[:length])
        assert last.error_class == "TruncatedFile"


@GZIPS
@pytest.mark.parametrize("zeros", [1, 512, 200_000])
def test_zeros_after_gzip_are_no_damage(data, zeros):
    padded = data + bytes(zeros)
    assert read(padded, len(padded)) == RECORDS
    *records, damage = read(padded + b"junk")
    assert (records, damage.error_class) == (RECORDS, "GzipDamage")


def test_gzip_cut_loses_no_record_before_it():
    # Without its 8 bytes of trailer the member still holds all three.
    rows = read(gzip.compress(PLAIN)[:-8])
    assert rows[:3] == RECORDS
    assert rows[3].index == 3
    assert "decompressed" in rows[3].message


@GZIPS
def test_gzip_bit_flip_at_each_byte(data):
    for position, damaged in flips(data):
        rows = read(damaged, len(damaged))
        records = [row for row in rows if isinstance(row, Record)]
        bad = [row for row in rows if isinstance(row, Damage)]
        if damaged.startswith(b"\x1f\x8b"):
            assert records == reachable(damaged), position
            assert all("decompressed" in row.message for row in bad)
        intact = decodable(damaged) == (PLAIN, True)
        assert bool(bad) != intact, position
        assert len(bad) <= 2  # a wrong payload, then the member's own checksum


def test_gzip_damage_deep_in_a_file_keeps_all_before_it():
    noise = random.Random(0)
    payloads = [noise.randbytes(3000) + bytes(2000) for _ in range(400)]
    data = bytearray(gzip.compress(framed(payloads), 6))
    data[900_000] ^= 0x10
    rows = read(bytes(data), len(data))
    records = [row for row in rows if isinstance(row, Record)]
    assert records == reachable(bytes(data))
    assert len(records) >= 250
    assert isinstance(rows[-1], Damage)


@pytest.mark.parametrize("junk", [b"\x1f", b"junk", b"\x1f\x8bjunk"])
def test_bytes_after_a_gzip_member_are_damage(junk):
    *records, last = read(gzip.compress(PLAIN) + junk)
    assert records == RECORDS
    assert (last.error_class, last.index, last.offset) == ("GzipDamage", 3, len(PLAIN))


def test_gzip_output_that_waits_in_the_inflater_comes_out_before_a_cut():
    # 1 MiB of zeros are 1 KB of gzip: at the cut the inflater has no input but far more to say.
    payloads = [bytes(1 << 20), b"x"]
    data = gzip.compress(framed(payloads))
    assert [row.data for row in read(data)] == payloads
    for length in range(len(data) - 60, len(data)):
        *records, last = read(data[:length])
        assert records == reachable(data[:length])
        assert last.error_class == "GzipDamage"
    assert [len(row.data) for row in records] == [1 << 20, 1]


def test_gzip_damage_where_output_waits_keeps_every_byte_before_it():
    data = gzip.compress(bytes(600_000), mtime=0)
    for position in range(250, 290):  # where the first block of decompressed bytes is full
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        inflated = InflatedStream(ExactStream(io.BytesIO(damaged), None), b"")
        assert len(inflated.read(1 << 30)) == len(decodable(damaged)[0]), position
        assert inflated.damage


def test_a_plain_file_that_begins_with_gzips_magic_is_plain():
    payloads = [bytes(0x08_8B_1F), b"next"]
    data = framed(payloads)
    assert data.startswith(b"\x1f\x8b\x08")
    assert [row.data for row in read(data, len(data))] == payloads
    assert is_tfrecord(data[:12])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_record_over_the_limit_is_walked_over(pack):
    data = pack(framed([b"a", b"b" * 1000, b"c"]))
    first, large, last = read(data, len(data), max_record_bytes=999)
    assert (first.data, last.data, last.index) == (b"a", b"c", 2)
    assert (large.error_class, large.index, large.bytes) == ("RecordTooLarge", 1, 1000)
    assert "1000" in large.message
    assert "999" in large.message
    assert all(isinstance(row, Record) for row in read(data, len(data), max_record_bytes=1000))


def test_a_cut_inside_a_record_over_the_limit_is_a_cut():
    data = framed([b"a", b"b" * 1000])[:-5]
    assert [row.index for row in read(data, None, max_record_bytes=99)] == [0, 1]
    assert read(data, None, max_record_bytes=99)[1].error_class == "TruncatedRecord"


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("length", [1 << 30, 1 << 62, (1 << 64) - 1])
def test_a_length_beyond_the_file_allocates_nothing(length, sized):
    header = length.to_bytes(8, "little")
    data = PLAIN + header + _masked_crc(header).to_bytes(4, "little") + bytes(20 << 20)
    tracemalloc.start()
    *records, last = read(data, len(data) if sized else None, max_record_bytes=1 << 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records == RECORDS
    assert (last.error_class, last.offset) == ("TruncatedRecord", len(PLAIN))
    # The stream of `read` holds `data` without a copy.
    assert peak < (1 << 20 if sized else 80 << 20)


def test_memory_is_a_record_and_not_the_file():
    bomb = gzip.compress(framed([b"a", bytes(200 << 20), *[b"x" * 10_000] * 2000]), 1)
    tracemalloc.start()
    rows = sum(1 for _ in read_records(io.BytesIO(bomb), len(bomb), max_record_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 2002
    assert peak < 40 << 20


class Trickle(io.RawIOBase):
    """A stream as a network gives it: no seek, a few bytes at a time."""

    def __init__(self, data, seed):
        self._stream = io.BytesIO(data)
        self._random = random.Random(seed)

    def readable(self):
        return True

    def read(self, count=-1):
        return self._stream.read(min(count, self._random.randint(1, 7)))


@given(
    st.lists(st.binary(max_size=60), max_size=8),
    st.integers(0, 8),
    st.sampled_from([bytes, gzip.compress]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_in_one_file_or_in_joined_ones(payloads, at, pack, seed):
    data = pack(framed(payloads[:at])) + pack(framed(payloads[at:]))
    rows = read(data, len(data))
    assert [(row.index, row.data) for row in rows] == list(enumerate(payloads))
    assert list(read_records(Trickle(data, seed), len(data))) == rows
    stream = io.BytesIO(framed(payloads))
    for row in rows:
        assert stream.tell() == row.offset
        stream.seek(12 + len(row.data) + 4, os.SEEK_CUR)


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x1f\x8b\x08", PLAIN, gzip.compress(PLAIN)])
)
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_and_none_are_passed_over(junk, before):
    data = before + junk
    rows = read(data, len(data))
    assert rows or not junk
    for row in rows:
        if isinstance(row, Damage):
            assert row.message.isascii()
            assert len(row.message) < 200
            assert "\n" not in row.message
    assert is_tfrecord(data) == any(row.index for row in rows) or not before


def test_a_message_never_holds_the_payload():
    damaged = PLAIN.replace(b"first record", b"First record")
    assert [row.message for row in read(damaged) if isinstance(row, Damage)] == [
        "wrong checksum of a record of 12 bytes"
    ]


def test_errors_of_the_stream_are_not_damage():
    class Broken(io.RawIOBase):
        def read(self, count=-1):
            raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network"):
        list(read_records(Broken(), None))


def test_is_tfrecord_goes_by_the_first_header():
    assert is_tfrecord(PLAIN)
    assert is_tfrecord(PLAIN[:12])
    assert is_tfrecord(gzip.compress(PLAIN * 50)[:100])
    assert is_tfrecord(gzip.compress(b"") + gzip.compress(PLAIN))
    assert not is_tfrecord(PLAIN[:11])
    assert not is_tfrecord(b"")
    assert not is_tfrecord(b"\x1f\x8b")
    assert not is_tfrecord(gzip.compress(b"a text that is no TFRecord"))
    assert not is_tfrecord(b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01")
    for _, damaged in flips(PLAIN[:12]):
        assert not is_tfrecord(damaged)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gs://bucket/train.tfrecord", True),
        ("/data/train.TFRecords.gz", True),
        ("a.tfrec", True),
        ("a.tfr", True),
        ("train-00003-of-00010", True),
        ("train-00003-of-00010.gz", True),
        ("train.tfrecord-00003-of-00010", True),
        ("train-00003-of-00010.tfrecord.gz", True),
        ("train-00003-of-00010.parquet", False),
        ("tfrecord", False),
        ("a.tfrecord.txt", False),
        ("photo.jpg", False),
        ("train.tfrecord/photo", False),
        ("cat-1-of-3", False),
    ],
)
def test_looks_like_tfrecord_name(name, expected):
    assert looks_like_tfrecord_name(name) is expected


def test_missing_shards_by_set():
    names = [
        "gs://b/train-00000-of-00003.tfrecord",
        "gs://b/train-00002-of-00003.tfrecord",
        "gs://b/train-00002-of-00003.tfrecord.gz",
        "gs://b/val-00000-of-00001",
        "gs://b/train-00001-of-00002.tfrecord",
        "gs://b/README",
        "gs://b/set-00000-of-00002/photo.jpg",
    ]
    assert missing_shards(names) == [
        "gs://b/train-00001-of-00003.tfrecord",
        "gs://b/train-00000-of-00003.tfrecord.gz",
        "gs://b/train-00001-of-00003.tfrecord.gz",
        "gs://b/train-00000-of-00002.tfrecord",
    ]
    assert missing_shards([]) == []


@given(st.integers(1, 40), st.data())
@settings(deadline=None)
def test_missing_shards_are_what_was_left_out(total, data):
    names = [f"a/b-{i:05}-of-{total:05}.tfrecord" for i in range(total)]
    kept = data.draw(st.sets(st.sampled_from(names), min_size=1))
    assert missing_shards(kept) == [name for name in names if name not in kept]


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_tensorflow_reads_what_we_write_and_we_read_what_it_writes(tmp_path, compression):
    import tensorflow as tf

    payloads = [*PAYLOADS, os.urandom(100_000)]
    theirs = tmp_path / "theirs.bin"
    with tf.io.TFRecordWriter(str(theirs), compression) as writer:
        for payload in payloads:
            writer.write(payload)
    with theirs.open("rb") as stream:
        assert [row.data for row in read_records(stream, theirs.stat().st_size)] == payloads
    assert is_tfrecord(theirs.read_bytes()[:200])

    ours = tmp_path / "ours.bin"
    with (gzip.open if compression else open)(ours, "wb") as stream:
        for payload in payloads:
            write_record(stream, payload)
    dataset = tf.data.TFRecordDataset(str(ours), compression)
    assert list(dataset.as_numpy_iterator()) == payloads


def test_the_checksum_is_the_c_implementation():
    assert google_crc32c.implementation == "c"
