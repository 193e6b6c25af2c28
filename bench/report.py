"""What a run becomes: a Markdown table with the targets beside the figures, and a plot. Measures nothing itself."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.peers import BARE

Results = dict[str, Any]
BARE_RATIO = (
    1.15  # 1.1 us, the target of a trade, to the 0.956 us that the bare shape took on the machine of the targets
)


def _find(results: Results, part: str, **wanted: Any) -> dict[str, Any] | None:
    rows: list[dict[str, Any]] = results.get(part, [])
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def targets(results: Results) -> list[dict[str, Any]]:
    """Each target with its figure, and the verdict: as measured, and for times also at the speed of the targets' machine.

    Each figure brings its `slowness`: how many times slower the machine was beside it than the one of the targets.
    """
    found: list[dict[str, Any]] = []

    def most(what: str, unit: str, value: float, limit: float, slowness: float = 1.0) -> None:
        nominal = value / slowness
        verdict = "met" if value <= limit else "met at nominal speed" if nominal <= limit else "not met"
        found.append({"what": what, "target": f"<= {limit:g} {unit}", "value": value, "nominal": nominal, "unit": unit, "verdict": verdict})  # fmt: skip

    def least(what: str, unit: str, value: float, limit: float, slowness: float = 1.0) -> None:
        nominal = value * slowness
        verdict = "met" if value >= limit else "met at nominal speed" if nominal >= limit else "not met"
        found.append({"what": what, "target": f">= {limit:g} {unit}", "value": value, "nominal": nominal, "unit": unit, "verdict": verdict})  # fmt: skip

    for frame, limit in (("binance trade", 1.0), ("binance bookTicker", 1.1), ("binance depth 2x20", 12.0)):
        if row := _find(results, "hot_path", frame=frame):
            most(f"payload to rows, {frame}", "us", row["total"] / 1e3, limit, row["total"] / row["nominal"])
    for row in results.get("venues", []):
        limit = 1.5 if row["frame"].endswith("trade") else 14.0
        most(f"payload to rows, {row['frame']}", "us", row["total"] / 1e3, limit, row["total"] / row["nominal"])
    if streams := results.get("streams"):
        share = streams["core_share"] * 100
        what = f"{streams['streams']} streams, {streams['messages_per_s']:,.0f} msg/s: a core's share"
        most(what, "%", share, 40, streams["slowness"])
    for kind, limit in (("trade", 1.1), ("bookticker", 1.2), ("depth", 12.0)):
        if row := _find(results, "end_to_end", kind=kind, mode="burst", tls=False):
            most(f"end to end, CPU of a message, {kind} burst", "us", row["cpu_ns"] / 1e3, limit, row["slowness"])
    if row := _find(results, "end_to_end", kind="trade", mode="20,000 msg/s"):
        for name, limit in (("p50", 1.5), ("p99", 8.0)):
            visible_us = row["visible_first_of_packet_ns"][name] / 1e3
            most(f"packet received to visible, 20,000 msg/s, {name}", "us", visible_us, limit, row["slowness"])
    if row := _find(results, "ring_to_reader", reader="spinning"):
        most("ring to spinning reader, p50", "us", row["noticed_ns"]["p50"] / 1e3, 1.0, row["slowness"])
    for feed in ("trades", "orderbook_l2"):
        if row := _find(results, "drain", feed=feed):
            least(f"drain to Parquet, {feed}, alone", "M rows/s", row["rows_per_s"] / 1e6, 5, row["slowness"])
    if sustained := results.get("sustained"):
        lost = sustained["sent"] - sustained["stored"]
        most(f"rows lost, {sustained['rate']:,.0f} rows/s sustained beside a collector", "rows", lost, 0)
    if resident := [run["rss_beside_rings_mb"] for run in results.get("end_to_end", [])]:
        most("memory of a connector beside its rings", "MB", max(resident), 60)
    bare, ours = _find(results, "peers", stack=BARE), _find(results, "peers", stack="mdcollector", kind="trade")
    if bare and ours:
        ratio = ours["cpu_ns"] / ours["slowness"] / (bare["cpu_ns"] / bare["slowness"])
        most(f"CPU of a message, mdcollector / {BARE}", "times", ratio, BARE_RATIO)
    for stack, kind, tls, limit in (("aiohttp+ujson+pydantic", "trade", False, 4), ("cryptofeed", "aggtrade", True, 6)):
        peer = _find(results, "peers", stack=stack)
        ours = _find(results, "peers", stack="mdcollector", kind=kind, tls=tls)
        if peer and ours:
            ratio = peer["cpu_ns"] / peer["slowness"] / (ours["cpu_ns"] / ours["slowness"])
            least(f"CPU of a message, {stack} / mdcollector", "times", ratio, limit)
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _us(values: dict[str, float]) -> list[str]:
    return [f"{values[name] / 1e3:,.1f}" for name in ("p50", "p99", "p99.9")]


def markdown(results: Results) -> str:
    """The whole run as Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    text = ["# Results" + (" of a quick run: the figures mean nothing" if results["quick"] else "")]
    text.append(
        f"{results['date']}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, Linux "
        f"{machine['kernel']}, Python {machine['python']}; {versions}. Others used {machine['busy_cores']} cores before "
        f"and {machine.get('busy_cores_at_the_end', '?')} after the run."
    )
    text += [f"**Warning:** {warning}." for warning in machine["warnings"]]
    if calibration := results.get("calibration"):
        text.append(
            f"Calibration: one reference decode takes {calibration['best_ns']:.0f} ns here at best, "
            f"{calibration['median_ns']:.0f} ns mostly, and {calibration['nominal_ns']:.0f} ns on the machine of the "
            "targets. *Nominal* is a figure (rates: its inverse) divided by how many times longer the reference decode took "
            "beside it."
        )
    if rows := targets(results):
        text.append("## Targets")
        shown = [(r["what"], r["target"], f"{r['value']:,.2f}", f"{r['nominal']:,.2f}", r["verdict"]) for r in rows]
        text.append(_table(("what", "target", "measured", "nominal", "verdict"), shown))
    if rows := results.get("hot_path"):
        text.append("## Hot path: payload to visible rows, ns a frame")
        shown = [(r["frame"], f"{r['rows']:.1f}", f"{r['decode']:,.0f}", f"{r['total']:,.0f}", f"{r['ratio']:.2f}", f"{r['nominal']:,.0f}") for r in rows]  # fmt: skip
        text.append(
            _table(("frame", "rows", "decode alone", "decode + checks + book + rows", "ratio", "nominal"), shown)
        )
    if rows := results.get("venues"):
        text.append("## Every venue: payload to visible rows, ns a frame")
        shown = [(r["frame"], f"{r['rows']:.1f}", *(f"{r[k]:,.0f}" for k in ("msgspec untyped", "orjson", "total", "nominal")), f"{r['to_binance_spot']:.2f}") for r in rows]  # fmt: skip
        text.append(
            _table(
                ("frame", "rows", "msgspec untyped", "orjson", "payload to rows", "nominal", "times binance_spot"),
                shown,
            )
        )
    if row := results.get("streams"):
        text.append(
            f"{row['streams']} streams on one connection at {row['messages_per_s']:,.0f} messages/s: "
            f"{row['core_share']:.0%} of a core, {row['cpu_ns_per_message']:,.0f} ns a message in "
            f"{row['packets_per_s']:,.0f} packets/s; visible {row['visible_ns']['p50'] / 1e3:.1f} us p50, "
            f"{row['visible_ns']['p99'] / 1e3:.1f} us p99."
        )
    if rows := results.get("end_to_end"):
        text.append("## End to end over loopback")
        shown = [
            (r["kind"], r["mode"] + (", TLS" if r["tls"] else ""), f"{r['messages_per_s']:,.0f}", f"{r['cpu_ns']:,.0f}", f"{r['cpu_ns'] / r['slowness']:,.0f}",
             f"{r['messages_per_packet']:,.1f}", *_us(r["visible_first_of_packet_ns"]), *_us(r["visible_ns"]),
             f"{r['rss_beside_rings_mb']:.0f}")
            for r in rows
        ]  # fmt: skip
        head = ("messages", "mode", "msg/s", "CPU ns/msg", "nominal", "msg/packet", "first of a packet visible, us: p50", "p99",
                "p99.9", "all messages, us: p50", "p99", "p99.9", "MB beside rings")  # fmt: skip
        text.append(_table(head, shown))
    if rows := results.get("peers"):
        text.append("## Beside other stacks: the same frames, in turns")
        shown = [(r["stack"], r["kind"] + (", TLS" if r["tls"] else ""), f"{r['messages_per_s']:,.0f}", f"{r['cpu_ns']:,.0f}", f"{r['cpu_ns'] / r['slowness']:,.0f}") for r in rows]  # fmt: skip
        text.append(_table(("stack", "messages", "msg/s", "CPU ns/msg", "nominal"), shown))
    if rows := results.get("ring_to_reader"):
        text.append("## From the ring to a reader in another process")
        shown = [(r["reader"], f"{r['rate']:,.0f}", *_us(r["noticed_ns"]), *_us(r["oldest_row_in_hand_ns"]), f"{r['reader_cpu_share']:.0%}") for r in rows]  # fmt: skip
        head = ("reader", "rows/s", "noticed, us: p50", "p99", "p99.9", "oldest row in hand, us: p50", "p99", "p99.9", "reader's CPU")  # fmt: skip
        text.append(_table(head, shown))
    if rows := results.get("drain"):
        text.append("## Drain to Parquet")
        shown = [(r["feed"], f"{r['rows']:,}", f"{r['rows_per_s'] / 1e6:.2f}", f"{r['cpu_ns_per_row']:.0f}", f"{r['cpu_ns_per_row'] / r['slowness']:.0f}", f"{r['bytes_per_row']:.1f}") for r in rows]  # fmt: skip
        text.append(_table(("feed", "rows", "M rows/s", "CPU ns/row", "nominal", "bytes/row"), shown))
    if row := results.get("sustained"):
        text.append(
            f"Sustained beside a collector: {row['sent_per_s']:,.0f} rows/s sent, {row['sent']:,} sent, {row['stored']:,} "
            f"stored, {row['lapped']} lapped; the writer used {row['writer_cpu_share']:.0%} of a core "
            f"({row['writer_cpu_ns_per_row']:.0f} ns a row)."
        )
    if rows := results.get("decode"):
        text.append("## Decode, ns a frame")
        parsers = ("msgspec typed", "msgspec untyped", "orjson", "json")
        shown = [(r["frame"], r["bytes"], *(f"{r[p]:,.0f}" for p in parsers)) for r in rows]
        text.append(_table(("frame", "bytes", *parsers), shown))
    if rows := results.get("ring"):
        text.append("## Ring, ns a row")
        text.append(_table(("what", "ns"), [(name, f"{ns:,.1f}") for name, ns in rows.items()]))
    return "\n\n".join(text) + "\n"


