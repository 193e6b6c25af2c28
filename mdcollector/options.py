"""What the command lines of all programs have in common. Used by `cli.py`, `readers/` and `tools/`."""

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """A number within a range. Neither infinite nor NaN, which passes every comparison of a plain range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number
