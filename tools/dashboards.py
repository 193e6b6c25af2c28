"""The Grafana dashboard, built as code (Grafana Foundation SDK). Written into docker/grafana by `make schema`.

Every expression is of metrics that `mdcollector.monitor` serves; a test asks a real Prometheus for each of them.
"""

from collections.abc import Iterator, Sequence

from grafana_foundation_sdk.builders import dashboard, logs, loki, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE, LOGS = DataSourceRef(type_val="prometheus", uid="prometheus"), DataSourceRef(type_val="loki", uid="loki")
FULL_WIDTH, PANEL_WIDTH, PANEL_HEIGHT, STAT_HEIGHT = 24, 12, 8, 4
TROUBLE = '{level=~"warning|error|critical"}'  # LogQL; docker/alloy makes the label of the JSON lines
Panel = tuple[str, str, Sequence[tuple[str, str]]]  # title, unit, (expression, legend)

STATS: Sequence[tuple[str, str, str]] = (
    ("findings", "short", "sum(mdcollector_finding) or vector(0)"),
    ("connectors not connected", "short", "count(mdcollector_connected == 0) or vector(0)"),
    ("books not proven", "short", 'sum(mdcollector_books{state="invalid"})'),
    ("rows lost in rings, 1 h", "short", "sum(increase(mdcollector_lapped_rows_total[1h])) + sum(increase(mdcollector_damaged_rows_total[1h]))"),
    ("holes told, 1 h", "short", "sum(increase(mdcollector_gaps_total{gap!~'.*_(repaired|continued)'}[1h])) or vector(0)"),
    ("rows per second", "short", "sum(rate(mdcollector_ring_rows_total[1m]))"),
)  # fmt: skip


def _quantile(share: float, stage: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate(mdcollector_receive_to_{stage}_seconds_bucket[1m])))"


PANELS: Sequence[Panel] = (
    ("Rows into the rings", "short", (("sum by (connector, feed) (rate(mdcollector_ring_rows_total[1m]))", "{{connector}} {{feed}}"),)),
    ("Packet read until visible, p99", "s", ((_quantile(0.99, "visible", "connector"), "{{connector}}"),)),
    ("Packet read until decoded, p99", "s", ((_quantile(0.99, "parse", "connector"), "{{connector}}"),)),
    ("Packet read until durable, p99", "s", ((_quantile(0.99, "persisted", "writer"), "{{writer}}"),)),
    ("Holes by cause", "short", (("sum by (connector, gap) (increase(mdcollector_gaps_total[5m])) > 0", "{{connector}} {{gap}}"),)),
    ("Refused frames by reason", "short", (("sum by (connector, reason) (increase(mdcollector_refused_frames_total[5m])) > 0", "{{connector}} {{reason}}"),)),
    ("Reconnects", "short", (('sum by (connector) (increase(mdcollector_events_total{event="connections"}[5m]))', "{{connector}}"),)),
    ("Requests that wait", "short", (("sum by (connector) (mdcollector_fetches_waiting)", "{{connector}}"),)),
    ("Writers: share of the ring not yet durable", "percentunit", (("max by (writer, stream) (mdcollector_writer_lag_ratio)", "{{writer}} {{stream}}"),)),
    ("Bytes written", "Bps", (("sum by (writer) (rate(mdcollector_written_bytes_total[5m]))", "{{writer}}"),)),
    ("CPU of each process, cores", "short", (("rate(mdcollector_process_cpu_seconds_total[1m])", "{{process}}"),)),
    ("Resident memory", "bytes", (("mdcollector_process_resident_bytes", "{{process}}"),)),
    ("Streams silent for longest", "s", (("topk(10, mdcollector_stream_silence_seconds)", "{{connector}} {{stream}}"),)),
    ("Free disk", "percentunit", (("mdcollector_disk_free_bytes / mdcollector_disk_size_bytes", "{{path}}"),)),
)  # fmt: skip


def expressions() -> Iterator[str]:
    """Every PromQL expression of the dashboard."""
    yield from (expression for _, _, expression in STATS)
    for _, _, queries in PANELS:
        yield from (expression for expression, _ in queries)


def fleet_dashboard() -> str:
    """The dashboard as JSON."""
    board = (
        dashboard.Dashboard("mdcollector: the fleet").uid("mdcollector").tags(["mdcollector"]).refresh("10s")
        .time("now-1h", "now").timezone("utc").readonly()
    )  # fmt: skip
    width = FULL_WIDTH // len(STATS)
    for title, unit, expression in STATS:
        query = prometheus.Dataquery().expr(expression).ref_id("A")
        board.with_panel(
            stat.Panel().title(title).unit(unit).datasource(SOURCE).span(width).height(STAT_HEIGHT).with_target(query)
        )
    for title, unit, queries in PANELS:
        panel = timeseries.Panel().title(title).unit(unit).datasource(SOURCE).span(PANEL_WIDTH).height(PANEL_HEIGHT)
        for i, (expression, legend) in enumerate(queries):
            panel.with_target(prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + i)))
        board.with_panel(panel)
    lines = loki.Dataquery().expr(TROUBLE).ref_id("A")
    board.with_panel(
        logs.Panel().title("Warnings and errors").datasource(LOGS).span(FULL_WIDTH).height(PANEL_HEIGHT)
        .show_time(True).wrap_log_message(True).with_target(lines)
    )  # fmt: skip
    return str(JSONEncoder(sort_keys=True, indent=1).encode(board.build())) + "\n"
