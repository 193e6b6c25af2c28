"""Stored tables: Arrow schema, rows to Arrow, ClickHouse DDL and the schema page, all derived from records.py.

Called by the sinks, compact, verify and the readers of stored tables; the only block that imports pyarrow.
It knows the shape of a table, never where a table lies.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mdcollector.records import FEEDS, Action, Column, Exchange, Feed, Flag

SCHEMA_VERSION = 1  # of the stored tables; it grows when a column is added, renamed or changes its type

Rows = np.ndarray[tuple[int], np.dtype[np.void]]
Values = np.ndarray[Any, np.dtype[Any]]

_ARROW: dict[str, pa.DataType] = {
    "timestamp": pa.timestamp("us", "UTC"),
    "int64": pa.int64(),
    "int8": pa.int8(),
    "uint8": pa.uint8(),
    "uint32": pa.uint32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "text": pa.string(),
    "category": pa.dictionary(pa.int32(), pa.string()),
}
_CLICKHOUSE = {
    "timestamp": "DateTime64(6, 'UTC')",
    "int64": "Int64",
    "int8": "Int8",
    "uint8": "UInt8",
    "uint32": "UInt32",
    "float64": "Float64",
    "bool": "Bool",
    "text": "String",
    "category": "LowCardinality(String)",
}
_ENUMS: dict[str, type[IntEnum]] = {"exchange": Exchange, "action": Action}
_ACTION_NAMES = pa.array([*(action.name for action in Action), "UNKNOWN"])
_ACTION_INDEX = np.full(256, len(Action), dtype=np.int32)  # by the number in the ring
_ACTION_INDEX[[int(action) for action in Action]] = np.arange(len(Action))
_BLOCK_ROWS = 4096  # turned into columns at once: 512 KB of rows stay in the second cache (22 against 30 ns a row)
_BUFFER_ROWS_MIN = 4096


def arrow_schema(feed: Feed) -> pa.Schema:
    """Schema of the stored table, columns in the order of `feed.table_columns`.

    Only columns whose definition names a null can be null; that also saves their levels in Parquet.
    """
    return pa.schema([pa.field(c.name, _ARROW[c.table], nullable=c.null is not None) for c in feed.table_columns])


def rows_to_table(feed: Feed, rows: Rows, tickers: Sequence[str], exchange: str) -> pa.Table:
    """Rows of a ring as a table. `tickers` is the ring's instrument table, `exchange` the name of the venue."""
    buffer = ColumnBuffer(feed, len(rows))
    buffer.append(rows)
    return buffer.table(tickers, exchange)


