"""Ratios against plain baselines, each pair measured in one run, taking turns; medians are printed.

python scripts/benchmark.py generate [--model RUN] [--profile native|laptop|both] [--dtypes TYPE...] [--threads N...] [--texts N]
python scripts/benchmark.py load --folder DIR
python scripts/benchmark.py train [--profile native|laptop|both] [--batch-size N] [--windows N]
python scripts/benchmark.py kernels [--batch-size N]
python scripts/benchmark.py ranks [--link RATE]
python scripts/benchmark.py learn --text FILE... | --folder DIR --loss X [--chars N] [--only fast|seed]
python scripts/benchmark.py page [--model RUN] [--rounds N]
python scripts/benchmark.py sweep --text FILE... | --folder DIR [--chars N] [--seeds N...] ARM...
python scripts/benchmark.py commands [--quick]
python scripts/benchmark.py measure PAGE.md [--sections NAME...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import commands, generate, kernels, learn, load, measure, page, ranks, sweep, train
from benchmarks.common import machine

COMPARISONS = {
    "generate": (generate.add_arguments, generate.generation, "the engine against a plain C loop and the plain way in torch"),
    "load": (load.add_arguments, load.loading, "a stream against the same batches from memory"),
    "train": (train.add_arguments, train.training, "the training loop against a plain one"),
    "kernels": (kernels.add_arguments, kernels.compare_kernels, "torch's functions against those in C"),
    "ranks": (ranks.add_arguments, ranks.compare_ranks, "several ranks against one"),
    "learn": (learn.add_arguments, learn.learning, "both recipes to the same loss"),
    "page": (page.add_arguments, page.page_speed, "the exported page in Chromium and Firefox"),
    "sweep": (sweep.add_arguments, sweep.sweep, "settings of the recipe compared at equal characters"),
    "commands": (commands.add_arguments, commands.compare_commands, "time and memory of whole commands"),
    "measure": (measure.add_arguments, measure.measure, "all figures of this machine on one page, about half an hour"),
}
"""What adds the flags of each comparison, what runs it, and its line in the help."""


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands_of = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, run, meaning) in COMPARISONS.items():
        command = commands_of.add_parser(name, help=meaning)
        add_arguments(command)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    print(machine())
    arguments.run(arguments)


if __name__ == "__main__":
    main()
