"""Writes what is generated: files made of the code, and parts of the documentation between `<!-- generated: NAME -->` marks.

Run by `make schema`; `--check` (part of `make check`) only says whether they are current.
"""

import re
import sys
from pathlib import Path

import click

from mdcollector.exchanges import venue_class, venue_names
from mdcollector.monitor import rules
from mdcollector.records import DATA_FEEDS
from mdcollector.tables import schema_markdown
from tools.dashboards import fleet_dashboard

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "ARCHITECTURE.md")
_PART = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def venues_markdown() -> str:
    """Table of venues and the feeds that each of them gives."""
    lines = ["| venue | " + " | ".join(DATA_FEEDS) + " |", "| --- |" + " --- |" * len(DATA_FEEDS)]
    for name in venue_names():
        venue = venue_class(name)
        lines.append(f"| `{name}` | " + " | ".join("yes" if f in venue.FEEDS else "" for f in DATA_FEEDS) + " |")
    return "\n".join(lines) + "\n"


PARTS = {"schema": schema_markdown, "venues": venues_markdown}
FILES = {
    "docker/prometheus/mdcollector.rules.yml": rules,
    "docker/grafana/dashboards/mdcollector.json": fleet_dashboard,
}


def fill(text: str) -> str:
    """The page with its generated parts made anew."""
    return _PART.sub(lambda m: m[1] + PARTS[m["name"]]() + m[3], text)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 when a page is not current.")
def main(check: bool) -> None:
    """Make generated files and the generated parts of README.md and ARCHITECTURE.md anew."""
    stale = []
    wanted = {name: fill((ROOT / name).read_text(encoding="utf-8")) for name in PAGES}
    wanted |= {name: make() for name, make in FILES.items()}
    for name, text in wanted.items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        click.echo(f"{name}: generated parts " + ("are not current, run: make schema" if check else "written"))
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