class ColumnBuffer:
    """Rows of one feed as columns, filled while the rows are still in the processor's cache.

    Words of eight bytes are what is transposed; narrower columns are cut out of them when the table is made, which is
    three times faster than to gather column by column from rows that have left the cache.
    """

    def __init__(self, feed: Feed, rows_max: int) -> None:
        self.feed, self.rows_max = feed, rows_max
        self.rows = 0
        self._at: dict[str, int] = {c.name: feed.dtype.fields[c.name][1] for c in feed.columns}  # type: ignore[index]
        texts = [c for c in feed.columns if c.ring.startswith("S")]
        words = {at // 8 for c, at in zip(feed.columns, self._at.values(), strict=True) if c not in texts}
        if "trade_id" in self._at:  # its first word tells whether there is one
            words.add(self._at["trade_id"] // 8)
        self._runs = _runs(sorted(words))
        self._word_of = {word: i for i, word in enumerate(sorted(words))}
        size = min(max(rows_max, 1), _BUFFER_ROWS_MIN)
        self._words: Values = np.empty((len(words), size), dtype="<u8")
        self._texts = {c.name: np.empty(size, dtype=c.ring) for c in texts if c.name != "trade_id"}
        self._trade_ids: list[tuple[Values, Values]] = []  # (places, ids) of the rows that carry one

    @property
    def room(self) -> int:
        """Rows that can still be appended."""
        return self.rows_max - self.rows

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        texts = sum(values.nbytes for values in self._texts.values())
        return self._words.nbytes + texts + sum(p.nbytes + ids.nbytes for p, ids in self._trade_ids)

    @property
    def rcv_timestamps(self) -> Values:
        """Receive times of the rows, in us."""
        return self._integers("rcv_timestamp")

    def append(self, rows: Rows) -> None:
        """Take rows of the feed's dtype, at most `room`."""
        if rows.dtype != self.feed.dtype or not rows.flags.c_contiguous:
            rows = rows.astype(self.feed.dtype)  # np.concatenate, for one, drops the padding
        assert len(rows) <= self.room, (len(rows), self.room)
        if self.rows + len(rows) > self._words.shape[1]:
            self._grow()
        words = rows.view("<u8").reshape(len(rows), self.feed.dtype.itemsize // 8)
        for start in range(0, len(rows), _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, len(rows))
            for low, high in self._runs:
                at = self._word_of[low]
                target = self._words[at : at + high - low, self.rows + start : self.rows + stop]
                target[:] = words[start:stop, low:high].T
        for name, values in self._texts.items():
            values[self.rows : self.rows + len(rows)] = rows[name]
        if "trade_id" in self._at:
            given = np.flatnonzero(self._first_words("trade_id")[self.rows : self.rows + len(rows)])
            if len(given):
                self._trade_ids.append((given + self.rows, rows["trade_id"][given]))
        self.rows += len(rows)

    def _grow(self) -> None:
        size = self.rows_max
        words: Values = np.empty((len(self._words), size), dtype="<u8")
        words[:, : self.rows] = self._words[:, : self.rows]
        self._words = words
        for name, values in self._texts.items():
            self._texts[name] = np.empty(size, dtype=values.dtype)
            self._texts[name][: self.rows] = values[: self.rows]

    def _first_words(self, name: str) -> Values:
        words: Values = self._words[self._word_of[self._at[name] // 8]]
        return words

    def _integers(self, name: str) -> Values:
        return self._first_words(name)[: self.rows].view("<i8")

    def _values(self, column: Column) -> Values:
        at, kind = self._at[column.name], np.dtype("<" + column.ring)
        words = self._first_words(column.name)[: self.rows].view(kind)
        return np.ascontiguousarray(words[at % 8 // kind.itemsize :: 8 // kind.itemsize])

    def table(self, tickers: Sequence[str], exchange: str) -> pa.Table:
        """The rows as a table; the buffer must not be appended to any more.

        Every dictionary holds only what occurs: Parquet writes the whole dictionary into each row group.
        """
        columns = [self._column(column, tickers, exchange) for column in self.feed.table_columns]
        return pa.Table.from_arrays(columns, schema=arrow_schema(self.feed))

    def _column(self, column: Column, tickers: Sequence[str], exchange: str) -> pa.Array:
        if column.name == "exchange":
            return pa.DictionaryArray.from_arrays(pa.array(np.zeros(self.rows, dtype=np.int32)), pa.array([exchange]))
        if column.name == "trade_id":
            return self._trade_id_column()
        if column.ring.startswith("S"):
            text = _text(self._texts[column.name][: self.rows])
            return text.dictionary_encode() if column.table == "category" else text
        values = self._values(column)
        if column.name == "ticker":
            return _tickers(values, tickers)
        if column.name == "action":
            return pa.DictionaryArray.from_arrays(pa.array(_ACTION_INDEX[values]), _ACTION_NAMES)
        if column.table == "bool":
            return pa.array(values != 0)
        array = pa.array(values, mask=_nulls(column, values))
        return array.view(_ARROW["timestamp"]) if column.table == "timestamp" else array

    def _trade_id_column(self) -> pa.Array:
        """The exact ids: in the ring an id that is `trade_seq` in decimal is left empty."""
        if not self._trade_ids:
            return _decimals(self._integers("trade_seq"))
        places = np.concatenate([places for places, _ in self._trade_ids])
        given = _text(np.concatenate([ids for _, ids in self._trade_ids]))
        if len(places) == self.rows:
            return given
        mask = np.zeros(self.rows, dtype=bool)
        mask[places] = True
        return pc.replace_with_mask(_decimals(self._integers("trade_seq")), pa.array(mask), given)


def _runs(words: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as half-open ranges."""
    starts = [w for w in words if w - 1 not in words]
    return [(start, next(w + 1 for w in words if w >= start and w + 1 not in words)) for start in starts]


def _nulls(column: Column, values: Values) -> Values | None:
    if column.null is None:
        return None
    nulls: Values = np.isnan(values) if np.isnan(column.null) else values == column.null
    return nulls if nulls.any() else None


def _tickers(codes: Values, tickers: Sequence[str]) -> pa.Array:
    seen = np.zeros(len(tickers), dtype=bool)
    seen[codes] = True
    used = np.flatnonzero(seen)
    index = np.cumsum(seen, dtype=np.int32) - 1
    return pa.DictionaryArray.from_arrays(
        pa.array(index[codes]), pa.array([tickers[i] for i in used.tolist()], pa.string())
    )


def _text(values: Values) -> pa.Array:
    """Fixed-width, zero-padded UTF-8 as text."""
    raw = pa.array(values, pa.binary())
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:  # bytes that are no text must not hold up the table: they become U+FFFD
        return pa.array([value.decode(errors="replace") for value in values.tolist()], pa.string())


def _decimals(values: Values) -> pa.Array:
    """Counters as decimal text, -1 (no counter) as an empty one."""
    text = pa.array(values).cast(pa.string())
    return pc.if_else(pa.array(values >= 0), text, "") if len(values) and values.min() < 0 else text


def clickhouse_ddl(feed: Feed, *, table: str | None = None) -> str:
    """CREATE TABLE of the feed. Rows that are delivered again (same connector, epoch and seq_id) replace themselves."""
    lines = [
        f"    `{c.name}` {_clickhouse_type(c)} COMMENT '{c.doc.replace(chr(39), chr(39) * 2)}'"
        for c in feed.table_columns
    ]
    lines += [
        "    `connector` LowCardinality(String) COMMENT 'process that collected the row'",
        "    `epoch` Int64 COMMENT 'life of the ring the row went through'",
        "    `date` Date DEFAULT toDate(rcv_timestamp) COMMENT 'UTC day of rcv_timestamp'",
    ]
    return (
        f"CREATE TABLE IF NOT EXISTS {table or feed.name}\n(\n"
        + ",\n".join(lines)
        + "\n)\nENGINE = ReplacingMergeTree\nPARTITION BY date\n"
        "ORDER BY (ticker, timestamp, seq_id, connector, epoch)\n"
        f"COMMENT '{feed.doc.replace(chr(39), chr(39) * 2)}'\n"
    )


def _clickhouse_type(column: Column) -> str:
    if column.name in _ENUMS:
        return "Enum8(" + ", ".join(f"'{e.name}' = {e.value}" for e in _ENUMS[column.name]) + ")"
    name = _CLICKHOUSE[column.table]
    return f"Nullable({name})" if column.null is not None else name


def schema_markdown() -> str:
    """The schema page of the documentation: every feed with its columns, then flags and enumerations."""
    parts = [
        "Times are microseconds since 1970 in UTC. A file stored for one day holds the rows whose `rcv_timestamp` "
        "lies in that day. A null is written as such; NaN means that the exchange gave no number.\n"
    ]
    for feed in FEEDS.values():
        parts.append(f"### `{feed.name}`\n\n{feed.doc} ({feed.dtype.itemsize} bytes a row in the ring)\n")
        parts.append("| column | Parquet | ClickHouse | ring | meaning |\n| --- | --- | --- | --- | --- |")
        parts += [
            f"| `{c.name}` | {_ARROW[c.table]} | {_short(_clickhouse_type(c))} | {c.ring} | {c.doc} |".replace(
                "<", "&lt;"
            )
            for c in feed.table_columns
        ]
        parts.append("")
    parts.append("### Flags and enumerations\n\n| name | values |\n| --- | --- |")
    parts.append("| `flags` | " + ", ".join(f"{f.name}={f.value}" for f in Flag) + " |")
    parts += [f"| `{name}` | " + ", ".join(f"{e.name}={e.value}" for e in enum) + " |" for name, enum in _ENUMS.items()]
    return "\n".join(parts) + "\n"


def _short(clickhouse: str) -> str:
    return "Enum8" if clickhouse.startswith("Enum8") else clickhouse
