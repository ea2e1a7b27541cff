"""The three stages. Each has settings, ``prepare`` that returns a task for the loop, and updates as named functions."""

#: In the order in which a run goes through them.
STAGES = ("teacher", "trajectory", "distribution")
