"""mdreplay: plays recordings over WebSocket and HTTP as the venue would (`serve`), and makes them (`record`).

Run by hand, by tests and by the demo. It never changes a frame: what a client gets is the recorded text, and what is
recorded is the received text. All knowledge of a venue lies in `tools.venues`.
"""

import asyncio
import heapq
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import click
from aiohttp import WSCloseCode, WSMsgType, web
from rich.console import Console

from mdcollector import logs
from mdcollector.errors import EXIT_DONE, EXIT_FINDINGS, EXIT_USAGE, Disconnected, StorageError
from mdcollector.options import Finite
from mdcollector.recording import Entry, RecordingWriter, read_recording
from mdcollector.records import DATA_FEEDS
from tools.live import LiveFeed, fetch, log_options, stop_on_signals
from tools.venues import Body, Recorded, Session, Venue, load_venue, text_of, venue_names

REQUEST_LINE_BYTES_MAX = 128 << 10  # a thousand streams in one URL
CLIENT_MESSAGE_BYTES_MAX = 4 << 20
FRAMES_PER_TURN = 64  # how many frames may go out at full speed before requests get their turn
CLOSE_S_MAX = 30.0  # a client that still has a full buffer to read may answer a close late
STOP_S_MAX = 5.0  # the same after SIGTERM, where waiting for slow clients is not wanted
HEARTBEAT_TICK_S = (0.02, 1.0)
NAMED_REQUESTS_MAX = 100
POLLED_FEEDS = ("candles", "tickers")  # what `record` takes of a polled venue
PROBED_FRAMES_MAX = 1000  # frames that are looked at to tell the venue

log = logging.getLogger("mdreplay")


class ReplayError(Exception):
    """The recordings cannot be played; the text says why. Exit code 2."""


# serve


class Source:
    """Recordings merged by receive time, read anew for each pass so that memory does not grow with their size."""

    def __init__(self, paths: list[Path], skip_bad_lines: bool) -> None:
        self._paths = paths
        self._skip_bad_lines = skip_bad_lines
        self.bad_lines = 0

    def entries(self) -> Iterator[Entry]:
        return heapq.merge(*(self._read(path) for path in self._paths), key=lambda entry: entry.t)

    def _read(self, path: Path) -> Iterator[Entry]:
        return read_recording(path, self._on_bad_line if self._skip_bad_lines else None)

    def _on_bad_line(self, number: int, reason: str) -> None:
        self.bad_lines += 1
        log.warning("line %d is not an entry of a recording and is passed over: %s", number, reason)

    def venue(self) -> Venue:
        """The venue whose recordings these are, told by the URLs in them, otherwise by the shape of the frames."""
        venues = [load_venue(name) for name in venue_names()]
        by_url: set[str] = set()
        by_shape: set[str] = set()
        frames = 0
        for entry in self.entries():
            if entry.url:
                by_url.update(v.exchange for v in venues if v.serves(entry.url))
            if entry.dir == "in":
                frames += 1
                by_shape.update(v.exchange for v in venues if v.recognises(entry.raw))
            if frames >= PROBED_FRAMES_MAX:
                break
        found = by_url or by_shape
        if len(found) != 1:
            told = f"frames of {' and '.join(sorted(found))}" if found else "no venue that is known here"
            raise ReplayError(f"the recordings show {told}; give --exchange {'|'.join(venue_names())}")
        return load_venue(found.pop())

    def scan(self, venue: Venue) -> Recorded:
        """The first pass: REST bodies, answers and streams; frames themselves are not kept."""
        recorded = Recorded()
        self.bad_lines = 0
        for position, entry in enumerate(self.entries()):
            if entry.dir == "http":
                recorded.bodies.append(Body.of(position, entry.url, entry.raw))
            elif entry.dir == "in":
                stream = venue.stream_of(entry.raw)
                if stream is None:
                    recorded.control += 1
                    recorded.replies.append(entry.raw)
                else:
                    recorded.frames += 1
                    recorded.streams[stream] += 1
        if not recorded.frames and (venue.ws_url or not recorded.bodies):
            raise ReplayError("the recordings hold no data frame")
        return recorded


@dataclass(eq=False)
class Client:
    """One connected client."""

    socket: web.WebSocketResponse
    session: Session
    request: web.Request


