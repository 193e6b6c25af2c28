"""What is shared between processes or connections, where a whole fleet would be too much: budgets, the overlap filter."""

import asyncio
import base64
import fcntl
import hashlib
import logging
import multiprocessing
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdcollector import budget as budget_module
from mdcollector.budget import Budget
from mdcollector.connector import OverlapFilter
from mdcollector.emit import Emit
from mdcollector.errors import Disconnected, RateLimited
from mdcollector.exchanges import Options, Stream
from mdcollector.exchanges.deribit import Deribit
from mdcollector.records import Exchange
from mdcollector.transport import Leg, open_leg


class Clock:
    """The clocks of a machine, which a test sets: time since its start, and the wall clock."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, now: float, wall_ahead: float = 1.7e9) -> None:
        self.now, self.wall_ahead = now, wall_ahead

    def clock_gettime(self, which: int) -> float:
        assert which == self.CLOCK_BOOTTIME
        return self.now

    def time(self) -> float:
        return self.now + self.wall_ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(5000.0)
    monkeypatch.setattr(budget_module, "time", clock)
    return clock


def test_a_budget_gives_what_there_is_and_says_how_long_the_rest_takes(tmp_path: Path, clock: Clock) -> None:
    budget = Budget(tmp_path / "b", 100, 10)
    cost = budget.capacity * 0.6
    assert budget.take(cost) == 0
    wait_s = budget.take(cost)
    assert 0 < wait_s < 10
    clock.now += 0.9 * wait_s
    assert budget.take(cost) > 0
    clock.now += 0.2 * wait_s
    assert budget.take(cost) == 0


@given(steps=st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 40)), max_size=80))
def test_no_window_ever_sees_more_than_is_allowed(steps: list[tuple[float, float]]) -> None:
    """Whatever is asked for and when: in any ten seconds at most 100 tokens are given out."""
    clock, taken = Clock(1e6), list[tuple[float, float]]()
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_module, "time", clock)
        budget = Budget(Path(directory) / "b", 100, 10)
        for wait_s, cost in steps:
            clock.now += wait_s
            if budget.take(cost) == 0:
                taken.append((clock.now, min(cost, budget.capacity)))
    for start, _ in taken:
        assert sum(cost for at, cost in taken if start <= at < start + 10) <= 100 + 1e-3


def test_one_who_wants_more_than_the_bucket_gets_the_whole_bucket(tmp_path: Path, clock: Clock) -> None:
    budget = Budget(tmp_path / "b", 100, 10)
    assert budget.take(1000) == 0
    assert budget.take(1) > 0


def test_a_block_holds_for_everybody_and_the_longest_counts(tmp_path: Path, clock: Clock) -> None:
    one, other = Budget(tmp_path / "b", 100, 10), Budget(tmp_path / "b", 100, 10)
    one.block(30)
    one.block(5)
    assert other.take(1) == pytest.approx(30, abs=0.01)
    clock.now += 29.9
    assert other.take(1) > 0
    clock.now += 0.2
    assert other.take(1) == 0


class Stopped:
    """Somebody who was stopped while he had the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def go_on(self) -> None:
        self._file.close()


