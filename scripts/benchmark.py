"""Ratios against plain baselines, each pair measured in one run, taking turns; medians are printed.

python scripts/benchmark.py generate [--model RUN] [--profile native|laptop|both] [--dtypes TYPE...] [--threads N...] [--texts N]
python scripts/benchmark.py load --folder DIR
python scripts/benchmark.py train [--profile native|laptop|both] [--batch-size N]
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

from benchmarks.commands import add_arguments as add_commands_arguments
from benchmarks.commands import compare_commands
from benchmarks.common import machine
from benchmarks.generate import add_arguments as add_generate_arguments
from benchmarks.generate import generation
from benchmarks.kernels import add_arguments as add_kernels_arguments
from benchmarks.kernels import compare_kernels
from benchmarks.learn import add_arguments as add_learn_arguments
from benchmarks.learn import learning
from benchmarks.load import loading
from benchmarks.measure import add_arguments as add_measure_arguments
from benchmarks.measure import measure
from benchmarks.page import add_arguments as add_page_arguments
from benchmarks.page import page_speed
from benchmarks.ranks import add_arguments as add_ranks_arguments
from benchmarks.ranks import compare_ranks
from benchmarks.sweep import add_arguments as add_sweep_arguments
from benchmarks.sweep import sweep
from benchmarks.train import add_arguments as add_train_arguments
from benchmarks.train import training


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    generate_parser = commands.add_parser("generate", help="the engine against a plain C loop and the plain way in torch")
    add_generate_arguments(generate_parser)
    generate_parser.set_defaults(run=generation)
    load_parser = commands.add_parser("load", help="a stream against the same batches from memory")
    load_parser.add_argument("--folder", metavar="DIR", type=Path, required=True, help="a data set laid out like the hub's")
    load_parser.set_defaults(run=loading)
    train_parser = commands.add_parser("train", help="the training loop against a plain one")
    add_train_arguments(train_parser)
    train_parser.set_defaults(run=training)
    kernels_parser = commands.add_parser("kernels", help="torch's functions against those in C")
    add_kernels_arguments(kernels_parser)
    kernels_parser.set_defaults(run=compare_kernels)
    ranks_parser = commands.add_parser("ranks", help="several ranks against one")
    add_ranks_arguments(ranks_parser)
    ranks_parser.set_defaults(run=compare_ranks)
    learn_parser = commands.add_parser("learn", help="both recipes to the same loss")
    add_learn_arguments(learn_parser)
    learn_parser.set_defaults(run=learning)
    page_parser = commands.add_parser("page", help="the exported page in Chromium and Firefox")
    add_page_arguments(page_parser)
    page_parser.set_defaults(run=page_speed)
    sweep_parser = commands.add_parser("sweep", help="settings of the recipe compared at equal characters")
    add_sweep_arguments(sweep_parser)
    sweep_parser.set_defaults(run=sweep)
    commands_parser = commands.add_parser("commands", help="time and memory of whole commands")
    add_commands_arguments(commands_parser)
    commands_parser.set_defaults(run=compare_commands)
    measure_parser = commands.add_parser("measure", help="all figures of this machine on one page, about 40 minutes")
    add_measure_arguments(measure_parser)
    measure_parser.set_defaults(run=measure)
    arguments = parser.parse_args()
    print(machine())
    arguments.run(arguments)


if __name__ == "__main__":
    main()
