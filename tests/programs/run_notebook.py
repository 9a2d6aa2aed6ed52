"""Run the code cells of a notebook in one namespace, as Jupyter does, with a line replaced: NOTEBOOK LINE REPLACEMENT."""

import json
import sys
from pathlib import Path

notebook, line, replacement = sys.argv[1:]
cells = json.loads(Path(notebook).read_text("utf-8"))["cells"]
sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
if sum(source.splitlines().count(line) for source in sources) != 1:
    sys.exit(f"{notebook} does not have the line {line!r} once")
namespace = {"__name__": "__main__"}
for number, source in enumerate(sources, start=1):
    lines = [replacement if found == line else found for found in source.splitlines()]
    exec(compile("\n".join(lines), f"cell {number}", "exec"), namespace)
