"""Recordings: what goes in comes out; what is damaged is said with file, line and reason."""

import os
from pathlib import Path

import msgspec
import pytest
import zstandard

from mdcollector import recording
from mdcollector.errors import StorageError
from mdcollector.recording import Entry, RecordingWriter, read_recording

ENTRIES = [
    Entry(1_723_161_253_123_456_789, "c1", "open", url="wss://example.test/ws?x=1"),
    Entry(1_723_161_253_123_456_790, "c1", "out", raw='{"method":"SUBSCRIBE"}'),
    *(Entry(1_723_161_253_200_000_000 + i, "c1", "in", raw=f'{{"i": {i}, "t": "ソラ\\n\\"", "x": 1.10}}') for i in range(5000)),
    Entry(1_723_161_254_000_000_000, "c2", "http", url="https://example.test/depth", raw='{"bids":[]}'),
]  # fmt: skip
SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])


def written(path: Path) -> Path:
    with RecordingWriter(path) as out:
        for entry in ENTRIES:
            out.write(entry)
        assert out.entries == len(ENTRIES)
        assert not path.exists(), "a recording has its name only when it is whole"
    return path


@SUFFIXES
def test_what_was_written_is_read(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / "deep" / f"r{suffix}")
    assert list(read_recording(path)) == ENTRIES
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix == ".jsonl.zst":
        assert path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"


@SUFFIXES
def test_nothing_is_overwritten(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_bytes(b"precious")
    with pytest.raises(StorageError, match="exists, will not be overwritten"):
        RecordingWriter(path)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    out = RecordingWriter(tmp_path / "r.jsonl.zst")
    out.close()
    out.close()
    assert list(read_recording(out.path)) == []


def test_files_of_several_frames_are_read_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.zst"
    lines = [msgspec.json.encode(entry) + b"\n" for entry in ENTRIES]
    frames = [zstandard.ZstdCompressor().compress(b"".join(part)) for part in (lines[:7], [], lines[7:9], lines[9:])]
    path.write_bytes(b"".join(frames))
    assert list(read_recording(path)) == ENTRIES


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 0.9999])
def test_a_cut_recording_is_not_taken_for_a_whole_one(tmp_path: Path, share: float) -> None:
    path = written(tmp_path / "r.jsonl.zst")
    raw = path.read_bytes()
    path.write_bytes(raw[: max(1, min(len(raw) - 1, int(len(raw) * share)))])
    entries = []
    with pytest.raises(StorageError, match=r"r\.jsonl\.zst: unreadable behind line \d+"):
        entries.extend(read_recording(path))


def test_a_flipped_bit_in_a_compressed_recording_is_found(tmp_path: Path) -> None:
    raw = written(tmp_path / "r.jsonl.zst").read_bytes()
    path = tmp_path / "flipped.jsonl.zst"
    for at in range(0, len(raw), max(1, len(raw) // 40)):
        flipped = bytearray(raw)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(StorageError, match=r"flipped\.jsonl\.zst"):
            list(read_recording(path))


@SUFFIXES
def test_a_bad_line_is_told_or_ends_it(tmp_path: Path, suffix: str) -> None:
    good = msgspec.json.encode(ENTRIES[1]) + b"\n"
    bad = [b'{"t": 1, "conn": "c", "dir": "sideways"}\n', b'{"t": 1\n', b"\xff\xfe\n", b"\n", b"[]\n", b'{"t": "x"}\n']
    text = good + b"".join(line + good for line in bad)
    path = tmp_path / f"r{suffix}"
    path.write_bytes(zstandard.ZstdCompressor().compress(text) if suffix.endswith(".zst") else text)
    told: list[int] = []
    entries = list(read_recording(path, on_bad_line=lambda number, reason: told.append(number) if reason else None))
    assert entries == [ENTRIES[1]] * (len(bad) + 1)
    assert told == [2, 4, 6, 8, 10, 12]
    with pytest.raises(StorageError, match=r":2: not an entry of a recording: .*sideways"):
        list(read_recording(path))


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "LINE_BYTES_MAX", 1000)
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"t": ' + b"1" * 5000)
    with pytest.raises(StorageError, match="longer than 1000 bytes"):
        list(read_recording(path, on_bad_line=lambda *_: None))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing\.jsonl.*No such file"):
        list(read_recording(tmp_path / "nothing.jsonl"))


def test_recorded_traffic_is_read_whole() -> None:
    data = Path(os.environ.get("MD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    paths = sorted(data.glob("*/recorded/*.jsonl.zst"))
    if not paths:
        pytest.skip(f"no recorded traffic in {data}; MD_DATA names its place")
    for path in paths:
        times: dict[str, int] = {}
        count = 0
        for entry in read_recording(path):
            assert entry.t >= times.get(entry.conn, 0), path
            times[entry.conn] = entry.t
            count += 1
        assert count
