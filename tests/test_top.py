"""The live view: driven by keys as a person would, over a fleet that runs."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("textual", reason="the extra `top` is not installed")

from textual.widgets import DataTable, Static

from mdcollector.top import COLUMNS, Top, sparkline
from tests.fleet import Fleet, until


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert sparkline([0, 1, 2, 4, 8]) == " ▁▂▄█"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "  "


def cells(app: Top) -> dict[str, dict[str, object]]:
    """What the table shows, by process and column."""
    table = app.query_one(DataTable)
    rows = (table.get_row_at(i) for i in range(table.row_count))
    return {str(row[0]): dict(zip(COLUMNS, row, strict=True)) for row in rows}


def test_the_picture_in_the_readme_has_the_columns_of_today(repository: Path) -> None:
    heads = [line.split() for line in (repository / "README.md").read_text().splitlines() if "p99 us" in line]
    assert heads == [" ".join(COLUMNS).split()]


def test_it_shows_the_fleet_sorts_it_and_tells_all_about_one_process(tmp_path: Path) -> None:
    async def drive(fleet: Fleet) -> None:
        app = Top(fleet.rings)
        async with app.run_test(size=(200, 50)) as pilot:
            async with asyncio.timeout(30):
                while not any(row["rows/s"] for row in cells(app).values()):
                    await pilot.pause(0.2)
            shown = cells(app)
            assert set(shown) == {"conn", "parquet"}
            assert shown["conn"]["state"] == "connected"
            assert shown["conn"]["role"] == "connector"
            assert int(str(shown["conn"]["MiB"])) > 10
            assert list(cells(app)) == ["conn", "parquet"]
            await pilot.press("r")
            assert list(cells(app)) == ["parquet", "conn"]
            await pilot.press("r", "enter")
            await pilot.pause()
            detail = app.query_one("#detail", Static)
            assert detail.styles.display == "block"
            text = str(detail.render())
            assert "ring trades:" in text
            assert " a second" in text
            assert "received to visible, us: p50 " in text
            assert "venue's clock against ours: " in text
            assert "connections: 1" in text
            await pilot.press("escape")
            assert detail.styles.display == "none"
            fleet.connector.kill()
            fleet.connector.wait(30)
            async with asyncio.timeout(30):
                while not str(cells(app)["conn"]["state"]).startswith("down"):
                    await pilot.pause(0.2)

    with Fleet(tmp_path, "binance_spot") as fleet:
        fleet.start()
        until(lambda: fleet.published("trades") > 20, "some trades")
        asyncio.run(drive(fleet))
