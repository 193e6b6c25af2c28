"""The command: `python -m bench all` measures everything in some minutes, `--quick` in seconds, parts go by name."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import drain, endtoend, latency, machine, micro, peers, report

HERE = Path(__file__).resolve().parent


def _middle(kind: str, count: int, rounds: int, **options: Any) -> dict[str, Any]:
    """Of some runs the middle one by CPU, at nominal speed."""
    return machine.middle([endtoend.run(kind, count, **options) for _ in range(rounds)], "cpu_ns")


def _end_to_end(quick: bool) -> list[dict[str, Any]]:
    if quick:
        return [_middle("trade", 3000, 1), _middle("depth", 200, 1), _middle("trade", 2000, 1, rate=20_000.0)]
    found = [_middle("trade", 400_000, 5), _middle("bookticker", 400_000, 5), _middle("depth", 15_000, 5)]
    found += [_middle("trade", int(rate * 5), 3, rate=rate) for rate in (1_000.0, 20_000.0)]
    with micro.ring_directory() as directory, endtoend.certificates(directory) as tls:
        found.append(_middle("trade", 200_000, 3, tls=tls))
    return found


PARTS: dict[str, Callable[[bool], Any]] = {
    "calibration": lambda quick: micro.calibration(0.02 if quick else 2.0),
    "ring": lambda quick: micro.ring(0.01 if quick else 0.5),
    "decode": lambda quick: micro.decode(0.01 if quick else 1.0),
    "hot_path": lambda quick: micro.hot_path(0.02 if quick else 0.5, 1000 if quick else 60_000),
    "venues": lambda quick: micro.venues(0.02 if quick else 0.5, 1000 if quick else 60_000),
    "end_to_end": _end_to_end,
    "streams": lambda quick: endtoend.streams(500.0 if quick else 5000.0, 2.0 if quick else 20.0),
    "ring_to_reader": lambda quick: latency.run(2_000.0 if quick else 20_000.0, 0.2 if quick else 4.0),
    "drain": lambda quick: drain.alone(4_000 if quick else 1_000_000),
    "sustained": lambda quick: drain.sustained(20_000.0 if quick else 200_000.0, 0.5 if quick else 15.0),
    "peers": lambda quick: peers.run(2_000 if quick else 300_000, 1 if quick else 3),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", default=["all"], metavar="PART", help=f"all, or some of: {', '.join(PARTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="small runs that show that it works; figures mean nothing")
    parser.add_argument("--out", type=Path, help="directory of results.json, .md and .png [bench/ for a whole run]")
    given = parser.parse_args()
    parts = list(PARTS) if "all" in given.parts else given.parts
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; there are all, {', '.join(PARTS)}")
    results: dict[str, Any] = {"quick": given.quick, "date": time.strftime("%Y-%m-%d"), "machine": machine.describe()}
    for warning in results["machine"]["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    for name in parts:
        began = time.monotonic()
        print(f"{name} ...", end=" ", flush=True, file=sys.stderr)
        results[name] = PARTS[name](given.quick)
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    results["machine"]["busy_cores_at_the_end"] = round(machine.used_by_others(), 2)
    out = given.out or (HERE if "all" in given.parts and not given.quick else None)
    text = report.markdown(results)
    print(text, end="")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "results.md").write_text(text)
        report.plot(results, out / "results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
