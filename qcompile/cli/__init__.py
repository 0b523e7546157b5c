"""The command line: `qcompile export | quantize | compare | analyze | study | tune | demo | doctor | show | inspect`,
and what there is to choose from: `qcompile formats | recipes`.

Any mistake of the user ends in one red line and exit code 2; `qcompile --debug ...` shows the traceback.
"""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from qcompile.cli.analyze import analyze_model
from qcompile.cli.compare import compare
from qcompile.cli.demo import demo
from qcompile.cli.doctor import doctor
from qcompile.cli.export import export
from qcompile.cli.inspect import inspect_folder
from qcompile.cli.quantize import quantize
from qcompile.cli.show import show
from qcompile.cli.study import study
from qcompile.cli.tables import formats, recipes
from qcompile.cli.tune import tune
from qcompile.errors import QcompileError

USER_ERROR = 2


class _Commands(TyperGroup):
    """The commands, with the user's mistakes turned into one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            cause = mistake(error)
            if cause is None or ctx.params.get("debug"):
                raise
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] [red]{escape(str(cause))}[/]")
            raise typer.Exit(USER_ERROR) from error


def mistake(error: BaseException) -> Exception | None:
    """The user's mistake behind an error, if it is one: torch.compile wraps what its backends raise."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, QcompileError | OSError):
            return cause
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qcompile {version('qcompile')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """A quantizing graph compiler for PyTorch: torch.compile(model, backend="qcompile")."""


app.command("analyze")(analyze_model)
app.command("inspect")(inspect_folder)
for command in (compare, demo, doctor, export, formats, quantize, recipes, show, tune):
    app.command()(command)
app.add_typer(study, name="study")