@dataclass
class Settings:
    """How to play."""

    speed: float | None  # None: as fast as the clients take it
    loop: bool = False
    wait_clients: int = 1
    settle_s: float = 0.5
    stall_s: float = 30.0
    at_end: str = "hold"
    exit_at_end: bool = False


@dataclass
class Tally:
    """What the summary tells."""

    played: int = 0
    unclaimed: int = 0
    streams: Counter[str] = field(default_factory=Counter)
    clients: int = 0
    stalled_clients: int = 0
    rest_answered: int = 0
    rest_unanswered: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    finished: bool = False


class Replay:
    """The fake venue: one port, any number of clients, one playback for all of them."""

    def __init__(self, source: Source, venue: Venue, settings: Settings) -> None:
        self._source, self._venue, self._settings = source, venue, settings
        self._recorded = source.scan(venue)
        self._polled = not venue.ws_url
        if self._polled and settings.speed is None:
            raise ReplayError(f"{venue.exchange} is polled: what is answered depends on the time; give a --speed")
        self._clients: dict[Client, None] = {}
        self._routes: dict[str, list[Client]] = {}
        self._changed = asyncio.Event()
        self._changed_at = 0.0
        self._start_wall, self._start_t = 0.0, 0
        self._blocked: Client | None = None
        self._blocked_at = 0.0
        self.tally = Tally()

    async def run(self, host: str, port: int, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, or until all is delivered if the settings say so."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, max_line_size=REQUEST_LINE_BYTES_MAX, shutdown_timeout=STOP_S_MAX)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            self._announce(host, runner.addresses[0][1])
            await self._play_until(stop)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S_MAX):
                    await self._close_clients(WSCloseCode.GOING_AWAY)
            for client in self._clients:
                if client.request.transport is not None:
                    client.request.transport.abort()
            await runner.cleanup()

    def _announce(self, host: str, port: int) -> None:
        urls = {"ws_url": f"ws://{host}:{port}", "rest_url": f"http://{host}:{port}"}
        click.echo(text_of({"ready": True, "port": port, **urls, "exchange": self._venue.exchange}))
        recorded = self._recorded
        log.info(
            "%d frames of %d streams, %d REST bodies", recorded.frames, len(recorded.streams), len(recorded.bodies)
        )

    async def _play_until(self, stop: asyncio.Event) -> None:
        stopped = asyncio.ensure_future(stop.wait())
        player = asyncio.ensure_future(self._play())
        watch = asyncio.ensure_future(self._watch_for_stalls())
        try:
            await asyncio.wait((stopped, player, watch), return_when="FIRST_COMPLETED")
            for part in (player, watch):
                if part.done():
                    part.result()  # a failure is told, not swallowed
            if not stopped.done() and not self._settings.exit_at_end:
                await stopped
        finally:
            tasks: list[asyncio.Task[Any]] = [stopped, player, watch]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    # playback

    async def _play(self) -> None:
        settings = self._settings
        while True:
            await self._play_round()
            self.tally.rounds += 1
            if not settings.loop:
                break
        self.tally.finished = True
        log.info("the recording is at its end after %d frames", self.tally.played)
        if settings.at_end == "close" or settings.exit_at_end:
            await self._close_clients(WSCloseCode.OK)

    async def _play_round(self) -> None:
        self._recorded.position = 0
        await self._wait_for_clients(self._settings.wait_clients)
        self._start_t = 0
        since_turn = 0
        for position, entry in enumerate(self._source.entries()):
            self._recorded.position = position
            stream = self._venue.stream_of(entry.raw) if entry.dir == "in" else None
            if self._polled:
                await self._wait_until_due(entry.t)
                self.tally.played += entry.dir == "http"
            elif stream is not None:
                if not self._subscribed():  # nobody is there: the recording waits, a venue would not
                    await self._wait_for_clients(1)
                    self._start_t = 0
                since_turn += 1
                if await self._wait_until_due(entry.t) or since_turn >= FRAMES_PER_TURN:
                    await asyncio.sleep(0)
                    since_turn = 0
                await self._deliver(stream, entry.raw)
            self._recorded.position = position + 1

    async def _wait_until_due(self, t: int) -> bool:
        """Sleep until the frame is due; whether it slept."""
        if self._settings.speed is None:
            return False
        now = time.monotonic()
        if not self._start_t:
            self._start_wall, self._start_t = now, t
        delay_s = self._start_wall + (t - self._start_t) / 1e9 / self._settings.speed - now
        if delay_s <= 0:
            return False
        await asyncio.sleep(delay_s)
        return True

    async def _deliver(self, stream: str, raw: str) -> None:
        takers = self._routes.get(stream)
        if takers is None:
            takers = self._routes[stream] = [c for c in self._clients if c.session.streams and c.session.wants(stream)]
        if not takers:
            self.tally.unclaimed += 1
            return
        self.tally.played += 1
        self.tally.streams[stream] += 1
        for client in tuple(takers):
            self._blocked, self._blocked_at = client, time.monotonic()
            try:
                await client.socket.send_str(client.session.dress(stream, raw))
            except ConnectionError:  # it is gone; its handler takes it off the list
                log.debug("a client went away while a frame was sent to it")
        self._blocked = None

    def _subscribed(self) -> int:
        if self._polled:  # whoever asked for something
            return self.tally.rest_answered
        return sum(1 for client in self._clients if client.session.streams)

    async def _wait_for_clients(self, count: int) -> None:
        """Until so many clients have subscribed and no further subscription came for `settle_s`.

        A client may subscribe in several messages; a venue's first frame of a channel can be a snapshot that must not
        pass before the last of them.
        """
        while True:
            quiet_s = time.monotonic() - self._changed_at
            enough = self._subscribed() >= count
            if enough and quiet_s >= self._settings.settle_s:
                return
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.settle_s - quiet_s if enough else None):
                    await self._changed.wait()

    def _note_change(self) -> None:
        self._routes.clear()
        self._changed_at = time.monotonic()
        self._changed.set()

    async def _watch_for_stalls(self) -> None:
        """Cut off a client that takes nothing: it would hold up all others."""
        while True:
            await asyncio.sleep(min(1.0, self._settings.stall_s / 4))
            client = self._blocked
            if client is not None and time.monotonic() - self._blocked_at > self._settings.stall_s:
                log.warning("a client took nothing for %g s and is cut off", self._settings.stall_s)
                self.tally.stalled_clients += 1
                if client.request.transport is not None:
                    client.request.transport.abort()

    async def _close_clients(self, code: WSCloseCode) -> None:
        """Close in order: when a client has answered the close it has read everything before it."""
        if self._clients:
            await asyncio.gather(*(client.socket.close(code=code) for client in tuple(self._clients)))

    # the port

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._handle_websocket(request)
        query = dict(request.query)
        answer = self._venue.rest(request.path, query, self._recorded) if request.method == "GET" else None
        if answer is not None:
            self.tally.rest_answered += 1
            if self._polled and self.tally.rest_answered == 1:
                self._note_change()
        else:
            answer = self._venue.refusal(request.path, query, self._recorded)
            self._note_unanswered(f"{request.method} {request.path_qs}")
        return web.Response(status=answer.status, text=answer.text, content_type="application/json")

    def _note_unanswered(self, request: str) -> None:
        log.warning("not in the recording: %s", request)
        self.tally.rest_unanswered += 1
        if request in self.tally.unanswered or len(self.tally.unanswered) < NAMED_REQUESTS_MAX:
            self.tally.unanswered[request] += 1

    async def _handle_websocket(self, request: web.Request) -> web.StreamResponse:
        session = self._venue.session(request.path, dict(request.query), self._recorded)
        if session is None:
            self._note_unanswered(f"WebSocket {request.path_qs}")
            return web.Response(status=404, text=f"no such WebSocket path: {request.path}\n")
        socket = web.WebSocketResponse(timeout=CLOSE_S_MAX, compress=False, max_msg_size=CLIENT_MESSAGE_BYTES_MAX)
        await socket.prepare(request)
        client = Client(socket, session, request)
        self._clients[client] = None
        self.tally.clients += 1
        self._note_change()
        duty = asyncio.ensure_future(self._keep_heartbeat(client))
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await self._hear(client, message.data)
        except ConnectionError:
            log.debug("a client went away in the middle of its dialogue")
        finally:
            duty.cancel()
            await asyncio.wait((duty,))
            del self._clients[client]
            self._note_change()
        return socket

    async def _hear(self, client: Client, text: str) -> None:
        before = len(client.session.streams)
        replies = client.session.hear(text)
        for reply in replies:  # the acknowledgement goes out before the first frame that it allows
            await client.socket.send_str(reply)
        if replies or len(client.session.streams) != before:
            self._note_change()

    async def _keep_heartbeat(self, client: Client) -> None:
        """WebSocket pings, and the heartbeat that the client asked for; both by the recording's clock."""
        pace = self._settings.speed or 1.0
        pinged = beaten = time.monotonic()
        shortest, longest = HEARTBEAT_TICK_S
        while not client.socket.closed:
            periods = [p for p in (self._venue.ping_s, client.session.heartbeat_s) if p]
            await asyncio.sleep(max(shortest, min([longest, *(p / pace / 8 for p in periods)])))
            now = time.monotonic()
            try:
                if self._venue.ping_s and now - pinged >= max(1.0, self._venue.ping_s / pace):
                    pinged = now
                    await client.socket.ping()
                if client.session.heartbeat_s and now - beaten >= client.session.heartbeat_s / pace:
                    beaten = now
                    for text in client.session.beat():
                        await client.socket.send_str(text)
            except ConnectionError:
                return
            if client.session.overdue:
                log.warning("a client left a heartbeat unanswered and is disconnected")
                await client.socket.close(code=self._venue.overdue_code)

    def summary(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "exchange": self._venue.exchange,
            "finished": tally.finished,
            "rounds": tally.rounds,
            "recorded": self._recorded.frames,
            "played": tally.played,
            "unclaimed": tally.unclaimed,
            "streams": dict(sorted(tally.streams.items())),
            "dialogue_frames": self._recorded.control,
            "bad_lines": self._source.bad_lines,
            "clients": tally.clients,
            "stalled_clients": tally.stalled_clients,
            "rest_answered": tally.rest_answered,
            "rest_unanswered": tally.rest_unanswered,
            "unanswered": dict(tally.unanswered),
        }