def test_a_file_that_somebody_keeps_is_asked_for_again_and_nobody_stands_still(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = Budget(tmp_path / "b", 100, 10)
    assert budget.take(1) == 0
    stopped = Stopped(budget.path)
    with caplog.at_level(logging.ERROR):
        assert [budget.take(1), budget.take(1)] == [budget_module.HELD_S] * 2
    assert budget.held == 1, "not at every call"
    assert "b: held by another process for more than 0.3 s" in caplog.text
    stopped.go_on()
    assert asyncio.run(asyncio.wait_for(budget.spend(1), 30)) is None
    assert budget.held == 1


def test_a_ban_that_could_not_be_shared_holds_here_and_is_shared_later(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Budget(tmp_path / "b", 100, 10), Budget(tmp_path / "b", 100, 10)
    assert other.take(1) == 0
    monkeypatch.setattr(clock, "sleep", lambda _: setattr(clock, "now", clock.now + 1.0), raising=False)
    stopped = Stopped(one.path)
    one.block(30)
    assert one.take(1) == pytest.approx(29)
    stopped.go_on()
    clock.now += 2
    assert one.take(1) == pytest.approx(27)
    assert other.take(1) == pytest.approx(27)
    clock.now += 27.1
    assert (one.take(1), other.take(1)) == (0, 0)


def test_a_visitor_shares_what_is_there(tmp_path: Path, clock: Clock) -> None:
    fleet = Budget(tmp_path / "b", 100, 10)
    assert fleet.take(1) == 0
    visitor = Budget(tmp_path / "b", 100, 10, visitor=True)
    visitor.block(30)
    assert fleet.take(1) == visitor.take(1) == 30


def test_a_visitor_that_may_only_read_keeps_to_a_ban(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Budget(tmp_path / "b", 100, 10)
    fleet.block(30)
    before = (tmp_path / "b").read_bytes()
    monkeypatch.setattr(budget_module.os, "access", lambda *_: False)  # root may do everything
    visitor = Budget(tmp_path / "b", 100, 10, visitor=True)
    assert visitor.take(1) == 30
    visitor.block(50)
    assert Budget(tmp_path / "b", 100, 10, visitor=True).take(1) == 50
    assert (tmp_path / "b").read_bytes() == before


def test_a_visitor_leaves_nothing_behind(tmp_path: Path, clock: Clock) -> None:
    visitor = Budget(tmp_path / "rings" / "_budgets" / "b", 100, 10, visitor=True)
    assert visitor.take(visitor.capacity) == 0
    assert visitor.take(1) > 0
    visitor.block(30)
    assert visitor.take(1) == 30
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step_s", [-3600, -2, 2, 3600])
def test_a_step_of_the_wall_clock_changes_nothing(tmp_path: Path, clock: Clock, step_s: float) -> None:
    """Neither tokens for time that did not pass, nor an end of the block before its time, nor a wait for ever."""
    budget = Budget(tmp_path / "b", 100, 10)
    assert budget.take(budget.capacity) == 0
    wait_s = budget.take(budget.capacity)
    clock.wall_ahead += step_s
    assert budget.take(budget.capacity) == wait_s
    budget.block(20)
    clock.wall_ahead += step_s
    assert budget.take(1) == 20
    clock.now += 20.1
    assert budget.take(1) == 0


@pytest.mark.parametrize(("off_s", "left_s"), [(60, 240), (400, 0), (-9e9, 0)])
def test_a_ban_outlasts_a_restart_of_the_machine(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, off_s: float, left_s: float
) -> None:
    """The file is of an earlier start: its times mean nothing now, but the ban that it tells is one by wall clock.

    A wall clock that was set back by years must not make it last for ever.
    """
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(budget_module, "_BOOT_ID", boot)
    boot.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    Budget(tmp_path / "b", 100, 10).block(300)
    boot.write_text("11234567-89ab-cdef-0123-456789abcdef\n")
    clock.wall_ahead += clock.now + off_s - 7
    clock.now = 7.0
    budget = Budget(tmp_path / "b", 100, 10)
    wait_s = budget.take(budget.capacity)
    assert wait_s == pytest.approx(left_s) if left_s else 0 < wait_s < 10, "nobody knows what was spent: it fills anew"
    clock.now += wait_s + 0.001
    assert budget.take(budget.capacity) == 0


@pytest.mark.parametrize(
    "content", [b"x", b"\xff" * 24, b"\xff" * 48, b"\0" * 48, b"garbage that is longer than the state" * 3]
)
def test_a_broken_file_is_no_licence(tmp_path: Path, clock: Clock, content: bytes) -> None:
    (tmp_path / "b").write_bytes(content)
    budget = Budget(tmp_path / "b", 100, 1000)
    assert sum(budget.take(1) == 0 for _ in range(50)) == 0


def _spend(path: Path, start: "multiprocessing.synchronize.Event", taken: "multiprocessing.Queue[int]") -> None:
    budget = Budget(path, 200, 3600)
    start.wait(20)
    taken.put(sum(budget.take(1) == 0 for _ in range(200)))


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, taken = context.Event(), context.Queue()
    processes = [context.Process(target=_spend, args=(tmp_path / "b", start, taken)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    counts = [taken.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert 50 <= sum(counts) <= 52, counts  # a quarter of 200 at once, then a token each 24 s


# The overlap of two connections


def passed(frames: list[tuple[bytes, int]]) -> list[bytes]:
    """What the filter lets through of (frame, leg) in order of arrival."""
    out: list[bytes] = []
    venue = SimpleNamespace(decode=out.append, identity=lambda frame: None if frame.startswith(b"reply") else frame)
    emit = SimpleNamespace(counters=Counter())
    overlap = OverlapFilter(venue, emit)  # type: ignore[arg-type]
    legs = {+1: overlap.decode_of(+1), -1: overlap.decode_of(-1)}
    for frame, sign in frames:
        legs[sign](frame)
    return out


@given(
    sent=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=30),
    cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    order=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_two_legs_pass_each_frame_exactly_as_often_as_it_was_sent(
    sent: list[bytes], cuts: tuple[int, int], order: list[bool]
) -> None:
    """The old leg ends somewhere, the new one begins somewhere before that; however they interleave, nothing is lost
    and nothing doubled, and what is rightly sent twice passes twice.
    """
    begin, end = min(cuts[0], len(sent)), len(sent)
    old, new = list(sent[:end]), list(sent[begin:])
    arrivals: list[tuple[bytes, int]] = [(frame, +1) for frame in old[:begin]]
    rest = old[begin:]
    for take_old in order:
        if take_old and rest:
            arrivals.append((rest.pop(0), +1))
        elif new:
            arrivals.append((new.pop(0), -1))
    arrivals += [(frame, +1) for frame in rest] + [(frame, -1) for frame in new]
    through = Counter(passed(arrivals))
    # A frame equal to one that only the old leg had seen may be taken for it: that is why ids judge where there are any.
    assert through <= Counter(sent)
    early = Counter(sent[:begin])
    assert all(Counter(sent)[f] - through[f] <= early[f] for f in sent)
    if len(set(sent)) == len(sent):
        assert through == Counter(sent)


def test_replies_pass_on_both_legs() -> None:
    assert passed([(b"reply 1", 1), (b"reply 1", -1), (b"x", 1), (b"x", -1)]) == [b"reply 1", b"reply 1", b"x"]


# Frames as they stand on the wire

TEXT, BINARY, CONTINUATION, PING, CLOSE = 0x1, 0x2, 0x0, 0x9, 0x8
COMPRESSED, FIN = 0x40, 0x80


def frame(payload: bytes, opcode: int = TEXT, bits: int = FIN) -> bytes:
    head, size = bits | opcode, len(payload)
    if size < 126:
        return bytes((head, size)) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", head, 126, size) + payload
    return struct.pack("!BBQ", head, 127, size) + payload


def notification(channel: str, data: str) -> bytes:
    return f'{{"jsonrpc":"2.0","method":"subscription","params":{{"channel":"{channel}","data":{data}}}}}'.encode()


def quote(n: int) -> bytes:
    numbers = f'"best_bid_price":{n}.0,"best_bid_amount":1.0,"best_ask_price":{n + 1}.0,"best_ask_amount":1.0'
    return notification("quote.X-PERPETUAL", f'{{"timestamp":1795000000000,"instrument_name":"X-PERPETUAL",{numbers}}}')


@contextmanager
def sending(wire: bytes) -> Iterator[str]:
    """A WebSocket server that accepts one client, sends these bytes and closes; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                request = peer.recv(4096).decode()
                key = request.lower().split("sec-websocket-key: ")[1].split("\r\n")[0]
                key = request[request.lower().index(key) :][: len(key)]
                digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
                peer.sendall(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
                )
                peer.sendall(wire + frame(struct.pack("!H", 1001) + b"that was all", CLOSE))
                while peer.recv(4096):  # answers to pings and the close, until the client is gone
                    continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.getsockname()[1]}"
        thread.join(20)


def received(rings: Path, wire: bytes) -> Emit:
    """Let a connection of the product, with the decoder of Deribit, take these bytes."""
    emit = Emit(rings, "c", Exchange.DERIBIT, ("bbo", "orderbook_l2"), semaphore=False)
    streams = [
        Stream("quote.X-PERPETUAL", "bbo", "X-PERPETUAL"),
        Stream("book.X-PERPETUAL.100ms", "orderbook_l2", "X-PERPETUAL"),
    ]
    venue = Deribit(emit, Options(), streams)

    async def take(url: str) -> Leg:
        leg = await open_leg(url, lambda: Leg(emit, venue.decode, lambda _: None), None)
        await asyncio.wait_for(leg.closed.wait(), 20)
        return leg

    with sending(wire) as url:
        leg = asyncio.run(take(url))
    assert leg.crash is None
    assert leg.cause == "close 1001 that was all", "the connection was kept until the end"
    return emit


def bids(emit: Emit) -> list[float]:
    ring = emit.rings["bbo"]
    return [float(row["bid_price"]) for row in ring.recent_rows(0)]


def test_a_frame_of_more_than_a_megabyte(tmp_path: Path) -> None:
    levels = ",".join(f'["new",{100_000 - i}.5,1.0]' for i in range(60_000))
    data = f'{{"timestamp":1795000000000,"type":"snapshot","change_id":5,"instrument_name":"X-PERPETUAL","bids":[{levels}],"asks":[]}}'
    wire = frame(notification("book.X-PERPETUAL.100ms", data))
    assert len(wire) > 1 << 20
    emit = received(tmp_path, wire + frame(quote(1)))
    assert emit.rings["orderbook_l2"].next == 60_000
    assert bids(emit) == [1.0]
    assert not any(emit.counters.values())
    emit.close()


@given(cuts=st.lists(st.integers(0, 240), max_size=5), ping=st.booleans())
@settings(max_examples=20, deadline=None)
def test_fragments_are_one_message_wherever_they_are_cut(cuts: list[int], ping: bool) -> None:
    message = quote(7)
    bounds = sorted({0, len(message), *(cut % len(message) for cut in cuts)})
    parts = [message[a:b] for a, b in pairwise(bounds)]
    frames = [
        frame(part, TEXT if i == 0 else CONTINUATION, FIN if i == len(parts) - 1 else 0) for i, part in enumerate(parts)
    ]
    between = frame(b"still there?", PING) if ping else b""
    with TemporaryDirectory() as directory:
        emit = received(Path(directory), frame(quote(6)) + between.join(frames) + frame(quote(8)))
        assert bids(emit) == [6.0, 7.0, 8.0]
        assert not any(emit.counters.values())
        emit.close()


def test_a_message_in_very_many_fragments(tmp_path: Path) -> None:
    """It costs the memory of what it says, not of its pieces."""
    first, rest = quote(7)[:-1], quote(7)[-1:]
    between = frame(b"  ", CONTINUATION, 0) * 20_000
    wire = frame(quote(6)) + frame(first, TEXT, 0) + between + frame(rest, CONTINUATION) + frame(quote(8))
    tracemalloc.start()
    try:
        emit = received(tmp_path, wire)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bids(emit) == [6.0, 7.0, 8.0]
    assert not any(emit.counters.values())
    assert most < 500_000
    emit.close()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (frame(quote(5)[:-20]), "malformed"),
        (frame(zlib.compress(quote(5)), TEXT, FIN | COMPRESSED), "compressed"),
        (frame(b"\x00\x01\x02 binary", BINARY), "binary"),
        (frame(quote(5).replace(b'"instrument_name":"X-', b'"instrument_name":"\xff\xc3\x28X-')), "malformed"),
        (frame(quote(5).replace(b'"jsonrpc"', b'"json\xffrpc"')), "malformed"),
        (frame(quote(5).replace(b"5.0", b'"5"', 1)), "wrong_type"),
        (frame(quote(5).replace(b"5.0", b"1e999", 1)), "absurd_number|wrong_type"),
        (frame(quote(5).replace(b"X-PERP", b"Y-PERP")), "unknown_symbol"),
        (frame(b"[" * 5000), "too_deep|malformed|wrong_type"),
        (frame(b""), "malformed"),
    ],
    ids=["truncated", "compressed", "binary", "utf8", "utf8 in a key", "type", "infinite", "symbol", "deep", "empty"],
)
def test_a_bad_frame_is_counted_by_reason_and_the_connection_kept(tmp_path: Path, bad: bytes, reason: str) -> None:
    """F16. One sample is kept; what comes behind it is recorded."""
    emit = received(tmp_path, frame(quote(4)) + bad + bad + frame(quote(6)))
    assert bids(emit) == [4.0, 6.0]
    ((name, count),) = emit.counters.items()
    assert name.removeprefix("refused_") in reason.split("|")
    assert count == 2
    assert list(emit.samples) == [name]
    emit.close()


# Connecting to what is no exchange


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that answers one request with these bytes and hangs up; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.getsockname()[1]}/"
        thread.join(20)


def connect(url: str) -> Leg:
    def never() -> Leg:
        return Leg(SimpleNamespace(clock=time.perf_counter_ns), lambda _: None, lambda _: None)  # type: ignore[arg-type]

    make: Callable[[], Leg] = never
    return asyncio.run(open_leg(url, make, None))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 301 Moved\r\n\r\n",
        b"\x00\xff" * 100,
        b"HTTP/1.1 101 ",
    ],
    ids=["hang-up", "500", "redirect to nowhere", "nonsense", "cut off"],
)
def test_a_failed_handshake_is_a_disconnect_and_never_a_crash(answer: bytes) -> None:
    with answering(answer) as url, pytest.raises(Disconnected):
        connect(url)


def test_a_handshake_refused_with_429_says_how_long() -> None:
    answer = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 17\r\nContent-Length: 0\r\n\r\n"
    with answering(answer) as url, pytest.raises(RateLimited) as caught:
        connect(url)
    assert caught.value.retry_after_s == 17
