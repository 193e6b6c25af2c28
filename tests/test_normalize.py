"""What `normalize` promises besides the rows: order, determinism, findings, progress, and errors that say what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from recorded import table

from mdcollector.errors import ConfigError, StorageError
from mdcollector.normalize import CAPACITIES, normalize
from mdcollector.recording import Entry, RecordingWriter

NOW_NS = 1_796_083_200_000_000_000
MS = NOW_NS // 1_000_000
REPLAYED = 32


def trade(seq: int, at: int = 0, conn: str = "a") -> Entry:
    data = {"e": "trade", "E": MS, "s": "AB", "t": seq, "p": "1.5", "q": "2", "T": MS + at, "m": False, "M": True}
    return Entry(t=NOW_NS + at * 1_000_000, conn=conn, dir="in", raw=json.dumps({"stream": "ab@trade", "data": data}))


def depth(first: int, last: int, price: str = "1", at: int = 0) -> Entry:
    data = {"e": "depthUpdate", "E": MS, "s": "AB", "U": first, "u": last, "b": [[price, "1"]], "a": []}
    return Entry(t=NOW_NS + at, conn="a", dir="in", raw=json.dumps({"stream": "ab@depth@100ms", "data": data}))


def snapshot(last: int, levels: int = 1) -> Entry:
    body = {"lastUpdateId": last, "bids": [["0.5", "1"]], "asks": [[str(10 + i), "1"] for i in range(levels)]}
    return Entry(
        t=NOW_NS, conn="h", dir="http", url="https://x/api/v3/depth?symbol=AB&limit=5000", raw=json.dumps(body)
    )


def opened(conn: str) -> Entry:
    return Entry(t=NOW_NS, conn=conn, dir="open", url="wss://x")


def write(path: Path, *entries: Entry) -> Path:
    with RecordingWriter(path) as out:
        for entry in entries:
            out.write(entry)
    return path


def causes(out: Path) -> list[tuple[Any, ...]]:
    gaps = table(out, "gaps")
    return list(zip(*(gaps[c] for c in ("feed", "first_id", "last_id", "cause")), strict=True)) if gaps else []


@pytest.mark.parametrize(
    ("exchange", "url", "body"),
    [
        ("okx", "https://x/api/v5/market/history-trades?instId=A-B&after=9", '{"code":"50011","msg":"Too Many Requests","data":[]}'),
        ("bybit_linear", "https://x/v5/market/recent-trade?category=linear&symbol=AB",
         '{"retCode":10006,"retMsg":"Too many visits!","result":{},"time":1}'),
    ],
)  # fmt: skip
def test_an_answer_that_told_the_recorder_to_wait_is_counted(
    tmp_path: Path, exchange: str, url: str, body: str
) -> None:
    told = Entry(t=NOW_NS, conn="h", dir="http", url=url, raw=body)
    report = normalize(exchange, [write(tmp_path / "r.jsonl", told)], tmp_path / "out")
    assert report.counters["refused_rate_limited"] == 1
    assert report.entries == 1


def test_recordings_are_taken_in_the_order_given(tmp_path: Path) -> None:
    first = write(tmp_path / "z.jsonl", snapshot(10), depth(11, 11), trade(1))
    second = write(tmp_path / "a.jsonl.zst", depth(12, 12), trade(2))
    report = normalize("binance_spot", [first, second], tmp_path / "out")
    assert report.findings == []
    assert table(tmp_path / "out", "trades")["trade_seq"] == [1, 2]
    backwards = normalize("binance_spot", [second, first], tmp_path / "back")
    assert backwards.counters["trade_duplicate"] == 1
    assert set(table(tmp_path / "back", "orderbook_l2")["update_id"]) == {
        11,
        12,
    }  # the snapshot is older than what waits


def test_a_hole_between_recordings_and_connections_says_so(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", opened("a"), snapshot(10), depth(11, 11), trade(1), trade(3))
    second = write(
        tmp_path / "2.jsonl", trade(6), depth(15, 15), snapshot(16), opened("b"), trade(7), opened("a"), trade(9), trade(11),
        depth(18, 18),
    )  # fmt: skip
    report = normalize("binance_spot", [first, second], tmp_path / "out")
    assert causes(tmp_path / "out") == [
        ("trades", 2, 2, "sequence"), ("trades", 4, 5, "recording"), ("orderbook_l2", 12, 14, "recording"),
        ("orderbook_l2", 15, 16, "recording"),  # the rest of that hole
        ("trades", 8, 8, "reconnect"), ("trades", 10, 10, "sequence"), ("orderbook_l2", 17, 17, "reconnect"),
    ]  # fmt: skip
    assert report.findings == ["rows of the table gaps that tell of holes: 7"]


def test_every_row_is_flagged_as_replayed_and_has_no_stage_times(tmp_path: Path) -> None:
    normalize(
        "binance_spot", [write(tmp_path / "r.jsonl", snapshot(10), depth(11, 11), trade(1), trade(3))], tmp_path / "out"
    )
    for feed in ("trades", "orderbook_l2", "gaps"):
        stored = table(tmp_path / "out", feed)
        assert all(flags & REPLAYED for flags in stored["flags"])
        assert set(stored["parse_ns"] + stored["publish_ns"]) == {0}
    assert table(tmp_path / "out", "trades")["rcv_timestamp"] == [NOW_NS // 1000] * 2


def test_more_rows_than_the_rings_hold_are_all_written(tmp_path: Path) -> None:
    """The rings are small and drained as it goes, also while what is held is published at the end."""
    count = CAPACITIES["trades"] + 5000
    with RecordingWriter(tmp_path / "r.jsonl.zst") as out:
        for i in range(count):
            out.write(trade(i))
        for i in range(60):  # no snapshot: held to the end; more levels than the ring of books takes at once
            data = {
                "e": "depthUpdate",
                "E": MS,
                "s": "AB",
                "U": i,
                "u": i,
                "b": [[str(p), "1"] for p in range(1, 5001)],
                "a": [],
            }
            out.write(Entry(t=NOW_NS, conn="a", dir="in", raw=json.dumps({"stream": "ab@depth", "data": data})))
    report = normalize("binance_spot", [tmp_path / "r.jsonl.zst"], tmp_path / "out")
    assert report.rows["trades"] == count
    assert report.rows["orderbook_l2"] == 60 * 5000 > CAPACITIES["orderbook_l2"]
    assert (report.rows_written, report.rows_left) == (count + 60 * 5000, 0)
    assert table(tmp_path / "out", "trades")["trade_seq"] == list(range(count))


def test_unusable_frames_are_findings_and_other_events_are_not(tmp_path: Path) -> None:
    def raw(text: str) -> Entry:
        return Entry(t=NOW_NS, conn="a", dir="in", raw=text)

    path = write(
        tmp_path / "r.jsonl", raw("{"), raw('{"e":"avgPrice","s":"AB"}'), raw('{"stream":"ab@trade","data":{"t":"x"}}'),
        Entry(t=NOW_NS, conn="a", dir="out", raw="anything"), raw('{"stream":"ab@trade","data":{}}'), trade(1),
    )  # fmt: skip
    report = normalize("binance_spot", [path], tmp_path / "out")
    assert report.findings == ["1 frames refused: malformed", "2 frames refused: wrong_type"]
    assert report.samples["refused_wrong_type"].endswith('{"stream":"ab@trade","data":{"t":"x"}}')
    assert (report.entries, report.rows["trades"]) == (6, 1)


def test_a_broken_line_is_a_finding_and_the_others_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", trade(1), trade(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"not an entry\n" + lines[1])
    report = normalize("binance_spot", [path], tmp_path / "out")
    assert report.rows["trades"] == 2
    (finding,) = report.findings
    assert finding.startswith("unreadable line r.jsonl:2: ")


def test_errors_name_what_is_wrong_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    whole = write(tmp_path / "r.jsonl.zst", *(trade(i) for i in range(2000)))
    (tmp_path / "cut.jsonl.zst").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.jsonl").write_text("one\ntwo\n")
    (tmp_path / "no.jsonl.zst").write_bytes(zstandard.compress(b""))
    for names, error, text in (
        (["missing.jsonl"], StorageError, "missing.jsonl"), (["cut.jsonl.zst"], StorageError, "cut.jsonl.zst: unreadable"),
        (["empty.jsonl", "no.jsonl.zst"], ConfigError, "nothing to normalize in .*empty.jsonl"),
        (["text.jsonl"], ConfigError, "nothing to normalize in .*text.jsonl; line 1: JSON is malformed"),
        (["r.jsonl.zst", "cut.jsonl.zst"], StorageError, "cut.jsonl.zst: unreadable"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            normalize("binance_spot", [tmp_path / name for name in names], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'nowhere' is not known; known are .*binance_spot"):
        normalize("nowhere", [whole], tmp_path / "out")
    assert list(scratch.iterdir()) == []


def test_progress_and_the_name_of_the_connector(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    paths = [write(tmp_path / f"{i}.jsonl", *(trade(5000 * i + j) for j in range(5000))) for i in range(2)]
    normalize(
        "binance_spot", paths, tmp_path / "out", connector="mine", on_progress=lambda p, n: seen.append((p.name, n))
    )
    assert seen == [("0.jsonl", 2048), ("0.jsonl", 4096), ("1.jsonl", 6144), ("1.jsonl", 8192)]
    (file,) = (tmp_path / "out" / "trades").rglob("*.parquet")
    assert file.name == f"mine-{MS}-0-9999.parquet"
    assert file.parent.name == "date=2026-12-01"


def test_running_again_into_the_same_tables_adds_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", snapshot(10), depth(11, 11), *(trade(i) for i in range(100)))
    normalize("binance_spot", [path], tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.parquet")}
    normalize("binance_spot", [path], tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.parquet")} == before


def test_of_many_broken_lines_some_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", trade(1))
    path.write_bytes(path.read_bytes() + b"no entry\n" * 250)
    report = normalize("binance_spot", [path], tmp_path / "out")
    assert (report.bad_lines_count, len(report.bad_lines)) == (250, 100)
    assert report.findings[-1] == "150 more unreadable lines"
