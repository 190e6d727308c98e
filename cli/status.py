"""Exit statuses of the command line, which users' scripts depend on."""

from __future__ import annotations

DONE = 0
CHECK_FAILED = 1  # of verify, explain, checkpoint inspect and others: the thing checked does not hold
USER_ERROR = 2
BUG = 70  # an error of moec itself, with a traceback
INTERRUPTED = 130  # as shells report SIGINT
TERMINATED = 143  # and SIGTERM
