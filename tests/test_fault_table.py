"""The table of faults in ARCHITECTURE.md: every fault has a row, every test that is named there exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = 20


def rows() -> list[list[str]]:
    """Cells of the table, the heading first."""
    section = (
        (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Faults and where they are tested\n")[2]
    )
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def test_every_fault_has_a_row_and_every_cell_a_test_or_a_reason() -> None:
    heading, *table = rows()
    assert [row[0].split()[0] for row in table] == [f"F{number}" for number in range(1, FAULTS + 1)]
    for row in table:
        assert len(row) == len(heading), row[0]
        for cell in row[1:]:
            assert re.fullmatch(r"- \(.+\)|`test_\w+`(, `test_\w+`)*", cell), (row[0], cell)


def test_every_test_that_is_named_exists() -> None:
    named = {name for row in rows() for cell in row for name in re.findall(r"`(test_\w+)`", cell)}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    there = {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    assert named
    assert named <= there, named - there