# Plot

_OURS, _THEIRS, _REST, _LINE = "#1f77b4", "#b0b0b0", "#ff9f40", "#d62728"


def plot(results: Results, path: Path) -> None:
    """Six panels; parts that were not run stay empty."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(17, 10))
    machine = results["machine"]
    figure.suptitle(
        f"mdcollector, {results['date']}: {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
        + (" (quick run: meaningless)" if results["quick"] else ""),
        fontsize=13,
    )
    panels = (_plot_hot, _plot_peers, _plot_decode, _plot_visible, _plot_readers, _plot_drain)
    for axis, draw in zip(axes.flat, panels, strict=True):
        draw(axis, results)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: Any, names: Sequence[str], values: Sequence[float], colours: Sequence[str], form: str) -> None:
    """Horizontal bars, first on top, each with its figure."""
    at = range(len(names))
    axis.barh(at, values, color=colours)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    for y, value in zip(at, values, strict=True):
        axis.text(value, y, " " + form.format(value), va="center", fontsize=9)
    axis.set_xlim(0, 1.18 * max(values, default=1))


def _plot_hot(axis: Any, results: Results) -> None:
    axis.set_title("Payload to visible rows, us a frame")
    rows = results.get("hot_path", [])
    names = [f"{r['frame']} ({r['rows']:.0f} rows)" for r in rows]
    _bars(axis, names, [r["total"] / 1e3 for r in rows], [_REST] * len(rows), "{:.2f}")
    axis.barh(range(len(rows)), [r["decode"] / 1e3 for r in rows], color=_OURS)
    axis.set_xlabel("blue: decode alone; orange: checks, book, rows")


def _plot_peers(axis: Any, results: Results) -> None:
    axis.set_title("CPU of a message, end to end, us")
    rows = results.get("peers", [])
    names = [f"{r['stack']}\n{r['kind']}{', TLS' if r['tls'] else ''}" for r in rows]
    colours = [_OURS if r["stack"] == "mdcollector" else _THEIRS for r in rows]
    _bars(axis, names, [r["cpu_ns"] / 1e3 for r in rows], colours, "{:.2f}")


def _plot_decode(axis: Any, results: Results) -> None:
    axis.set_title("Decode, us a frame (logarithmic)")
    rows = results.get("decode", [])
    if not rows:
        return
    parsers = {"msgspec typed": _OURS, "msgspec untyped": "#9ecae1", "orjson": _REST, "json": _THEIRS}
    for i, (parser, colour) in enumerate(parsers.items()):
        at = [y + 0.2 * (i - 1.5) for y in range(len(rows))]
        axis.barh(at, [r[parser] / 1e3 for r in rows], height=0.2, color=colour, label=parser)
    axis.set_yticks(range(len(rows)), [r["frame"] for r in rows])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(right=8 * max(max(r[p] for p in parsers) for r in rows) / 1e3)  # room for the legend
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8, loc="lower right")


def _percentile_lines(axis: Any, rows: Sequence[tuple[str, dict[str, float]]]) -> None:
    if not rows:
        return
    for name, values in rows:
        points = [values[p] / 1e3 for p in ("p50", "p99", "p99.9")]
        axis.plot(("p50", "p99", "p99.9"), points, marker="o", label=name)
        for x, y in enumerate(points):
            axis.annotate(f"{y:,.1f}", (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_ylabel("us")
    axis.legend(fontsize=8)


def _plot_visible(axis: Any, results: Results) -> None:
    axis.set_title("Packet received to visible in the ring")
    rows = [r for r in results.get("end_to_end", []) if r["mode"] != "burst"]
    _percentile_lines(axis, [(f"{r['kind']}, {r['mode']}", r["visible_first_of_packet_ns"]) for r in rows])
    if rows:
        axis.axhline(1.5, color=_LINE, linewidth=0.8, linestyle=":")
        axis.axhline(8, color=_LINE, linewidth=0.8, linestyle=":")
        axis.set_xlabel("first message of a packet; dotted: targets for p50 and p99 at 20,000 msg/s")


def _plot_readers(axis: Any, results: Results) -> None:
    axis.set_title("Ring to a reader in another process: row noticed")
    _percentile_lines(axis, [(r["reader"], r["noticed_ns"]) for r in results.get("ring_to_reader", [])])


def _plot_drain(axis: Any, results: Results) -> None:
    axis.set_title("Drain to Parquet, M rows/s")
    rows = results.get("drain", [])
    names = [f"{r['feed']}\n{r['bytes_per_row']:.1f} B/row" for r in rows]
    _bars(axis, names, [r["rows_per_s"] / 1e6 for r in rows], [_OURS] * len(rows), "{:.2f}")
    if rows:
        axis.axvline(5, color=_LINE, linewidth=0.8, linestyle=":")
        axis.set_xlabel("dotted: target")
