"""Recordings of exchange traffic: one JSON object a line, zstd or plain (`.jsonl.zst`, `.jsonl`).

Keys: `t` receive time in ns since the epoch, `conn` connection name, `dir` (in: frame from the exchange, out: frame
the client sent, http: REST body with its request in `url`, open: connection opened), `raw` the exact text, `url`.
Read by normalize, mdreplay and the tests; written by `mdreplay record`. Never interprets `raw`.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import msgspec
import zstandard

from mdcollector.errors import StorageError

LINE_BYTES_MAX = 64 << 20  # the largest frame ever recorded has 5 MB; a line beyond this is not a frame


class Entry(msgspec.Struct, omit_defaults=True):
    """One line of a recording."""

    t: int
    conn: str
    dir: Literal["in", "out", "http", "open"]
    url: str = ""
    raw: str = ""


_decode_entry = msgspec.json.Decoder(Entry).decode
_encode_entry = msgspec.json.Encoder().encode


def read_recording(path: Path, on_bad_line: Callable[[int, str], None] | None = None) -> Iterator[Entry]:
    """Yield the entries of one recording in file order, holding one line in memory.

    A line that is not an entry is told to `on_bad_line(line number, reason)` and passed over; without that function,
    and always for a damaged file, StorageError names file, line and reason.
    """
    number = 0
    try:
        with _open_lines(path) as lines:
            while line := lines.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    raise StorageError(f"{path}:{number}: longer than {LINE_BYTES_MAX} bytes, not a recording")
                try:
                    yield _decode_entry(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is a DecodeError
                    if on_bad_line is None:
                        raise StorageError(f"{path}:{number}: not an entry of a recording: {error}") from error
                    on_bad_line(number, str(error))
    except (OSError, zstandard.ZstdError, EOFError) as error:
        raise StorageError(f"{path}: unreadable behind line {number}: {error}") from error


def _open_lines(path: Path) -> io.BufferedReader:
    file = open(path, "rb")  # noqa: SIM115 (the reader below owns it)
    if path.suffix != ".zst":
        return file
    return io.BufferedReader(_Decompressed(file), 1 << 20)


class _Decompressed(io.RawIOBase):
    """The text of a zstd file. Unlike zstandard's own reader it says so when the file ends inside a frame."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            # A few bytes at a time: a block of 128 KiB can be packed into four bytes.
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._file.read(4096)
            if not packed:
                if self._inside:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._text = memoryview(self._frame.decompress(packed))
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class RecordingWriter:
    """Appends entries to a new recording; the file gets its name only when it is whole (`close`).

    StorageError when it exists or the disk refuses it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise StorageError(f"{path}: exists, will not be overwritten")
        self.path = path
        self._part = path.with_name(path.name + ".part")
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(self._part, "wb")  # noqa: SIM115 (closed in close)
        self._out: IO[bytes] = (
            zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(self._file, closefd=False)
            if path.suffix == ".zst"
            else self._file
        )
        self.entries = 0

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def write(self, entry: Entry) -> None:
        with self._writing():
            self._out.write(_encode_entry(entry) + b"\n")
        self.entries += 1

    def close(self) -> None:
        """End the compressed stream, make the file durable and give it its name."""
        if self._file.closed:
            return
        with self._writing():
            if self._out is not self._file:
                self._out.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()  # not whole: it keeps its temporary name
