"""Run a command of the package that lies in a folder, and fail if it is another one: FOLDER COMMAND FLAG..."""

import sys
from importlib import import_module
from pathlib import Path

folder, command, *flags = sys.argv[1:]
sys.path.insert(0, folder)
main = import_module(f"picogpt.cli.{command}").main
assert Path(folder) in Path(str(sys.modules["picogpt"].__file__)).parents
sys.exit(main(flags))
