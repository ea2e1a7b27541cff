"""The three stages. Each module: its settings, ``prepare`` which returns a task for the loop, and its updates as named functions."""

#: In the order in which a run goes through them.
STAGES = ("teacher", "trajectory", "distribution")
