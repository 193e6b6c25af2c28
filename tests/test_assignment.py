"""Which connection carries which instrument: it stays, what is new fills places, and one file is the truth for all."""

import fcntl
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mdcollector.assignment import Assignment
from mdcollector.errors import ConfigError, StorageError
from mdcollector.exchanges import Options, Stream
from mdcollector.exchanges.okx import BOOKS_PER_CONNECTION, BUSINESS, PUBLIC, Okx

FEEDS = ("trades", "orderbook_l2")
MOST = BOOKS_PER_CONNECTION
NAMES = [f"T{n:02d}-USDT" for n in range(2 * MOST)]  # two connections that are full


def assignment(rings: Path, feeds: tuple[str, ...] = FEEDS, options: Options | None = None) -> Assignment:
    return Assignment(rings, "okx", Okx, feeds, options or Options())


def plan(rings: Path, tickers: list[str], alone: int | None = None) -> list[list[str]]:
    """Instruments of each connection, sorted."""
    streams = assignment(rings).plan(tickers, alone)
    return [sorted({stream.ticker for stream in connection}) for connection in streams]


def test_who_is_there_stays_and_who_is_new_opens_a_connection_at_the_end(tmp_path: Path) -> None:
    first, second = NAMES[:MOST], NAMES[MOST:]
    assert plan(tmp_path, NAMES) == [first, second]
    assert plan(tmp_path, ["AAA-USDT", *NAMES]) == [first, second, ["AAA-USDT"]]
    assert plan(tmp_path, NAMES[1:]) == [first[1:], second, []], "a connection that is empty keeps its number"


def test_a_place_that_is_free_is_filled_and_who_left_it_comes_back_while_it_is(tmp_path: Path) -> None:
    first, second = NAMES[:MOST], NAMES[MOST:]
    plan(tmp_path, NAMES)
    assert plan(tmp_path, NAMES[:-1]) == [first, second[:-1]]
    assert plan(tmp_path, NAMES[1:]) == [first[1:], second], "halted for a while"
    assert plan(tmp_path, NAMES) == [first, second]
    assert plan(tmp_path, ["AAA-USDT", *NAMES[1:]]) == [["AAA-USDT", *first[1:]], second]
    assert plan(tmp_path, ["AAA-USDT", *NAMES]) == [["AAA-USDT", *first[1:]], second, [first[0]]]


def test_each_path_has_connections_of_its_own(tmp_path: Path) -> None:
    feeds = ("trades", "candles")

    def paths(tickers: list[str]) -> list[tuple[str, int]]:
        return [(c[0].path, len(c)) for c in assignment(tmp_path, feeds).plan(tickers)]

    assert paths(["B-USDT"]) == [(PUBLIC, 1), (BUSINESS, 1)]
    assert paths(["A-USDT", "B-USDT"]) == [(PUBLIC, 2), (BUSINESS, 2)]


def test_another_configuration_moves_only_what_does_not_fit(tmp_path: Path) -> None:
    assert len(assignment(tmp_path, ("trades",)).plan(NAMES)) == 1
    assert plan(tmp_path, NAMES) == [NAMES[:MOST], NAMES[MOST:]]
    assert len(assignment(tmp_path, ("trades",)).plan(NAMES)) == 2, "nobody moves back"


def test_a_process_that_begins_alone_opens_no_connection_but_its_own(tmp_path: Path) -> None:
    more = ["AAA-USDT", *NAMES]
    assert plan(tmp_path, NAMES, 1) == [NAMES[:MOST], NAMES[MOST:]], "the first of all plans for its siblings as well"
    assert len(plan(tmp_path, more, 0)) == 2, "nobody may run a third one"
    assert plan(tmp_path, more, 2)[2] == ["AAA-USDT"]


def test_a_running_connection_takes_what_is_new_where_there_is_room(tmp_path: Path) -> None:
    listed = [*NAMES[:-2], "AAA-USDT"]
    plan(tmp_path, listed[:-1])
    for number in (0, 1, 0):  # whoever is first asks for all
        carried, _ = assignment(tmp_path).follow(number, PUBLIC, listed, ())
        assert [c.tickers for c in carried] == [NAMES[:MOST], [*NAMES[MOST:-2], "AAA-USDT"]]
    assert plan(tmp_path, listed)[1] == ["AAA-USDT", *NAMES[MOST:-2]], "it stays there"
    listed += ["BBB-USDT", "CCC-USDT"]
    carried, homeless = assignment(tmp_path).follow(0, PUBLIC, listed, ())
    assert carried[1].tickers[-1] == "BBB-USDT"
    assert len(carried) == 2, "nobody would run a third one"
    assert homeless == assignment(tmp_path).remembered().homeless == ["CCC-USDT"]
    assert assignment(tmp_path).follow(1, PUBLIC, listed, ())[1] == [], "it is known"
    assert assignment(tmp_path).follow(1, PUBLIC, listed[:-1], ())[1] == []
    assert assignment(tmp_path).remembered().homeless == [], "it is listed no more"


