"""The three stages. Each module: its settings, and ``prepare`` which returns a task for the loop."""

#: In the order in which a run goes through them.
STAGES = ("teacher", "trajectory", "distribution")
