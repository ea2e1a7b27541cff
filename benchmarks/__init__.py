"""Measurements behind the README's claims: ``python -m benchmarks`` lists them, one file answers one question."""
