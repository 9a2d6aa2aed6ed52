"""picogpt-train with constants of modules changed: MODULE.NAME=VALUE... FLAG..."""

import sys
from importlib import import_module
from itertools import takewhile

from picogpt.cli.train import command

changes = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
del sys.argv[1 : 1 + len(changes)]
for change in changes:
    place, _, value = change.partition("=")
    module_name, _, name = place.rpartition(".")
    module = import_module(module_name)
    setattr(module, name, type(getattr(module, name))(value))
command()
