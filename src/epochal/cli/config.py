"""``epochal config show``: what a command would run with, and where each value comes from."""

from __future__ import annotations

import json as text
from typing import Annotated, Any

from cyclopts import MissingArgumentError, Parameter

from epochal.cli import application
from epochal.cli.options import Json

TRAINING = ("demo", "fit", "train")
Command = Annotated[str, Parameter(allow_leading_hyphen=True, help="A command, with any flags; else all that train.")]


def show(*command: Command, json: Json = False) -> None:
    """Show the value of every flag, and where it is from.

    Nothing is run: epochal config show fit --epochs 5 --config my.toml
    """
    shown = {line[0]: _flags(line) for line in ([list(command)] if command else [[name] for name in TRAINING])}
    if json:
        print(text.dumps(shown, indent=1, default=str))
        return
    for name, flags in shown.items():
        lines = [
            (f"epochal {name}", "", ""),
            *((f"  --{flag}", *map(str, one.values())) for flag, one in flags.items()),
        ]
        for line in lines:
            print(f"{line[0]:<14}  {line[1]:<20}  {line[2]}".rstrip())


def _flags(tokens: list[str]) -> dict[str, dict[str, Any]]:
    """Name of a flag -> its value and its source."""
    seen: list[Any] = []
    try:
        application(tokens, lambda app, commands, arguments: seen.extend(arguments)).parse_args(
            tokens, exit_on_error=False, print_error=False
        )
    except MissingArgumentError as error:
        if error.unused_tokens:
            raise
    flags = [argument for argument in seen if argument.name.startswith("--") and argument.show]
    return {flag.name[2:]: {"value": _value(flag), "from": _source(flag)} for flag in flags}


def _value(argument: Any) -> Any:
    if argument.has_tokens:
        return argument.convert()
    default = argument.field_info.default
    return None if default is argument.field_info.empty else default


def _source(argument: Any) -> str:
    if not argument.tokens:
        return "missing" if argument.required else "default"
    token = argument.tokens[0]
    return {"cli": "command line", "env": token.keyword}.get(token.source, token.source)
