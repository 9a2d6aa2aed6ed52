"""Run a command, and fail if it has imported one of the modules that are named: MODULE,... COMMAND FLAG..."""

import sys
from importlib import import_module

modules, command, *flags = sys.argv[1:]
try:
    code = import_module(f"picogpt.cli.{command}").main(flags)
except SystemExit as end:  # --help, --version and wrong flags
    code = end.code
if imported := set(modules.split(",")) & set(sys.modules):
    sys.exit(f"imported {imported}")
sys.exit(code)
