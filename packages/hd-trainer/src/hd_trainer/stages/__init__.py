"""The three stages. Each module: its settings, and ``prepare`` which returns a task for the loop."""
