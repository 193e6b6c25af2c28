"""Measurements of the product beside alternatives, on the machine they are run on. Nobody imports this package."""
