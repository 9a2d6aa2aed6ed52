"""`picogpt-train`: learn from a text, watch the curve."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picogpt.cli.common import Parser, StopRequest, notice, run_command
from picogpt.cli.settings import MODEL_FLAGS, TRAIN_FLAGS, Request
from picogpt.config import RECIPES, Budget, DataConfig, GPTConfig, Pace, RunSettings, Schedule, TrainConfig
from picogpt.errors import Interrupted, RunError

if TYPE_CHECKING:
    from picogpt.data import Corpus, TextSource
    from picogpt.run import LossLog, RunFolder
    from picogpt.train import Trainer

__all__ = ["build_parser", "main"]

SAMPLE_CHARS = 160
"""Characters of the sample after each epoch."""


def build_parser() -> Parser:
    """The parser. Flags that were not given are None, so that a run that goes on keeps its own settings."""
    parser = Parser(
        "picogpt-train",
        "Train a character GPT. A run that exists goes on where it stopped; Ctrl-C saves and ends it.",
        "Results go to stdout, progress to stderr; the run is kept in LOGS_DIR/RUN.",
    )
    text = parser.add_argument_group("text").add_mutually_exclusive_group()
    text.add_argument(
        "--dataset",
        metavar="NAME",
        help="auto (Tiny Shakespeare if it is there or can be had within seconds, else sample), sample (a play that comes "
        "with picogpt), or tinyshakespeare (default: auto)",
    )
    text.add_argument("--text", metavar="PATH", nargs="+", help="your own text instead: files, folders of .txt, or - for stdin")
    run = parser.add_argument_group("run")
    run.add_argument("--run", metavar="NAME", help="folder under the logs folder (default: the text's name)")
    run.add_argument("--logs-dir", metavar="DIR", type=Path, default=Path("logs"), help="where runs are kept (default: logs)")
    run.add_argument("--fresh", action="store_true", help="start over; the old folder is kept under a new name")
    begin = run.add_mutually_exclusive_group()
    begin.add_argument("--init-from", metavar="RUN", help="begin with another run's best weights (default: none)")
    begin.add_argument(
        "--import-original", metavar="FILE", type=Path, help="begin with a log.pkl of the original project (default: none)"
    )
    _add_budget(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe", metavar="NAME", help=f"{' or '.join(RECIPES)} (the original's settings) (default: fast)")
    for name, (kind, meaning) in TRAIN_FLAGS.items():
        _add(recipe, name, kind, f"{meaning} ({_recipe_default(name)})")
    model = parser.add_argument_group("model (PicoGPT's shape by default)")
    for name, (kind, meaning) in MODEL_FLAGS.items():
        _add(model, name, kind, f"{meaning} (default: {getattr(GPTConfig(), name)})")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", metavar="N", type=int, help="threads to compute with (default: one a core)")
    machine.add_argument(
        "--dtype",
        metavar="TYPE",
        help="type of the matrix products: float32, bfloat16, or auto, whichever a short timing finds faster (default: auto)",
    )
    return parser


def _add_budget(parser: Parser) -> None:
    group = parser.add_argument_group("length")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", metavar="N", type=int, help=f"epochs (default: {Budget().epochs})")
    length.add_argument("--minutes", metavar="M", type=float, help="train for about so many minutes instead (default: none)")
    length.add_argument("--chars", metavar="N", type=int, help="train on so many characters instead (default: none)")
    _add(group, "steps_per_epoch", int, "steps an epoch (default: 500; with --minutes or --chars a twentieth of the run)")
    _add(
        group, "val_steps", int, "validation batches an epoch, at most all of the validation text (default: a fifth of the steps)"
    )


def _add(group: argparse._ArgumentGroup, name: str, kind: Callable[[str], Any], meaning: str) -> None:
    metavar = {int: "N", float: "X", str: "NAME"}[kind]  # type: ignore[index]
    group.add_argument("--" + name.replace("_", "-"), metavar=metavar, type=kind, help=meaning)


def _recipe_default(name: str) -> str:
    fast, seed = (getattr(TrainConfig.from_recipe(recipe, {}), name) for recipe in RECIPES)
    return f"default: {fast}" if fast == seed else f"default: {fast}; recipe seed: {seed}"


def main(argv: list[str] | None = None) -> int:
    """Run the command on `argv` (None: the process's own arguments) and return its exit code."""
    return run_command(_train, build_parser(), argv)


def _train(arguments: argparse.Namespace) -> int:
    request = Request.from_flags(arguments)
    run, stored, corpus = _locate(request)
    data = _describe(corpus, request, stored)
    request.refuse_changes(stored, data)
    origin = None if stored else _Origin.find(request)
    model, config, budget = (
        request.model(stored, origin.config if origin else None),
        request.train(stored),
        request.budget(stored),
    )
    source = _source(corpus, model, config)
    notice(
        f"{corpus.name}: {len(corpus.ids):,} characters, {len(source.train_ids):,} to train on and {len(source.val_ids):,} to "
        f"validate; {corpus.describe_unknown()}"
    )
    if request.fresh:
        _set_aside(run)
    run.create()
    stop = StopRequest()
    with stop.listen(), run.lock():
        session = _Session(run, source, request, stored, origin)
        session.prepare(model, config, budget, data)
        finished = session.fit(stop)
    if not finished:
        assert stop.signal_number is not None
        raise Interrupted(
            f"stopped and saved at step {session.trainer.step:,}; the same command goes on from there", stop.signal_number
        )
    return 0


def _locate(request: Request) -> tuple[RunFolder, RunSettings | None, Corpus]:
    """The run's folder, what is stored of it, and the text: the name of either can follow from the other."""
    from picogpt.run import RunFolder

    if request.run is not None:
        run = RunFolder(request.logs_dir / request.run)
        stored = _stored(run, request)
        return run, stored, _load_corpus(request, stored)
    corpus = _load_corpus(request, None)
    run = RunFolder(request.logs_dir / corpus.name)
    return run, _stored(run, request), corpus


def _stored(run: RunFolder, request: Request) -> RunSettings | None:
    """The settings of the run that is to go on, or None where one begins."""
    if request.fresh:
        return None
    if run.has_checkpoint():
        stored = RunSettings.from_dict(run.read_config())
        request.refuse_other_origin(run.name, stored)
        return stored
    if run.has_model():
        raise RunError(
            f"{run.path}: a trained model without a checkpoint to go on from; choose another --run, or --fresh to start over"
        )
    return None


def _load_corpus(request: Request, stored: RunSettings | None) -> Corpus:
    from picogpt.cli.download import DownloadBar
    from picogpt.data import load_dataset, read_texts

    text, dataset = request.text, request.dataset
    if not text and dataset is None and stored is not None:
        text, dataset = stored.data.text, stored.data.dataset
    if text:
        return read_texts(text, name=request.text_name(text))
    return load_dataset(dataset or "auto", notify=notice, progress=DownloadBar("Tiny Shakespeare"))


def _describe(corpus: Corpus, request: Request, stored: RunSettings | None) -> DataConfig:
    text = request.text or (stored.data.text if stored and request.dataset is None else ())
    return DataConfig(
        dataset=None if text else corpus.name,
        text=text,
        name=corpus.name,
        characters=len(corpus.ids),
        sha256=corpus.fingerprint,
    )


def _source(corpus: Corpus, model: GPTConfig, config: TrainConfig) -> TextSource:
    from picogpt.data import TextSource

    roll_len = config.windows * model.context_len
    return TextSource(corpus, roll_len=roll_len, batch_size=config.batch_size, seed=config.seed)


def _set_aside(run: RunFolder) -> None:
    if run.path.exists():
        with run.lock():
            notice(f"the run that was there is kept as {run.set_aside()}")


@dataclass(frozen=True)
class _Origin:
    """What a run begins from."""

    path: Path
    config: GPTConfig
    weights: dict[str, Any]
    log: LossLog | None

    @classmethod
    def find(cls, request: Request) -> _Origin | None:
        """Read what the flags name.

        Raises:
            RunError: it is missing, damaged or of another kind.
        """
        from picogpt.original import read_original
        from picogpt.run import find_model, load_model

        if request.init_from is not None:
            path, _ = find_model(request.init_from, request.logs_dir)
            config, weights = load_model(path)
            return cls(path.absolute(), config, weights, None)
        if request.import_original is not None:
            original = read_original(request.import_original, request.given.get("n_head", GPTConfig().n_head))
            return cls(request.import_original.absolute(), original.config, original.weights, original.log)
        return None


class _Session:
    """One start of a training run: settles what is still open, says it, and trains."""

    trainer: Trainer
    schedule: Schedule

    def __init__(
        self, run: RunFolder, source: TextSource, request: Request, stored: RunSettings | None, origin: _Origin | None
    ) -> None:
        self._run, self._source, self._request, self._stored, self._origin = run, source, request, stored, origin

    def prepare(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> None:
        """Make the trainer, where it stood if the run goes on, and fix the number of steps."""
        from picogpt.device import choose_dtype, set_threads
        from picogpt.train import Trainer

        threads = set_threads(self._request.threads or (self._stored.threads if self._stored else None))
        dtype, reason = choose_dtype(self._request.dtype or (self._stored.dtype if self._stored else "auto"))
        self.trainer = Trainer(model, config, self._source, dtype)
        if self._stored is not None:
            self._restore(threads, str(dtype).removeprefix("torch."))
        elif self._origin is not None:
            self._begin()
        self.schedule = self._fix_schedule(budget)
        settings = RunSettings(
            model=model,
            train=config,
            budget=budget,
            schedule=self.schedule,
            data=data,
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            origin=self._origin_path(),
        )
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}}
        self._run.write_config({**asdict(settings), "versions": versions})
        self._announce(settings, reason)

    def _restore(self, threads: int, dtype: str) -> None:
        assert self._stored is not None
        checkpoint, fault = self._run.load_checkpoint()
        if fault:
            notice(f"warning: {fault}")
        self.trainer.restore(checkpoint)
        notice(f"{self._run.path}: goes on from step {self.trainer.step:,}")
        for name, before, now in (("threads", self._stored.threads, threads), ("dtype", self._stored.dtype, dtype)):
            if before != now:
                notice(f"{name} is {now} and was {before}: the run goes on, but not byte for byte as it would have")

    def _origin_path(self) -> str | None:
        if self._stored is not None:
            return self._stored.origin
        return None if self._origin is None else str(self._origin.path)

    def _begin(self) -> None:
        """Take over what the run begins from; of an imported run the best weights are kept as they came."""
        assert self._origin is not None
        origin, trainer = self._origin, self.trainer
        trainer.begin_from(origin.weights, origin.log)
        if origin.log is None:
            notice(f"begins with the weights of {origin.path}")
            return
        self._run.save_model(trainer.model.arrays(), origin.config)
        trainer.save(self._run)
        self._run.write_log(origin.log)
        notice(
            f"{origin.path}: brought over {origin.log.iter_num:,} steps, best loss {origin.log.best_loss:.4f}; training goes on "
            "with a new optimizer, as the original's was not connected to its weights"
        )

    def _fix_schedule(self, budget: Budget) -> Schedule:
        trainer = self.trainer
        if self._stored is not None and budget == self._stored.budget:
            return self._stored.schedule
        pace = self._measure_pace() if budget.minutes is not None else None
        return budget.schedule(chars_per_step=trainer.chars_per_step, pace=pace, steps_done=trainer.step)

    def _measure_pace(self) -> Pace:
        """Time a few steps on a model that is thrown away, and one end of an epoch."""
        from picogpt.plot import draw_losses
        from picogpt.run import LossLog
        from picogpt.train import measure_seconds_per_step, seconds_of

        notice("timing a few steps")
        trainer = self.trainer
        steps = measure_seconds_per_step(trainer.model.config, trainer.config, self._source, trainer.dtype)
        # Before the first step only the weights are saved; later the optimizer's two moments come with them.
        saving = seconds_of(lambda: trainer.save(self._run)) * (1 if trainer.step else 3)
        showing = seconds_of(self._sample) + seconds_of(lambda: draw_losses({"pace": LossLog(train=[1.0], val=[1.0])}))
        return Pace(seconds_per_step=steps, seconds_per_epoch_end=saving + showing, seconds_spent=trainer.seconds)

    def _announce(self, settings: RunSettings, dtype_reason: str) -> None:
        model, train, schedule = settings.model, settings.train, settings.schedule
        notice(
            f"model: {self.trainer.model.num_params():,} parameters; {model.n_layer} layers, {model.n_head} heads, width "
            f"{model.n_embd}, windows of {model.context_len}"
        )
        notice(f"computing in {settings.dtype} ({dtype_reason}) with {settings.threads} threads")
        roll_len = train.windows * model.context_len
        notice(
            f"{self._run.path}: {schedule.total_steps:,} steps of {train.batch_size} x {roll_len:,} characters, "
            f"{schedule.steps_per_epoch:,} an epoch; recipe {train.recipe}, learning rate {train.lr:g}, seed {train.seed}"
        )

    def fit(self, stop: StopRequest) -> bool:
        """Train; False if a signal ended it."""
        from picogpt.cli.progress import TrainingDisplay

        if self.trainer.step >= self.schedule.total_steps and not self.trainer.epoch_is_open:
            notice(
                f"{self._run.path}: finished, all {self.schedule.total_steps:,} steps are done; give a larger --epochs, "
                "--minutes or --chars to go on, or --fresh to start over"
            )
            return True
        display = TrainingDisplay(self._run, self.schedule, self.trainer, self._sample)
        try:
            return self.trainer.fit(self._run, self.schedule, display, stop)
        finally:
            display.close()

    def _sample(self) -> str:
        """A text that the model writes after a newline, the same draws every time."""
        from picogpt.config import GenerateConfig, SampleConfig
        from picogpt.engine import Engine
        from picogpt.generate import Roll, StopWatcher, generate, make_generator
        from picogpt.tokenizer import CharTokenizer

        tokenizer = CharTokenizer()
        engine = Engine(self.trainer.model.config, self.trainer.model.arrays())
        roll = Roll(engine, GenerateConfig().hop_for(engine.config.context_len))
        logits = roll.read(tokenizer.encode("\n")[None])
        made = generate(
            roll, logits, SAMPLE_CHARS, config=SampleConfig(), generators=[make_generator(0)], watchers=[StopWatcher([])]
        )
        return "".join(tokenizer.decode(ids) for (ids,) in made)


if __name__ == "__main__":
    sys.exit(main())
