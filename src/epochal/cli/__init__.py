"""The command line: what the commands are; each is imported when it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import epochal

if TYPE_CHECKING:
    from cyclopts import App

HELP = "The complete training loop for PyTorch."
EPILOGUE = """\
A flag --some-flag can also be given as EPOCHAL_SOME_FLAG in the environment, or as a line in the file of --config:
some-flag = "value". The command line counts first, then the environment, then the file. With --traceback, an error
shows how it came about."""


def application(tokens: Sequence[str], *watchers: Callable) -> App:
    """The commands of ``epochal``, for these tokens: ``train RECIPE.py`` has the flags of that recipe.

    watchers: callables (app, commands, arguments) that see the arguments when every source has been read.
    """
    from cyclopts import App, Parameter
    from cyclopts.config import Env

    from epochal.cli.options import read_file

    app = App(
        name="epochal",
        help=HELP,
        help_epilogue=EPILOGUE,
        version=epochal.__version__,
        config=(Env("EPOCHAL_", command=False, show=False), read_file, *watchers),
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
    )
    app.command("epochal.cli.demo:demo", name="demo", help="Train a small network on handwritten digits, in seconds.")
    app.command("epochal.cli.table:fit", name="fit", help="Train a network on a table, from a file to a run folder.")
    app.command("epochal.cli.table:predict", name="predict", help="Predict the target of a run of fit for new rows.")
    app.command("epochal.cli.table:evaluate", name="eval", help="Measure a run of fit on a table with the target.")
    app.command(_train(tokens), name="train", help="Train what a recipe plans: plan(...) in a Python file.")
    runs = App(name="runs", help="List run folders, and show one.")
    runs.command("epochal.cli.runs:ls", name="ls", help="List the run folders in a folder.")
    runs.command("epochal.cli.runs:show", name="show", help="Show what a run did and what it left.")
    app.command(runs)
    config = App(name="config", help="Show what a command would run with.")
    config.command("epochal.cli.config:show", name="show", help="Show the value of every flag, and where it is from.")
    app.command(config)
    return app


def _train(tokens: Sequence[str]) -> str | Callable:
    if len(tokens) < 2 or tokens[0] != "train" or tokens[1].startswith("-"):
        return "epochal.cli.train:train"
    from epochal.cli.train import command

    return command(Path(tokens[1]))
