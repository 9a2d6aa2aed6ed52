"""Makes a run small enough to be given away: what made it, its log and curve, and its best weights in bfloat16.

    python scripts/pack_model.py RUN FOLDER

Takes the run's folder and makes FOLDER, which must not exist yet. No checkpoint comes along, so nothing can go on with it but
`picogpt-train --init-from`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save

from picogpt.files import atomic_write
from picogpt.plot import draw_losses
from picogpt.runs.folder import MODEL_FILE, RunFolder, load_model, load_text_config, model_metadata
from picogpt.runs.settings import RunSettings


def pack(source: RunFolder, target: RunFolder) -> None:
    """Make `target` from the run `source`.

    Raises:
        RunError: something of the run is missing or damaged.
        ConfigError: its settings are not valid.
        OSError: `target` exists, or cannot be written.
    """
    content, log = source.read_config(), source.read_log()
    RunSettings.from_dict(content)
    config, weights = load_model(source.path / MODEL_FILE)
    rounded = {name: torch.from_numpy(array).bfloat16() for name, array in weights.items()}
    target.path.mkdir(parents=True)
    text = load_text_config(source.path / MODEL_FILE)
    atomic_write(target.path / MODEL_FILE, save(rounded, model_metadata(config, text)))
    target.write_config(content)
    target.write_log(log)
    atomic_write(target.plot_path, draw_losses({target.name: log}))


def main() -> None:
    """Pack what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    pack(RunFolder(arguments.run), RunFolder(arguments.folder))


if __name__ == "__main__":
    main()
