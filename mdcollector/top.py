"""`mdcollector top`: the fleet as it is now, in a terminal. Needs the extra `top` (Textual).

Looks once a second with the monitor's own eyes (`monitor.look`), so both say the same. A row per process; Enter shows
everything about the one under the cursor, s goes on to the next column to sort by, r turns the order, q ends.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Header, Static

from mdcollector.health import DOWN, OK, Finding, concerning, counts_holes, state_of
from mdcollector.monitor import LOOK_S, View, look, pages
from mdcollector.records import ALWAYS_ON
from mdcollector.stats import clock_text

COLUMNS = ("process", "role", "state", "rows/s", "last 30 s", "p50 us", "p99 us", "venue's clock", "gaps", "refused", "invalid books", "lag rows", "CPU %", "MiB", "last error")  # fmt: skip
HISTORY = 30  # looks, one a second, that a sparkline shows
_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS = {OK: "green", DOWN: "red"}


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, as high as its share of the highest one."""
    top = max(values, default=0.0)
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] if top else " " for value in values)


class Row:
    """What one look shows of one process."""

    __slots__ = ("cells", "name")

    def __init__(self, name: str, cells: tuple[Any, ...]) -> None:
        self.name, self.cells = name, cells


def _rows_in(page: Mapping[str, Any]) -> int:
    if "rows_written" in page:
        return int(page["rows_written"])
    return sum(int(ring["published"]) for feed, ring in page.get("rings", {}).items() if feed not in ALWAYS_ON)


class Board:
    """The rows of the table, made of two looks and what is remembered of earlier ones."""

    def __init__(self) -> None:
        self._rates: dict[str, deque[float]] = {}

    def rows(self, view: View, before: View | None) -> list[Row]:
        """A row per process, in the order of their names."""
        found = []
        earlier = {name: page for _, name, page in pages(before.found)} if before is not None else {}
        seconds = view.time - before.time if before is not None else 0.0
        for role, name, page in sorted(pages(view.found), key=lambda entry: entry[1]):
            then = earlier.get(name)
            same = then is not None and then["pid"] == page["pid"] and seconds > 0
            rate = (_rows_in(page) - _rows_in(then)) / seconds if then is not None and same else 0.0
            rates = self._rates.setdefault(name, deque(maxlen=HISTORY))
            rates.append(rate)
            cpu_s = view.cpu_s.get(name, 0.0) - (before.cpu_s.get(name, 0.0) if before is not None else 0.0)
            counters = page.get("counters", {})
            latency = page.get("publish_ns") or page.get("persisted") or {}
            lag = sum(n["lag_rows"] for n in page["streams"].values()) if role == "writer" else 0
            found.append(
                Row(
                    name,
                    (
                        name, role, _state(page, [f for f in view.findings if f.process == name]), round(rate),
                        sparkline(rates), *(round(latency.get(p, 0) / 1000, 1) for p in ("p50", "p99")),
                        clock_text(page["clock"]) if page.get("clock") else "",
                        sum(n for key, n in counters.items() if counts_holes(key)),
                        sum(n for key, n in counters.items() if key.startswith("refused_")),
                        page.get("books_invalid_count", 0), lag,
                        round(100 * cpu_s / seconds, 1) if same else 0.0, round(view.rss.get(name, 0) / 2**20),
                        str(page.get("last_error", ""))[:60],
                    ),
                )
            )  # fmt: skip
        return found


def _state(page: Mapping[str, Any], findings: list[Finding]) -> str:
    state = state_of(findings)
    return str(page["state"]) if state == OK else f"{state}: {page['state']}"


