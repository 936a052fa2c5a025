"""``epochal slurm RECIPE.py``: a script for sbatch that trains on many machines, and goes on when it was cut off."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from epochal.cli import application
from epochal.errors import PlanError

AT_LEAST_1 = validators.Number(gte=1)
WARNING = 120  # seconds before the end of its time in which a run can save
# A process that is lost the others find themselves; when all end by a signal, none may be killed before it has said so.
# SLURM starts a job again by itself when it was preempted or a machine failed. When its time is up it does not.
SCRIPT = """\
#!/bin/bash
{directives}

# Without it, SLURM kills a task that still says why it ends.
srun --kill-on-bad-exit=0 {command} --run {run}"$SLURM_JOB_ID" --resume
code=$?
{requeue}exit "$code"
"""
REQUEUE = """\
if [ "$code" -eq 138 ]; then  # its time was up, and a checkpoint is saved: it goes on in another turn
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


def _is_time(kind: type, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", value):
        raise ValueError("sbatch takes minutes, 4:00:00 or 2-12:00:00.")


def slurm(
    recipe: Annotated[Path, Parameter(help="A Python file with plan(...) -> epochal.Plan.")],
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True, help="Flags of epochal train for this recipe.")],
    nodes: Annotated[int, Parameter(help="How many machines.", validator=AT_LEAST_1)] = 1,
    processes: Annotated[int, Parameter(help="How many processes on each.", validator=AT_LEAST_1)] = 1,
    gpus_per_task: Annotated[int | None, Parameter(help="GPUs of each process.", validator=AT_LEAST_1)] = None,
    time: Annotated[
        str | None, Parameter(help="At most so long a turn, as sbatch takes it: 4:00:00.", validator=_is_time)
    ] = None,
    requeue: Annotated[bool, Parameter(help="Go on in another turn when the time is up.")] = False,
) -> None:
    """Print a script for sbatch that trains a recipe.

    epochal slurm recipe.py --nodes 2 --processes 4 --time 4:00:00 --requeue --lr 0.01 > job.sh; sbatch job.sh

    Two minutes before its time is up, the run saves a checkpoint. The run folder is runs/NAME-JOB, where sbatch is
    called. sbatch itself takes whatever else the cluster asks for: sbatch --partition=long job.sh.
    """
    tokens = ["train", str(recipe), *flags]
    application(tokens, environment=False).parse_args(tokens, exit_on_error=False, print_error=False)
    if taken := [flag for flag in flags if flag.partition("=")[0] in ("--run", "--resume")]:
        what = f"{taken[0]} is chosen by the script, which has to find the run again."
        raise PlanError(what, where="epochal slurm", fix="leave it out")
    name = re.sub(r"[^\w.-]", "-", recipe.stem)  # sbatch splits what it reads
    wanted = {
        "job-name": name, "nodes": nodes, "ntasks-per-node": processes, "gpus-per-task": gpus_per_task,
        "time": time, "signal": f"USR1@{WARNING}", "open-mode": "append",
    }  # fmt: skip
    directives = [f"#SBATCH --{name}={value}" for name, value in wanted.items() if value is not None]
    directives.append("#SBATCH --requeue" if requeue else "#SBATCH --no-requeue")
    command = shlex.join([sys.executable, "-P", "-m", "epochal", "train", str(recipe.absolute()), *flags])
    run, again = shlex.quote(f"runs/{recipe.stem}-"), REQUEUE if requeue else ""
    print(SCRIPT.format(directives="\n".join(directives), command=command, run=run, requeue=again), end="")