def test_the_only_connection_takes_what_is_new_when_all_others_are_gone(tmp_path: Path) -> None:
    plan(tmp_path, ["A-USDT"])
    (carried,), homeless = assignment(tmp_path).follow(0, PUBLIC, ["B-USDT"], ())
    assert carried.tickers[0] == "B-USDT"
    assert homeless == []


def house(rings: Path) -> list[list[str]]:
    """As `plan`, for what is homeless, wherever the limits may be."""
    return [sorted({stream.ticker for stream in streams}) for streams in assignment(rings).house(lambda _: None)]


def test_a_supervisor_opens_a_further_connection_for_what_is_homeless_and_nobody_moves(tmp_path: Path) -> None:
    plan(tmp_path, NAMES)
    assert house(tmp_path) == [], "nobody is homeless"
    assignment(tmp_path).follow(0, PUBLIC, [*NAMES[1:], "AAA-USDT", "BBB-USDT"], NAMES[1:MOST])
    assert assignment(tmp_path).remembered().homeless == ["BBB-USDT"], "the place of one that is halted is free"
    planned = [["AAA-USDT", *NAMES[1:MOST]], NAMES[MOST:], ["BBB-USDT"]]
    assert house(tmp_path) == planned
    assert house(tmp_path) == [], "it has a home"
    assert plan(tmp_path, [*NAMES[1:], "AAA-USDT", "BBB-USDT"]) == planned, "after a restart"
    listed = [*NAMES[1:], "AAA-USDT", "BBB-USDT", "CCC-USDT"]
    carried, homeless = assignment(tmp_path).follow(0, PUBLIC, listed, ())
    assert carried[2].tickers == ["BBB-USDT", "CCC-USDT"], "it takes what comes next"
    assert homeless == []


def test_what_a_limit_forbids_stays_homeless(tmp_path: Path) -> None:
    plan(tmp_path, NAMES)
    listed = [*NAMES, "AAA-USDT"]
    before, _ = assignment(tmp_path).follow(0, PUBLIC, listed, ())

    def check(connections: list[list[Stream]]) -> None:
        assert len(connections) == 3
        raise ConfigError("too many")

    with pytest.raises(ConfigError, match="too many"):
        assignment(tmp_path).house(check)
    assert assignment(tmp_path).remembered().connections == before
    assert assignment(tmp_path).remembered().homeless == ["AAA-USDT"]
    assert assignment(tmp_path).follow(1, PUBLIC, listed[1:], NAMES[MOST:])[0][0].tickers[-1] == "AAA-USDT"
    assert assignment(tmp_path).remembered().homeless == [], "a place is free"


def test_a_process_that_begins_alone_leaves_the_homeless_to_others(tmp_path: Path) -> None:
    """Its list may be of the start of its supervisor; who has a place is no longer homeless."""
    plan(tmp_path, NAMES)
    assignment(tmp_path).follow(0, PUBLIC, [*NAMES, "AAA-USDT"], ())
    plan(tmp_path, NAMES, 0)
    assert assignment(tmp_path).remembered().homeless == ["AAA-USDT"]
    assert plan(tmp_path, [*NAMES, "AAA-USDT"], 2)[2] == ["AAA-USDT"]
    assert assignment(tmp_path).remembered().homeless == []


def test_who_rests_when_his_connection_begins_has_no_place_on_one_that_nobody_runs(tmp_path: Path) -> None:
    plan(tmp_path, [*NAMES, "AAA-USDT"])
    assert plan(tmp_path, NAMES)[2] == []
    carried, homeless = assignment(tmp_path).follow(0, PUBLIC, [*NAMES, "AAA-USDT"], ())
    assert (carried[2].tickers, homeless) == ([], ["AAA-USDT"])
    assert house(tmp_path)[2] == ["AAA-USDT"]


def test_a_connection_that_runs_empty_is_given_nothing_of_another_path(tmp_path: Path) -> None:
    known = assignment(tmp_path, ("trades", "candles"))
    known.plan(["A-USDT"])
    known.follow(0, PUBLIC, ["B-USDT"], ())
    known.follow(1, BUSINESS, ["B-USDT"], ())
    file = json.loads(known.path.read_bytes())
    file["connections"] = [{"path": BUSINESS, "tickers": []}] * 2
    file["homeless"] = ["B-USDT"]
    known.path.write_text(json.dumps(file))
    assert [[s.path for s in streams] for streams in known.house(lambda _: None)] == [[BUSINESS], [], [PUBLIC]]