def details(view: View, before: View | None, name: str) -> Text:
    """Everything about one process: findings, notes, feeds and their rates, latencies, counters, refused frames."""
    page = next((page for _, found, page in pages(view.found) if found == name), None)
    text = Text()
    if page is None:
        return text.append(f"{name} is gone")
    text.append(f"{name}  pid {page['pid']}  {page['state']}\n", style="bold")
    for finding in concerning(view.findings, name):
        text.append(f"  {finding.state}: {finding.text}\n", style=_COLOURS.get(finding.state, "yellow"))
    for what, note in page.get("notes", {}).items():
        text.append(f"  {what}: {note}\n", style="yellow")
    then = next((p for _, n, p in pages(before.found) if n == name), {}) if before is not None else {}
    seconds = view.time - before.time if before is not None else 0.0
    for feed, ring in page.get("rings", {}).items():
        rows = ring["published"] - then.get("rings", {}).get(feed, ring)["published"]
        rate = rows / seconds if seconds else 0.0
        text.append(f"  ring {feed}: {ring['published']:,} rows, {rate:,.0f} a second, room for {ring['capacity']:,}\n")
    for stage, words in (("parse_ns", "decoded"), ("publish_ns", "visible"), ("persisted", "durable")):
        if said := page.get(stage):
            times = ", ".join(f"{p} {said[p] / 1000:,.1f}" for p in ("p50", "p90", "p99", "p999"))
            text.append(f"  received to {words}, us: {times}\n")
    if page.get("clock"):
        text.append(f"  venue's clock against ours: {clock_text(page['clock'])}\n")
    if "rows_written" in page:
        for stream, n in page["streams"].items():
            text.append(f"  {stream}: durable {n['durable']:,}, lag {n['lag_rows']:,}, lapped {n['lapped']:,}\n")
    for key, count in sorted(page.get("counters", {}).items()):
        text.append(f"  {key.replace('_', ' ')}: {count:,}\n")
    for reason, sample in page.get("samples", {}).items():
        text.append(f"  refused, {reason}: {sample[:200]}\n", style="dim")
    return text


class Top(App[None]):
    """The application."""

    TITLE = "mdcollector"
    CSS = "#detail { height: auto; max-height: 60%; overflow-y: auto; border-top: solid gray; display: none; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"), Binding("s", "sort", "sort by the next column"), Binding("r", "turn", "turn order"),
        Binding("escape", "close", "close details"),
    ]  # fmt: skip

    def __init__(self, rings: Path, disks: Sequence[Path] = ()) -> None:
        super().__init__()
        self._rings, self._disks = rings, disks
        self._board = Board()
        self._view: View | None = None
        self._before: View | None = None
        self._sorted_by, self._turned = 0, False
        self._shown = ""

    def compose(self) -> ComposeResult:
        yield Header(show_clock=True)
        yield Vertical(DataTable(id="fleet", cursor_type="row", zebra_stripes=True), Static(id="detail"))
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns(*COLUMNS)
        self.look()
        self.set_interval(LOOK_S, self.look)

    def look(self) -> None:
        """Read all pages and draw them."""
        self._before, self._view = self._view, look(self._rings, self._disks, self._view)
        self._draw(self._board.rows(self._view, self._before))

    def _draw(self, rows: list[Row]) -> None:
        assert self._view is not None
        table = self.query_one(DataTable)
        at = table.cursor_row
        rows.sort(key=lambda row: row.cells[self._sorted_by], reverse=self._turned)
        table.clear()
        for row in rows:
            table.add_row(*row.cells, key=row.name)
        table.move_cursor(row=min(at, len(rows) - 1) if rows else 0)
        state = state_of(self._view.findings)
        worst = [str(finding) for finding in self._view.findings][:3]
        self.sub_title = f"{state}  sorted by {COLUMNS[self._sorted_by]}  " + "; ".join(worst)
        if self._shown:
            self.query_one("#detail", Static).update(details(self._view, self._before, self._shown))

    def action_sort(self) -> None:
        self._sorted_by = (self._sorted_by + 1) % len(COLUMNS)
        self.look()

    def action_turn(self) -> None:
        self._turned = not self._turned
        self.look()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        self._shown = str(event.row_key.value or "")
        detail = self.query_one("#detail", Static)
        detail.styles.display = "block"
        if self._view is not None:
            detail.update(details(self._view, self._before, self._shown))

    def action_close(self) -> None:
        self._shown = ""
        self.query_one("#detail", Static).styles.display = "none"
