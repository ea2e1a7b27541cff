"""The error a user can mend: the command line prints it as one line and exits with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one line: what was given, what is accepted, what to do."""
