"""The search of `powerplan recommend`: at least 5,000 candidates, compared and ranked, median of ten (target 1 s).

Usage: python benchmarks/recommend.py [RESULT.json]
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version

from powerplan.accounting import Accounting
from powerplan.load import catalogue_spec
from powerplan.search import Recommendation, Request, recommend
from powerplan.version import __version__
from support.files import print_result

MODELS = ("llama-3-8b", "deepseek-v3")
CONTEXT, CANDIDATES, TARGET_S = 131_072, 5000, 1.0


def wrong(answer: Recommendation) -> str | None:
    """Return what is wrong with an answer, None where every number equals that of the model it stands for."""
    if answer.searched < CANDIDATES:
        return f"only {answer.searched:,} candidates"
    for candidate in answer.candidates:
        if Accounting(candidate.spec).row(CONTEXT) != candidate.row:
            return f"{candidate.label}: not the numbers of its model"
    ratio = answer.recommended.row.wsfr
    return None if ratio is not None and 19 / 20 <= ratio <= 20 / 19 else f"{answer.recommended.label} does not balance"


def measured(name: str) -> dict[str, object] | None:
    """Return the times of one model, or None where the answer is wrong."""
    spec, request = catalogue_spec(name), Request(contexts=[CONTEXT])
    answer = recommend(spec, request)
    if problem := wrong(answer):
        print(f"{name}: {problem}, so nothing is timed", file=sys.stderr)
        return None
    times = []
    for _ in range(10):
        start = time.perf_counter()
        again = recommend(spec, request)
        times.append(time.perf_counter() - start)
        assert [item.mixer for item in again.candidates] == [item.mixer for item in answer.candidates]
    return {
        "model": name,
        "context": CONTEXT,
        "candidates": answer.searched,
        "recommended": answer.recommended.label,
        "seconds": [round(value, 4) for value in sorted(times)],
        "median_s": round(statistics.median(times), 4),
    }


def main() -> int:
    results = [measured(name) for name in MODELS]
    if not all(results):
        return 1
    result = {
        "schema": "powerplan.recommend-benchmark/1",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"powerplan": __version__, "msgspec": version("msgspec")},
        "results": results,
        "target_s": TARGET_S,
    }
    print_result(result, next(iter(sys.argv[1:]), None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