# record


class Recorder:
    """Writes what one venue sends, with its requests and answers, to one recording."""

    def __init__(
        self, venue: Venue, writer: RecordingWriter, ws_url: str, rest_url: str, every_s: float | None = None
    ) -> None:
        self._venue, self._writer, self._every_s = venue, writer, every_s
        self._ws_url, self._rest_url = ws_url, rest_url.rstrip("/")
        self._snapshots: asyncio.Queue[str] = asyncio.Queue()  # at most one entry per stream
        self._started: set[str] = set()
        self.frames = 0
        self.bodies = 0
        self.complaints = 0
        self.failed_requests = 0

    async def run(self, tickers: list[str], streams: list[str], stop: asyncio.Event) -> bool:
        """Record until `stop` is set (True) or the venue ends a connection (False)."""
        if not self._venue.ws_url:
            await self._poll(tickers, streams, stop)
            return True
        feeds = [
            LiveFeed(self._venue, f"ws{n}", some, self._ws_url, self._on_frame, self._on_sent, self._on_open)
            for n, some in enumerate(self._venue.connections(streams), 1)
        ]
        async with aiohttp.ClientSession() as http:
            for request in self._venue.fetches(tickers):
                await self._fetch(http, request)
            stopped = asyncio.ensure_future(stop.wait())
            fetching = asyncio.ensure_future(self._fetch_snapshots(http))
            running = [asyncio.ensure_future(feed.run(stop)) for feed in feeds]
            tasks = (stopped, fetching, *running)
            try:
                await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
                was_asked = stop.is_set()
                stop.set()
                await asyncio.wait(running)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        for task in (*running, fetching):
            if not task.cancelled():
                task.result()
        self.complaints = sum(len(feed.complaints) for feed in feeds)
        return was_asked

    async def _poll(self, tickers: list[str], streams: list[str], stop: asyncio.Event) -> None:
        """A venue without WebSocket: each stream is a request that is made again and again."""
        async with aiohttp.ClientSession() as http:
            for request in self._venue.fetches(tickers):
                await self._fetch(http, request)
            async with asyncio.TaskGroup() as tasks:
                for number, stream in enumerate(streams):
                    tasks.create_task(self._poll_stream(http, stream, number * self._venue.request_gap_s, stop))

    async def _poll_stream(self, http: aiohttp.ClientSession, stream: str, wait_s: float, stop: asyncio.Event) -> None:
        first = True
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await stop.wait()
                    return
            poll = self._venue.poll(stream, first)
            await self._fetch(http, poll.path)
            wait_s, first = self._every_s or poll.every_s, False

    def _on_open(self, conn: str, t: int, url: str) -> None:
        self._writer.write(Entry(t, conn, "open", url=url))

    def _on_sent(self, conn: str, t: int, raw: str) -> None:
        self._writer.write(Entry(t, conn, "out", raw=raw))

    def _on_frame(self, conn: str, t: int, raw: str) -> None:
        self._writer.write(Entry(t, conn, "in", raw=raw))
        self.frames += 1
        stream = self._venue.stream_of(raw)
        if stream and stream not in self._started:
            self._started.add(stream)
            request = self._venue.snapshot_for(stream)
            if request is not None:
                self._snapshots.put_nowait(request)

    async def _fetch_snapshots(self, http: aiohttp.ClientSession) -> None:
        while True:
            await self._fetch(http, await self._snapshots.get())
            await asyncio.sleep(self._venue.request_gap_s)

    async def _fetch(self, http: aiohttp.ClientSession, request: str) -> None:
        url = self._rest_url + request
        try:
            t, body = await fetch(http, url)
        except Disconnected as error:  # the recording goes on without this body, and says so at its end
            log.warning("%s", error)
            self.failed_requests += 1
            return
        self._writer.write(Entry(t, "rest", "http", url=url, raw=body))
        self.bodies += 1


