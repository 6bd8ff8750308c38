"""A live process that holds one implementation and times it when asked.

Reads JSON lines `{"problem": ..., "calls": n}` and answers `{"times": [...], "error": e}`: seconds
of each call, and the relative L2 error of one head against float64 (null for gradients).
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    # Before anything starts threads: pools take their size from the processors they may use.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    # A core type forced on OpenBLAS for other programs would not be this processor's best.
    os.environ.pop("OPENBLAS_CORETYPE", None)

    import numpy as np

    from benchmarks.implementations import make
    from benchmarks.problem import Problem

    # One thread: time of the processor, which other processes do not lengthen. More: wall clock.
    clock = time.process_time if threads == 1 else time.perf_counter
    made: dict[Problem, object] = {}
    for line in sys.stdin:
        request = json.loads(line)
        problem = Problem(**request["problem"])
        error = None
        if problem not in made:
            made.clear()
            run, head = make(name, problem, threads)
            result = run()
            if head is not None:
                exact = problem.exact_head()
                error = float(np.linalg.norm(head(result) - exact) / np.linalg.norm(exact))
            made[problem] = run
        run = made[problem]
        run()
        times = []
        for _ in range(request["calls"]):
            start = clock()
            run()
            times.append(clock() - start)
        print("@" + json.dumps({"times": times, "error": error}), flush=True)


if __name__ == "__main__":
    main()
