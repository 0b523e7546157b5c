"""`python -m qcompile.cli`: the command line, where the script `qcompile` is not on the path."""

from qcompile.cli import app

app(prog_name="qcompile")