def test_who_began_alone_keeps_its_name_and_who_began_beside_others_its_number(tmp_path: Path) -> None:
    def names(rings: Path, count: int) -> list[str]:
        return assignment(rings).names(count)

    assert names(tmp_path, 1) == ["okx"]
    assert names(tmp_path, 2) == ["okx.1", "okx.2"]
    plan(tmp_path, NAMES[:MOST])
    assert names(tmp_path, 2) == ["okx", "okx.2"]
    plan(tmp_path, NAMES)
    assert names(tmp_path, 2) == ["okx", "okx.2"]
    path = assignment(tmp_path).path
    older = json.loads(path.read_bytes())
    del older["numbered"], older["homeless"]
    path.write_text(json.dumps(older))
    assert names(tmp_path, 2) == ["okx.1", "okx.2"], "as they were called then"
    path.unlink()
    (tmp_path / "okx").mkdir()
    assert names(tmp_path, 2) == ["okx", "okx.2"], "the rings tell"
    (tmp_path / "okx.1").mkdir()
    assert names(tmp_path, 1) == ["okx.1"]


@pytest.mark.parametrize("damage", [b"", b"\xff{", b'{"exchange":"okx"}', b"[[[["])
def test_a_damaged_file_is_told_and_replaced(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    plan(tmp_path, NAMES)
    path = assignment(tmp_path).path
    path.write_bytes(damage)
    with caplog.at_level(logging.ERROR):
        assert plan(tmp_path, NAMES) == [NAMES[:MOST], NAMES[MOST:]]
    assert str(path) in caplog.text
    assert "damaged" in caplog.text
    assert json.loads(path.read_bytes())["connections"][1]["tickers"] == NAMES[MOST:]


def test_what_a_running_connection_has_stays_its_own_when_the_file_is_lost(tmp_path: Path) -> None:
    plan(tmp_path, NAMES)
    assignment(tmp_path).path.unlink()
    second = NAMES[MOST:]
    carried, _ = assignment(tmp_path).follow(1, PUBLIC, NAMES, second)
    assert carried[1].tickers == second
    assert plan(tmp_path, NAMES, 0) == [NAMES[:MOST], second]


def test_a_file_of_another_venue_is_none(tmp_path: Path) -> None:
    plan(tmp_path, NAMES)
    path = assignment(tmp_path).path
    path.write_bytes(path.read_bytes().replace(b'"okx"', b'"deribit"'))
    assert assignment(tmp_path).remembered().connections == []


def test_a_preview_writes_nothing(tmp_path: Path) -> None:
    assert len(assignment(tmp_path).preview(NAMES)) == 2
    assert not list(tmp_path.iterdir())


def test_the_rings_of_all_processes_that_ever_were_are_siblings(tmp_path: Path) -> None:
    for name in ("okx", "okx.1", "okx.2", "okx.10", "okx2", "okx.x", "binance", "_plans"):
        (tmp_path / name).mkdir()
    found = {path.name for path in assignment(tmp_path).siblings("okx.2")}
    assert found == {"okx", "okx.1", "okx.10"}


PLANNER = """
import sys
from pathlib import Path
from mdcollector.assignment import Assignment
from mdcollector.errors import StorageError
from mdcollector.exchanges import Options
from mdcollector.exchanges.okx import PUBLIC, Okx
rings, number, *tickers = sys.argv[1:]
known = Assignment(Path(rings), "okx", Okx, ["trades", "orderbook_l2"], Options())
known.plan(tickers[:-20])
for last in range(len(tickers) - 20, len(tickers) + 1):
    mine = known.follow(int(number), PUBLIC, tickers[:last], ())[0][int(number)].tickers
print(*mine)
"""


def test_several_processes_at_once_agree(tmp_path: Path) -> None:
    """Each one plans and follows the list as it grows; in the end every instrument has one connection."""
    command = [sys.executable, "-c", PLANNER, tmp_path]
    listed = NAMES[: MOST + 25]
    processes = [subprocess.Popen([*command, str(n % 2), *listed], stdout=subprocess.PIPE, text=True) for n in range(4)]
    found = [process.communicate(timeout=60)[0].split() for process in processes]
    assert found[0] == found[2] == listed[:MOST]
    assert found[1] == found[3] == listed[MOST:]


def test_a_lock_that_somebody_keeps_is_not_waited_for_without_end(tmp_path: Path) -> None:
    plan(tmp_path, NAMES)
    lock = tmp_path / "_plans" / "okx.lock"
    with open(lock, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="held by another process for more than 2 s"):
            plan(tmp_path, NAMES)
    assert plan(tmp_path, NAMES) == [NAMES[:MOST], NAMES[MOST:]]
