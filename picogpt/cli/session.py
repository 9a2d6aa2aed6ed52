"""One start of a training run: from settings to the end of training."""

from __future__ import annotations

import platform
import shlex
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picogpt.cli.common import StopRequest, notice
from picogpt.cli.settings import Request
from picogpt.config import Budget, DataConfig, GPTConfig, Pace, RunSettings, Schedule, TrainConfig
from picogpt.errors import Interrupted, PicoGPTError, RunError

if TYPE_CHECKING:
    from picogpt.data import Source
    from picogpt.run import LossLog, RunFolder
    from picogpt.train import Trainer

__all__ = ["Origin", "Session"]

SAMPLE_CHARS = 160
"""Characters of the sample after each epoch."""


@dataclass(frozen=True)
class Origin:
    """What a run begins from."""

    path: Path
    config: GPTConfig
    weights: dict[str, Any]
    log: LossLog | None

    @classmethod
    def find(cls, request: Request) -> Origin | None:
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


class Session:
    """One start of a training run: settles what is still open, says it, and trains."""

    trainer: Trainer
    schedule: Schedule

    def __init__(
        self, run: RunFolder, source: Source, request: Request, stored: RunSettings | None, origin: Origin | None
    ) -> None:
        self.run, self._source, self.request, self._stored, self._origin = run, source, request, stored, origin

    def train(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> None:
        """Train to the end of the run, or until a signal; everything is saved either way.

        Raises:
            Interrupted: a signal ended it.
            PicoGPTError, OSError: something else did.
        """
        if self.request.fresh:
            self._set_aside()
        self.run.create()
        stop = StopRequest()
        with stop.listen(), self.run.lock():
            if self._stored is None and self.run.has_checkpoint():
                raise RunError(f"{self.run.path}: another process has begun this run meanwhile; start again to go on with it")
            self._prepare(model, config, budget, data)
            finished = self._fit(stop)
        if not finished:
            assert stop.signal_number is not None
            step = f"{self.trainer.step:,}"
            raise Interrupted(f"stopped and saved at step {step}; {self._command(data)} goes on from there", stop.signal_number)

    def _command(self, data: DataConfig) -> str:
        """What to type to go on."""
        logs = "" if self.request.logs_dir == Path("logs") else f" --logs-dir {shlex.quote(str(self.request.logs_dir))}"
        text = " --text -, with the same text," if "-" in data.text else ""
        return f"picogpt-train --run {self.run.name}{logs}{text}"

    def _set_aside(self) -> None:
        if self.run.path.exists():
            with self.run.lock():
                notice(f"the run that was there is kept as {self.run.set_aside()}")

    def _prepare(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> None:
        """Make the trainer, where it stood if the run goes on, and fix the number of steps."""
        from picogpt.device import choose_dtype, set_threads
        from picogpt.train import Trainer

        threads = set_threads(self.request.threads or (self._stored.threads if self._stored else None))
        dtype, reason = choose_dtype(self.request.dtype or (self._stored.dtype if self._stored else "auto"))
        dtype_name = str(dtype).removeprefix("torch.")
        self.trainer = Trainer(model, config, self._source, dtype)
        if self.run.has_checkpoint():
            self._restore(threads, dtype_name)
        else:
            self._begin()
        self.schedule = self._fix_schedule(budget)
        self.request.refuse_finished(self.schedule.total_steps, self.trainer.step)
        settings = RunSettings(
            model=model,
            train=config,
            budget=budget,
            schedule=self.schedule,
            data=data,
            dtype=dtype_name,
            threads=threads,
            origin=self._origin_path(),
        )
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}}
        self.run.write_config({**asdict(settings), "versions": versions})
        if self._origin is not None and self._origin.log is not None and not self.run.has_checkpoint():
            self._keep_imported(self._origin.log)
        self._announce(settings, reason)

    def _restore(self, threads: int, dtype: str) -> None:
        assert self._stored is not None
        checkpoint, fault = self.run.load_checkpoint()
        if fault:
            notice(f"warning: {fault}")
        self.trainer.restore(checkpoint)
        notice(f"{self.run.path}: goes on from step {self.trainer.step:,}")
        self._tell_usage()
        for name, before, now in (("threads", self._stored.threads, threads), ("dtype", self._stored.dtype, dtype)):
            if before != now:
                notice(f"{name} is {now} and was {before}: the run goes on, but not byte for byte as it would have")

    def _origin_path(self) -> str | None:
        if self._stored is not None:
            return self._stored.origin
        return None if self._origin is None else str(self._origin.path)

    def _begin(self) -> None:
        """Begin with the first batch, and with what the run begins from."""
        self._source.begin(self.run)
        if self._origin is not None:
            self.trainer.begin_from(self._origin.weights, self._origin.log)
            notice(f"begins with the weights of {self._origin.path}")

    def _keep_imported(self, log: LossLog) -> None:
        """Save an imported run as it came, with a best loss on this text, which is what later ones are compared with."""
        best = log.best_loss
        log.best_loss = self.trainer.validate(self.schedule.val_steps)
        self.run.save_model(self.trainer.model.arrays(), self.trainer.model.config)
        self.trainer.save(self.run)
        self.run.write_log(log)
        notice(
            f"brought over {log.iter_num:,} steps, best loss {best:.4f} there and {log.best_loss:.4f} on this text; training "
            "goes on with a new optimizer, as the original's was not connected to its weights"
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
        from picogpt.run import LossLog, RunFolder
        from picogpt.train import measure_seconds_per_step, seconds_of

        notice("timing a few steps")
        trainer = self.trainer
        steps = measure_seconds_per_step(trainer.model.config, trainer.config, trainer.dtype)
        scratch = RunFolder(self.run.path / ".pace")
        scratch.create()
        # Before the first step only the weights are saved; later the optimizer's two moments come with them.
        saving = seconds_of(lambda: trainer.save(scratch)) * (1 if trainer.step else 3)
        shutil.rmtree(scratch.path)
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
            f"{self.run.path}: {schedule.total_steps:,} steps of {train.batch_size} x {roll_len:,} characters, "
            f"{schedule.steps_per_epoch:,} an epoch; recipe {train.recipe}, learning rate {train.lr:g}, seed {train.seed}"
        )

    def _fit(self, stop: StopRequest) -> bool:
        """Train; False if a signal ended it."""
        from picogpt.cli.progress import TrainingDisplay

        if self.trainer.step >= self.schedule.total_steps and not self.trainer.epoch_is_open:
            notice(
                f"{self.run.path}: finished, all {self.schedule.total_steps:,} steps are done; give a larger --epochs, "
                "--minutes or --chars to go on, or --fresh to start over"
            )
            return True
        display = TrainingDisplay(self.run, self.schedule, self.trainer, self._sample)
        try:
            return self.trainer.fit(self.run, self.schedule, display, stop)
        finally:
            display.close()
            self._tell_usage()

    def _tell_usage(self) -> None:
        if summary := self._source.summary():
            notice(summary)

    def _sample(self) -> str:
        """A text that the model writes after a newline, the same draws every time."""
        from picogpt.config import GenerateConfig, SampleConfig
        from picogpt.engine import Engine
        from picogpt.generate import Roll, StopWatcher, generate, make_generator
        from picogpt.tokenizer import CharTokenizer

        tokenizer = CharTokenizer()
        try:
            engine = Engine(self.trainer.model.config, self.trainer.model.arrays())
        except PicoGPTError as error:
            return f"(no sample: {error})"
        roll = Roll(engine, GenerateConfig().hop_for(engine.config.context_len))
        logits = roll.read(tokenizer.encode("\n")[None])
        made = generate(
            roll, logits, SAMPLE_CHARS, config=SampleConfig(), generators=[make_generator(0)], watchers=[StopWatcher([])]
        )
        return "".join(tokenizer.decode(ids) for (ids,) in made)
