"""Exit statuses of the command line, which users' scripts depend on."""

from __future__ import annotations

DONE = 0
CHECK_FAILED = 1  # what was asked to be checked does not hold: verify, explain, checkpoint inspect
USER_ERROR = 2
BUG = 70  # of ours, with a traceback
INTERRUPTED = 130  # as shells report SIGINT
TERMINATED = 143  # and SIGTERM
