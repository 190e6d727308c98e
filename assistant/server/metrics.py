"""Metrics of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS = {
    "moec_requests_total": "Requests answered, by path and HTTP status.",
    "moec_prompt_tokens_total": "Tokens of prompts.",
    "moec_reused_tokens_total": "Tokens of prompts that a session already held.",
    "moec_generated_tokens_total": "Tokens of answers.",
    "moec_cancelled_total": "Requests whose client left.",
    "moec_answer_seconds_sum": "Time from request to last token.",
    "moec_answer_seconds_count": "Answers in moec_answer_seconds_sum.",
    "moec_first_token_seconds_sum": "Time from request to first token.",
    "moec_first_token_seconds_count": "Answers in moec_first_token_seconds_sum.",
}


class Metrics:
    """Counters, and gauges: name -> (help, function), called whenever the text is made."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges = dict(gauges)
        self._values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        text = ",".join(f'{key}="{label}"' for key, label in sorted(labels.items()))
        with self._lock:
            self._values[name][f"{{{text}}}" if text else ""] += value

    def text(self) -> str:
        lines = []
        with self._lock:
            for name, help in _COUNTERS.items():
                lines += [f"# HELP {name} {help}", f"# TYPE {name} counter"]
                values = self._values.get(name) or ({} if name == "moec_requests_total" else {"": 0.0})
                lines += [f"{name}{labels} {value:.10g}" for labels, value in sorted(values.items())]
        for name, (help, read) in self._gauges.items():
            lines += [f"# HELP {name} {help}", f"# TYPE {name} gauge", f"{name} {read():.10g}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> float:
    """Resident memory of this process; its peak on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)
