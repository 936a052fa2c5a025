"""Campaigns: programs that try to break a promise, thousands of times. ``python -m campaigns`` runs them all.

Each program ``r*.py`` has ``run(scale)``, which must find no failure, and ``bites()``, which puts something broken
on purpose through the same harness and must find some.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: bits agree for the same number of threads