async def _show_progress(recorder: Recorder, writer: RecordingWriter) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        return
    started = time.monotonic()
    with console.status("connecting") as status:
        while True:
            elapsed_s = time.monotonic() - started
            status.update(
                f"{writer.path.name}: {recorder.frames} frames, {recorder.bodies} REST bodies, {elapsed_s:.0f} s"
            )
            await asyncio.sleep(0.5)


# commands


class _Speed(click.ParamType[float | None]):
    name = "N|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value == "max":
            return None
        try:
            speed = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor max", param, ctx)
        if not 0 < speed < float("inf"):
            self.fail("a speed is greater than 0", param, ctx)
        return speed


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Play recorded exchange traffic as the venue would, or record it."""


@main.command()
@click.argument("recordings", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--speed", type=_Speed(), default="1", show_default=True, help="1 as recorded, N times as fast, or max.")
@click.option("--exchange", type=click.Choice(venue_names()), metavar="NAME", help="Default: told by the recording.")
@click.option("--loop", is_flag=True, help="Start again at the end, for ever.")
@click.option("--wait-clients", type=click.IntRange(1), default=1, show_default=True, help="Clients to wait for.")
@click.option("--settle", "settle_s", type=Finite(0), default=0.5, show_default=True,
              help="Seconds without a new subscription before playback starts.")  # fmt: skip
@click.option("--stall", "stall_s", type=Finite(0.1), default=30.0, show_default=True,
              help="Seconds after which a client that takes nothing is cut off.")  # fmt: skip
@click.option("--at-end", type=click.Choice(["hold", "close"]), default="hold", show_default=True,
              help="hold: connections stay open and silent until SIGTERM. close: they are closed; the port stays.")  # fmt: skip
@click.option("--exit", "exit_at_end", is_flag=True, help="End the process when clients have got everything.")
@click.option(
    "--skip-bad-lines", is_flag=True, help="Pass over lines that are no entries instead of refusing the file."
)
@log_options
def serve(
    recordings: tuple[Path, ...],
    port: int,
    host: str,
    exchange: str | None,
    skip_bad_lines: bool,
    log_level: str,
    log_format: str,
    **settings: Any,
) -> None:
    """Play RECORDINGS (merged by receive time) over WebSocket and HTTP as the venue would.

    Prints one JSON line when ready and one as a summary at the end. Playback starts when the first client has
    subscribed (see --wait-clients, --settle), is the same for all clients, waits for the slowest of them, and pauses
    while nobody is subscribed. A client gets the frames of its subscriptions only, as recorded.

    Any login is accepted and none is needed. Heartbeats that a client asks for run by the recording's clock. REST
    requests get the recorded body of the same resource; lists of instruments are made from the recorded symbols where
    there is none; a book snapshot is the first one that playback has not passed.
    """
    logs.set_up(log_level, log_format)
    try:
        source = Source(list(recordings), skip_bad_lines)
        venue = load_venue(exchange) if exchange else source.venue()
        summary = asyncio.run(_serve(source, venue, Settings(**settings), host, port))
    except (ReplayError, StorageError) as error:
        _fail(str(error), EXIT_USAGE)
    except OSError as error:
        _fail(f"cannot listen on {host}:{port}: {error}", EXIT_USAGE)
    click.echo(text_of(summary))


async def _serve(source: Source, venue: Venue, settings: Settings, host: str, port: int) -> dict[str, Any]:
    replay = Replay(source, venue, settings)
    with stop_on_signals() as stop:
        await replay.run(host, port, stop)
    return replay.summary()


@main.command(epilog=f"EXCHANGE: {', '.join(venue_names())}.")
@click.argument("exchange", type=click.Choice(venue_names()), metavar="EXCHANGE")
@click.argument("tickers", nargs=-1)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="FILE.jsonl.zst to write.")
@click.option(
    "--feeds", help="Feeds, by comma. Default: trades,orderbook_l2,bbo, and candles,tickers of a polled venue."
)
@click.option("--stream", "extra", multiple=True, help="A stream by the venue's own name, in addition; repeatable.")
@click.option("--seconds", type=Finite(0, min_open=True), help="Default: until Ctrl-C or SIGTERM.")
@click.option("--ws-url", help="Default: the venue's.")
@click.option("--rest-url", help="Default: the venue's.")
@click.option("--every", "every_s", type=Finite(0.1), help="Seconds between two requests for the same thing, "
              "where the venue is polled. Default: the venue's.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@log_options
def record(
    exchange: str,
    tickers: tuple[str, ...],
    out: Path,
    feeds: str | None,
    extra: tuple[str, ...],
    seconds: float | None,
    ws_url: str | None,
    rest_url: str | None,
    every_s: float | None,
    as_json: bool,
    log_level: str,
    log_format: str,
) -> None:
    """Record the feed of EXCHANGE for TICKER... to a file that `mdreplay serve` plays.

    The text of every frame is kept untouched with the time at which it was read; requests and REST bodies are kept
    too. The file gets its name when it is whole. Exit code 1 if the connection ended before it should.
    """
    logs.set_up(log_level, log_format)
    venue = load_venue(exchange)
    default = "trades,orderbook_l2,bbo" if venue.ws_url else ",".join(POLLED_FEEDS)
    chosen = [feed for feed in (feeds or default).split(",") if feed] if tickers else []
    if unknown := [feed for feed in chosen if feed not in DATA_FEEDS]:
        _fail(f"unknown feed {unknown[0]!r}; feeds: {', '.join(DATA_FEEDS)}", EXIT_USAGE)
    try:
        streams = [*dict.fromkeys((*venue.streams_for(tickers, chosen), *extra))]
        if not streams:
            _fail("nothing to record: name a TICKER or a --stream", EXIT_USAGE)
        writer = RecordingWriter(out)
    except (ValueError, StorageError) as error:
        _fail(str(error), EXIT_USAGE)
    recorder = Recorder(venue, writer, ws_url or venue.ws_url, rest_url or venue.rest_url, every_s)
    try:
        was_asked = asyncio.run(_record(recorder, writer, list(tickers), streams, seconds))
        writer.close()
    except StorageError as error:
        _fail(str(error), EXIT_FINDINGS)
    except Disconnected as error:
        writer.close()
        if not recorder.frames:
            out.unlink()
        _fail(str(error), EXIT_FINDINGS)
    summary = {
        "file": str(out),
        "frames": recorder.frames,
        "bodies": recorder.bodies,
        "failed_requests": recorder.failed_requests,
        "complaints": recorder.complaints,
        "ended_by": "us" if was_asked else "venue",
    }
    click.echo(text_of(summary) if as_json else "  ".join(f"{key}: {value}" for key, value in summary.items()))
    cut_short = not was_asked and seconds is not None
    sys.exit(EXIT_FINDINGS if cut_short or recorder.failed_requests or recorder.complaints else EXIT_DONE)


async def _record(
    recorder: Recorder, writer: RecordingWriter, tickers: list[str], streams: list[str], seconds: float | None
) -> bool:
    with stop_on_signals() as stop:
        alarm = asyncio.get_running_loop().call_later(seconds, stop.set) if seconds is not None else None
        progress = asyncio.ensure_future(_show_progress(recorder, writer))
        try:
            return await recorder.run(tickers, streams, stop)
        finally:
            if alarm is not None:
                alarm.cancel()
            progress.cancel()
            await asyncio.wait((progress,))


def _fail(text: str, code: int) -> NoReturn:
    click.echo(f"mdreplay: {text}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
