"""The command line: what the commands are; each is imported when it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
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
COMMANDS = {
    "demo": ("demo:demo", "Train a small network on handwritten digits, in seconds."),
    "fit": ("table:fit", "Train a network on a table, from a file to a run folder."),
    "predict": ("table:predict", "Predict the target of a run of fit for new rows."),
    "eval": ("table:evaluate", "Measure a run of fit on a table with the target."),
    "train": ("train:train", "Train what a recipe plans: plan(...) in a Python file."),
    "resume": ("resume:resume", "Go on with an interrupted run, or train one further."),
    "check": ("check:check", "Look for the mistake in a recipe before it costs a night."),
    "explain": ("check:explain", "Say what a finding of check means."),
    "verify-resume": ("verify:verify_resume", "Prove that a recipe can be killed and resumed to the bit."),
    "tune-speed": ("tune:tune_speed", "Measure what would make a recipe train faster."),
    "profile": ("profile:profile", "Measure where the time of a recipe's updates goes."),
    "export": ("weights:export", "Write the weights of a run as one file."),
    "import-checkpoint": ("weights:import_checkpoint", "Begin a run folder with the weights of a .pt file."),
    "slurm": ("slurm:slurm", "Print a script for sbatch that trains a recipe."),
    "runs ls": ("runs:ls", "List the run folders in a folder."),
    "runs show": ("runs:show", "Show what a run did and what it left."),
    "config show": ("config:show", "Show the value of every flag, and where it is from."),
}
OF_RECIPES = ("train", "check", "verify-resume", "tune-speed", "profile")  # their flags are those of the recipe too
GROUPS = {"runs": "List run folders, or show one.", "config": "Show what a command would run with."}


def application(tokens: Sequence[str], *watchers: Callable, environment: bool = True) -> App:
    """The commands of ``epochal``, for these tokens: ``train RECIPE.py`` has the flags of that recipe.

    watchers: callables (app, commands, arguments) that see the arguments when every source has been read.
    environment: whether that is one of the sources.
    """
    from cyclopts import App, Parameter
    from cyclopts.config import Env

    from epochal.cli.options import read_file

    app = App(
        name="epochal",
        help=HELP,
        help_epilogue=EPILOGUE,
        version=epochal.__version__,
        config=(*([Env("EPOCHAL_", command=False, show=False)] if environment else []), read_file, *watchers),
        default_parameter=Parameter(negative_bool=(), negative_iterable=()),
        suppress_keyboard_interrupt=False,
    )
    groups = {"": app}
    for place, (words, (function, text)) in enumerate(COMMANDS.items()):
        group, _, name = words.rpartition(" ")
        if group not in groups:
            groups[group] = App(name=group, help=GROUPS[group], sort_key=place)
            app.command(groups[group])
        named = " ".join(tokens).startswith(words)  # whose help is its docstring; a list of commands needs a line
        command = _of_recipe(tokens, name, function) or f"epochal.cli.{function}"
        groups[group].command(command, name=name, help=None if named else text, sort_key=place)
    return app


def _of_recipe(tokens: Sequence[str], name: str, function: str) -> Callable | None:
    """The command of this name for a recipe, if the tokens are ``train RECIPE.py ...``; the help is its own then."""
    if name not in OF_RECIPES or tokens[:1] != [name] or len(tokens) < 2 or tokens[1].startswith("-"):
        return None
    from epochal.cli.train import command

    module, _, face = function.partition(":")
    home = import_module(f"epochal.cli.{module}")
    return command(Path(tokens[1]), getattr(home, face), home.carry_out, home.load)
