"""The commands as a user meets them: real processes for what only those have, `main(argv)` for the rest."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from picogpt.cli import common, export, generate, plot, train
from picogpt.cli import eval as evaluation
from picogpt.cli.bar import DownloadBar
from picogpt.cli.parser import Parser
from picogpt.data import read_texts
from picogpt.data.resolve import text_name
from picogpt.errors import Interrupted, PicoGPTError
from picogpt.inference.decoder import RollingDecoder
from picogpt.kernels.compiled import Kernels
from picogpt.runs import find
from picogpt.runs.folder import RunFolder
from picogpt.schedule import Schedule
from picogpt.signals import StopRequest, deferred_interrupt
from picogpt.threads import choose_threads
from picogpt.tokenizer import CharTokenizer
from picogpt.training.trainer import Trainer
from tests.conftest import TINY_FLAGS, Terminal, needs_compiler, type_lines
from tests.programs import kill_at_exit, program

RUN = [sys.executable, "-m", "picogpt.cli.train"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts in an empty folder, like a newcomer, and without the models that come with a clone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "PRETRAINED", tmp_path / "clone" / "logs")


class DeadStream(io.StringIO):
    """A stream whose reader has gone, or whose disk is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def training(text: Path, *flags: str) -> list[str]:
    """Arguments of a run that takes a moment."""
    return ["--text", str(text), *TINY_FLAGS, "--epochs", "2", "--steps-per-epoch", "3", "--val-steps", "2", *flags]


class TestTrain:
    def test_a_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Results on stdout, notices on stderr, and the run's folder as documented."""
        assert train.main(training(text_file)) == 0
        out, err = capsys.readouterr()

        line = r"^epoch \d of 2, [\d.]+ passes over the text: train \d\.\d{4}, val \d\.\d{4} nats per character"
        assert len(re.findall(line, out, re.M)) == 2
        assert "6,000 characters, 5,400 to train on and 600 to validate; every character known" in err
        assert "computing in float32" in err
        names = {path.name for path in Path("logs/numbers").iterdir()}
        assert names == {
            ".lock",
            "config.json",
            "model.safetensors",
            "checkpoint.safetensors",
            "checkpoint.previous.safetensors",
            "log.csv",
            "log.pkl",
            "log.jpg",
            "log.html",
            "epochs.json",
        }
        config = json.loads(Path("logs/numbers/config.json").read_text())
        assert config["model"]["n_embd"] == 16
        assert Schedule(**config["schedule"]) == Schedule(total_steps=6, steps_per_epoch=3, val_steps=2)
        assert set(config["versions"]) == {"python", "torch", "numpy", "safetensors"}

    def test_goes_on(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A second start with a larger budget goes on, without repeating the run's settings; a third has nothing to do."""
        train.main(training(text_file))
        assert train.main(["--run", "numbers", "--epochs", "3"]) == 0
        assert "logs/numbers: resuming from step 6" in capsys.readouterr().err
        assert RunFolder(Path("logs/numbers")).read_log().iter_num == 9

        for dry in ([], ["--dry-run"]):
            assert train.main(["--run", "numbers", *dry]) == 0
            err = capsys.readouterr().err
            assert "finished, all 9 steps are done; give a larger --epochs" in err
            assert "forecast" not in err

    def test_a_length_that_is_over(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A shorter length than what is done is refused, and the run's own is kept; epochs are counted on."""
        train.main(training(text_file))
        before = Path("logs/numbers/config.json").read_text()
        assert train.main(["--run", "numbers", "--chars", "10"]) == 1
        assert "the run has done 6 steps and this length is 1; give a larger one" in capsys.readouterr().err
        assert Path("logs/numbers/config.json").read_text() == before
        assert train.main(["--run", "numbers", "--epochs", "4", "--steps-per-epoch", "2"]) == 0
        assert "epoch 3 of 3, " in capsys.readouterr().out

    def test_lower_rate_of_recipe_seed(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The floor of the rate comes down with it."""
        train.main(training(text_file, "--recipe", "seed"))
        assert train.main(["--run", "numbers", "--lr", "5e-5", "--epochs", "3"]) == 0
        assert json.loads(Path("logs/numbers/config.json").read_text())["train"]["min_lr"] == pytest.approx(5e-6)

    def test_damaged_config(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A config that cannot be used is named."""
        train.main(training(text_file))
        Path("logs/numbers/config.json").write_text('{"format": 1}')
        assert train.main(["--run", "numbers"]) == 1
        assert "logs/numbers/config.json: the run's config is not valid" in capsys.readouterr().err

    def test_fresh_keeps_the_old_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """`--fresh` starts over beside the old folder."""
        train.main(training(text_file))
        assert train.main(training(text_file, "--fresh", "--seed", "7")) == 0

        assert "kept as logs/numbers.old-1" in capsys.readouterr().err
        assert Path("logs/numbers.old-1/model.safetensors").exists()

    def test_fresh_takes_the_text_of_the_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A run that starts over by its name alone reads its own text again, as it read it, unless another one is named."""
        train.main(training(text_file, "--run", "book", "--alphabet", "text"))
        before = json.loads(Path("logs/book/config.json").read_text())["data"]
        flags = [*TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2", "--run", "book", "--fresh"]
        assert train.main(flags) == 0
        assert "logs/book: starting over with its text, numbers\n" in capsys.readouterr().err
        assert json.loads(Path("logs/book/config.json").read_text())["data"] == before

        Path("other.txt").write_text(text_file.read_text().upper())
        assert train.main([*flags, "--text", "other.txt"]) == 0
        assert "starting over" not in capsys.readouterr().err
        after = json.loads(Path("logs/book/config.json").read_text())["data"]
        assert (after["name"], after["alphabet"]) == ("other", None)
        assert train.main([*flags, "--alphabet", "text"]) == 0
        after = json.loads(Path("logs/book/config.json").read_text())["data"]
        assert (after["name"], after["fold"], after["alphabet"]["name"]) == ("other", False, "text")

    def test_fresh_without_settings(
        self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Settings that cannot be read do not say what the text was, and another one is not taken for it in silence."""
        train.main(training(text_file))
        capsys.readouterr()
        Path("logs/numbers/config.json").write_text("{")
        assert train.main(["--run", "numbers", "--fresh"]) == 2
        assert capsys.readouterr().err == (
            "picogpt-train: logs/numbers/config.json: damaged, so that the run's text is not known; to start over, name it with "
            "--text or --dataset\n"
        )
        assert train.main(training(text_file, "--fresh")) == 0

        monkeypatch.setattr("picogpt.data.resolve.load_dataset", lambda *_, **__: read_texts([str(text_file)], name="numbers"))
        Path("logs/numbers/config.json").unlink()
        capsys.readouterr()
        Path("logs/empty").mkdir()
        for name, fresh in (("numbers", ["--fresh"]), ("empty", [])):
            assert train.main(["--run", name, *fresh, *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
            expected = (
                f"logs/{name}: no config.json names its text, and neither --dataset nor --text is given: the text is auto\n"
            )
            assert capsys.readouterr().err.count(expected) == 1

    def test_a_text_that_was_piped_in(
        self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run on standard input that is started again at a terminal says so, instead of waiting for the keyboard."""
        piped = io.TextIOWrapper(io.BytesIO(text_file.read_bytes()))
        monkeypatch.setattr(sys, "stdin", piped)
        assert train.main(["--text", "-", *TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
        monkeypatch.setattr(sys, "stdin", Terminal())
        capsys.readouterr()
        for flags in ([], ["--fresh"]):
            assert train.main(["--run", "stdin", *flags]) == 1
            assert capsys.readouterr().err == (
                "picogpt-train: the run's text came from standard input: pipe the same text in again, with --text -\n"
            )

    def test_dry_run_counts_past_epochs(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A forecast of a run that goes on has all of its epochs."""
        train.main(training(text_file))
        capsys.readouterr()
        assert train.main(["--run", "numbers", "--epochs", "5", "--dry-run"]) == 0
        assert "3 an epoch, 5 epochs, " in capsys.readouterr().err

    def test_weight_decay_by_passes(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Reading a text twice brings weight decay, unless another one is requested; the original's recipe has its own."""
        once, twice = ["--chars", "5400"], ["--chars", "10800"]
        cases = [(once, 0.0), (twice, 0.1), ([*twice, "--weight-decay", "0.0"], 0.0), ([*once, "--recipe", "seed"], 0.1)]
        for index, (flags, expected) in enumerate(cases):
            assert train.main(["--text", str(text_file), *TINY_FLAGS, *flags, "--run", f"r{index}"]) == 0
            assert (", weight decay 0.1, seed" in capsys.readouterr().err) == (expected > 0)
            assert json.loads(Path(f"logs/r{index}/config.json").read_text())["train"]["weight_decay"] == expected

    def test_rate_of_muon_by_length(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A longer run has a lower rate of Muon, which is printed and stored; a requested rate and a resumed run's stay."""
        for epochs, flags, rate in (1, [], "0.018"), (4, [], "0.0089"), (4, ["--muon-lr", "0.03"], "0.03"):
            assert train.main(training(text_file, "--epochs", str(epochs), "--steps-per-epoch", "1000", *flags, "--dry-run")) == 0
            assert f"learning rate 0.003 ({rate} for Muon)" in capsys.readouterr().err
        assert train.main(training(text_file)) == 0
        assert json.loads(Path("logs/numbers/config.json").read_text())["train"]["muon_lr"] == 0.02
        assert train.main(["--run", "numbers", "--epochs", "4000", "--dry-run"]) == 0
        assert "(0.02 for Muon)" in capsys.readouterr().err

    def test_some_settings_may_change(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A new learning rate is taken and said."""
        train.main(training(text_file))
        assert train.main(training(text_file, "--lr", "0.001", "--epochs", "3")) == 0

        assert "lr is 0.001 from here on and was 0.003" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--n-layer", "3"], "n_layer is 3 and was 2"),
            (["--seed", "5", "--batch-size", "4"], "batch_size is 4 and was 2; seed is 5 and was 1337"),
            (["--recipe", "seed"], "recipe is seed and was fast"),
        ],
    )
    def test_others_may_not(self, text_file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
        """What would make the past steps something else is refused by name."""
        train.main(training(text_file))
        assert train.main(training(text_file, *flags)) == 1

        assert f"run numbers: {message}; choose another --run" in capsys.readouterr().err

    def test_other_settings_name_the_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The run that is named is the one on the disk, also where its text has another name."""
        train.main(training(text_file, "--run", "mine"))
        Path("logs/mine").rename("logs/numbers-2")
        Path("logs/numbers").mkdir()
        Path("logs/numbers/model.safetensors").touch()
        assert train.main(["--text", str(text_file), "--n-layer", "3"]) == 1

        assert "run numbers-2: n_layer is 3 and was 2; choose another --run" in capsys.readouterr().err

    def test_mistyped_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A name alone that no run has is taken for a mistyped one where there are runs."""
        train.main(training(text_file))
        capsys.readouterr()
        for flags in (["--run", "numbesr"], ["--run", "numbesr", "--epochs", "3"], ["--run", "numbesr", "--fresh"]):
            assert train.main(flags) == 2
            assert capsys.readouterr().err == (
                "picogpt-train: --run numbesr: no such run under logs; did you mean numbers? For a new run, give --dataset "
                "or --text too\n"
            )
        assert train.main(["--run", "other"]) == 2
        assert "the runs there are numbers. For a new run, give" in capsys.readouterr().err
        assert [path.name for path in Path("logs").iterdir()] == ["numbers"]
        assert train.main(training(text_file, "--run", "other")) == 0

    def test_first_run_by_name(
        self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there is no run yet, or only models that cannot be resumed, a name alone begins one, which is told."""
        monkeypatch.setattr("picogpt.data.load_dataset", lambda *_, **__: read_texts([str(text_file)], name="numbers"))
        Path("logs/given").mkdir(parents=True)
        Path("logs/given/model.safetensors").touch()
        flags = [*TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]
        assert train.main(["--run", "mine", *flags]) == 0
        assert (
            "logs/mine: a new run, as there is none to resume; neither --dataset nor --text is given, so the text is auto"
            in capsys.readouterr().err
        )

    def test_a_changed_text_stops_a_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A text that is not the run's own is refused."""
        train.main(training(text_file))
        text_file.write_text(text_file.read_text() + "more")

        assert train.main(["--run", "numbers", "--epochs", "9"]) == 1
        assert "text is numbers of 6,004 characters and was numbers of 6,000 characters" in capsys.readouterr().err

    def test_heads_of_a_run_of_another_width(self, text_file: Path) -> None:
        """A flag may be given again with the run's own value, also where it does not divide the default width."""
        assert train.main(training(text_file, "--n-embd", "12", "--n-head", "3")) == 0
        assert train.main(["--run", "numbers", "--n-head", "3", "--epochs", "3"]) == 0
        assert train.main(["--run", "numbers", "--n-embd", "12", "--epochs", "3"]) == 0

    def test_a_forecast_without_room(
        self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that has room for the run, and not for trying out the end of an epoch, is enough."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("picogpt.training.run.time_epoch_end", full)
        assert train.main(training(text_file, "--epochs", "4")) == 0
        said = "the end of an epoch is not in the forecast: trying one out failed (No space left on device)\n"
        assert said in capsys.readouterr().err

    def test_a_model_without_a_checkpoint_is_not_overwritten(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A trained model whose checkpoints are gone stays."""
        train.main(training(text_file))
        for path in Path("logs/numbers").glob("checkpoint*"):
            path.unlink()

        assert train.main(training(text_file, "--run", "numbers")) == 1
        said = "a trained model without a checkpoint to resume from; choose another --run, with --init-from numbers to start from its"
        assert said in capsys.readouterr().err

    def test_a_name_that_a_finished_model_has(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A run named after its text gets the next free name, and goes on under it."""
        train.main(training(text_file))
        model = Path("logs/numbers/model.safetensors")
        kept = model.read_bytes()
        for path in model.parent.glob("checkpoint*"):
            path.unlink()
        capsys.readouterr()

        assert train.main(training(text_file)) == 0
        assert (
            "logs/numbers: a trained model without a checkpoint to resume from; this run is called numbers-2"
            in capsys.readouterr().err
        )
        assert train.main(training(text_file, "--fresh")) == 0
        assert train.main(["--text", str(text_file), "--epochs", "3"]) == 0
        assert "logs/numbers-2: resuming" in capsys.readouterr().err
        assert model.read_bytes() == kept
        assert sorted(path.name for path in Path("logs").iterdir()) == ["numbers", "numbers-2", "numbers-2.old-1"]

    def test_damaged_checkpoint_is_said(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The one before it is used; if both are damaged nothing is touched."""
        train.main(training(text_file))
        Path("logs/numbers/checkpoint.safetensors").write_bytes(b"")
        assert train.main(["--run", "numbers", "--epochs", "3"]) == 0
        assert "warning: logs/numbers/checkpoint.safetensors: cannot be read" in capsys.readouterr().err

        for path in Path("logs/numbers").glob("checkpoint*"):
            path.write_bytes(b"")
        assert train.main(["--run", "numbers", "--epochs", "4"]) == 1
        assert "nothing to resume" in capsys.readouterr().err

    def test_minutes(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A budget in minutes becomes a fixed number of steps, which a second start with the same budget keeps."""
        flags = ["--text", str(text_file), *TINY_FLAGS, "--minutes", "0.01"]
        assert train.main(flags) == 0
        config = json.loads(Path("logs/numbers/config.json").read_text())

        assert config["budget"]["minutes"] == 0.01
        assert "timing a few steps" in capsys.readouterr().err
        assert train.main(flags) == 0
        assert "finished" in capsys.readouterr().err

    def test_machine_changes_are_said(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Another number of threads or type of number is said when a run goes on."""
        train.main(training(text_file))
        path = Path("logs/numbers/config.json")
        path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
        train.main(["--run", "numbers", "--epochs", "3", "--threads", "1", "--dtype", "bfloat16"])
        err = capsys.readouterr().err

        assert "threads is 1 and was 2: resuming, but no longer bit-identical" in err
        assert "dtype is bfloat16 and was float32" in err

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (["--epoch", "3"], 2, "unknown flag --epoch; did you mean --epochs?"),
            (["--learning-rate=0.1"], 2, "unknown flag --learning-rate; did you mean --lr?"),
            (["--learning_rate", "0.1"], 2, "unknown flag --learning_rate; did you mean --lr?"),
            (["-lr", "0.1"], 2, "unknown flag -lr; did you mean --lr?"),
            (["--block_size=64"], 2, "unknown flag --block_size; did you mean --context-len?"),
            (["--num_train_epochs", "3"], 2, "unknown flag --num_train_epochs; did you mean --epochs?"),
            (["--chars", "2.5"], 2, "argument --chars: '2.5' is not a whole number; write it like 2000000, 2M or 2e6"),
            (["--chars", "1.5e-3M"], 2, "argument --chars: '1.5e-3M' is not a whole number"),
            (["--seed=-1k"], 2, "--seed must be"),
            (["--zzz=1"], 2, "unknown flag --zzz (see"),
            (["stray"], 2, "unexpected argument 'stray'; name a text with --text or --dataset (see"),
            (["--epochs", "x"], 2, "argument --epochs: 'x' is not a whole number; write it like 2000000, 2M or 2e6"),
            (["--epochs", "1", "--minutes", "1"], 2, "argument --minutes: not allowed with argument --epochs"),
            (["--text", "a", "--dataset", "sample"], 2, "argument --dataset: not allowed with argument --text"),
            (["--epochs", "0"], 2, "--epochs must be a whole number of at least 1, got 0"),
            (["--steps-per-epoch", "0"], 2, "--steps-per-epoch must be a whole number"),
            (["--val-steps", "0"], 2, "--val-steps must be"),
            (["--minutes", "nan"], 2, "--minutes must be a number above 0, got nan"),
            (["--chars", "0"], 2, "--chars must be"),
            (["--recipe", "slow"], 2, "--recipe must be one of fast, seed, got 'slow'"),
            (["--batch-size", "0"], 2, "--batch-size must be"),
            (["--windows", "-1"], 2, "--windows must be"),
            (["--lr", "-1"], 2, "--lr must be a rate from 1e-9 to 0.1, got -1.0"),
            (["--optimizer", "sgd"], 2, "--optimizer must be muon or adamw, got 'sgd'"),
            (["--weight-decay", "-1"], 2, "--weight-decay must be"),
            (["--grad-clip", "inf"], 2, "--grad-clip must be"),
            (["--warmup-steps", "-1"], 2, "--warmup-steps must be"),
            (["--seed", "-1"], 2, "--seed must be"),
            (["--n-layer", "0"], 2, "--n-layer must be"),
            (["--n-head", "3"], 2, "--n-embd must be a multiple of n_head (3), got 256"),
            (["--n-embd", "0"], 2, "--n-embd must be"),
            (["--context-len", "0"], 2, "--context-len must be"),
            (["--dropout", "1"], 2, "--dropout must be in [0, 1), got 1.0"),
            (["--minutes", "five"], 2, "argument --minutes: 'five' is not a number"),
            (["--threads", "0"], 2, "--threads must be from 1 to 1024, got 0"),
            (["--dtype", "int8"], 2, "--dtype must be one of auto, float32, bfloat16, got 'int8'"),
            (["--run", "../x"], 2, "--run must be 1 to 64 letters"),
            (["--dataset", "shakespear"], 2, "--dataset must be auto, sample, tinyshakespeare, wikipedia, "),
            (
                ["--dataset", "sample", "--text-column", "x"],
                2,
                "--text-column is for a streamed data set; name one with --dataset",
            ),
            (["--text", "nowhere"], 1, "nowhere: cannot be read (No such file or directory); check the path of --text"),
            (["--text", __file__, "--context-len", "99999"], 1, "too short"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_bad_input(self, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str) -> None:
        """One line, the right exit code, nothing written."""
        try:
            found = train.main(flags)
        except SystemExit as exit_:
            found = int(exit_.code or 0)
        err = capsys.readouterr().err

        assert found == code
        assert message in err
        assert err.count("\n") == 1
        assert list(Path().iterdir()) == []

    def test_compile_without_a_compiler(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is said in one line, after what the text is, and nothing was trained."""
        from torch._inductor import config
        from torch._inductor.cpp_builder import cpp_compiler_search

        cpp_compiler_search.cache_clear()
        with config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
            assert train.main(training(text_file, "--compile")) == 1

        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("picogpt-train: --compile: no C++ compiler that works (/nowhere/g++, ")
        assert err.count("\n") == 2
        assert not Path("logs").exists()

    def test_compile_is_kept(self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """A compiled run says so, goes on compiled, and says it when it no longer is."""
        asked: list[Trainer] = []

        def compile_blocks(self: Trainer) -> None:
            asked.append(self)

        monkeypatch.setattr("picogpt.device.check_compiler", lambda: None)
        monkeypatch.setattr(Trainer, "compile_blocks", compile_blocks)
        train.main(training(text_file, "--compile"))
        assert "1 thread (as requested), blocks compiled by torch (the first steps take longer)" in capsys.readouterr().err
        train.main(["--run", "numbers", "--epochs", "3"])
        assert "float32 (as the run started) with 1 thread (as the run started), blocks compiled" in capsys.readouterr().err
        assert len(asked) == 2
        train.main(["--run", "numbers", "--epochs", "4", "--no-compile"])
        assert len(asked) == 2
        assert "compile is False and was True: resuming, but no longer bit-identical" in capsys.readouterr().err

    @needs_compiler
    def test_kernels(self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """A run in C says so, keeps to it, cannot go on without a compiler, and says when it goes on otherwise."""
        in_c = [flag if flag != "torch" else "c" for flag in training(text_file)]
        obstacle = "--kernels c: no C compiler (/nowhere/cc, by PATH or CC); take --kernels torch"
        monkeypatch.delenv("CC", raising=False)
        computed: list[Kernels] = []
        forward = Kernels.forward

        def watched(self: Kernels, *given: Any) -> None:
            computed.append(self)
            forward(self, *given)

        monkeypatch.setattr(Kernels, "forward", watched)
        assert train.main(in_c) == 0
        assert computed
        assert "1 thread (as requested), blocks by native kernels (compiled by cc)\n" in capsys.readouterr().err
        assert json.loads(Path("logs/numbers/config.json").read_text())["kernels"] == "c"
        monkeypatch.setattr("picogpt.device.check_compiler", lambda: None)
        monkeypatch.setattr(Trainer, "compile_blocks", lambda self: None)
        assert train.main(["--run", "numbers", "--epochs", "3", "--compile", "--dry-run"]) == 0
        capsys.readouterr()
        monkeypatch.setenv("CC", "/nowhere/cc")
        assert train.main(["--run", "numbers", "--epochs", "3"]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"picogpt-train: {obstacle}"
        assert train.main(["--run", "numbers", "--epochs", "3", "--kernels", "torch"]) == 0
        err = capsys.readouterr().err
        assert "blocks by torch (as requested), attention fused (" in err
        assert "kernels is torch and was c: resuming, but no longer bit-identical\n" in err

    def test_kernels_and_compile(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """They exclude each other."""
        in_c = [flag if flag != "torch" else "c" for flag in training(text_file)]
        assert train.main([*in_c, "--compile"]) == 2
        message = (
            "picogpt-train: --kernels c and --compile exclude each other, use --no-compile: torch cannot compile native kernels"
        )
        assert capsys.readouterr().err.splitlines()[-1] == message
        assert not Path("logs").exists()

    def test_attention(self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Without C its form is chosen by the clock, said and stored; a resumed run keeps it, whatever the clock would choose."""
        used: list[str] = []
        local_step = Trainer.local_step

        def watched(self: Trainer, *given: Any) -> float:
            used.append(self.runner.attention)
            return local_step(self, *given)

        monkeypatch.setattr(Trainer, "local_step", watched)
        monkeypatch.setattr("picogpt.model.attention._products_speedup", lambda *_: 2.0)
        assert train.main(training(text_file)) == 0
        assert "attention products (2.00 times as fast as torch's fused function)\n" in capsys.readouterr().err
        monkeypatch.setattr("picogpt.model.attention._products_speedup", lambda *_: 0.5)
        assert train.main(["--run", "numbers", "--epochs", "3"]) == 0

        err = capsys.readouterr().err
        assert "attention products (as the run started)\n" in err
        assert "bit-identical" not in err
        assert set(used) == {"products"}
        assert json.loads(Path("logs/numbers/config.json").read_text())["attention"] == "products"

    def test_attention_of_an_older_run(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A run begun before there were forms is resumed with one of today's, which is said."""
        assert train.main(training(text_file)) == 0
        path = Path("logs/numbers/config.json")
        content = json.loads(path.read_text())
        del content["attention"]
        path.write_text(json.dumps(content))
        capsys.readouterr()

        assert train.main(["--run", "numbers", "--epochs", "3"]) == 0
        assert "attention is fused and was an older form: resuming, but no longer bit-identical" in capsys.readouterr().err

    def test_gradient_checkpointing(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is said, and the weights are those of a run without it."""
        train.main(training(text_file, "--run", "kept"))
        train.main(training(text_file, "--run", "again", "--gradient-checkpointing"))
        assert "activations are recomputed in the backward pass" in capsys.readouterr().err
        kept, again = (load_file(f"logs/{name}/model.safetensors") for name in ("kept", "again"))
        assert {name: array.tobytes() for name, array in kept.items()} == {name: again[name].tobytes() for name in again}

    def test_logs_folder_is_a_file(self, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A place that cannot be written to is one line."""
        Path("file").touch()

        assert train.main(training(text_file, "--logs-dir", "file")) == 1
        assert "Not a directory" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("-", "stdin"),
            ("/a/My Book (2).txt", "My-Book--2-"),
            ("/a/été.txt", "t-"),
            ("/a/日本.txt", "text"),
            ("/a/..txt", "text"),
        ],
    )
    def test_run_is_named_after_the_text(self, path: str, name: str) -> None:
        """The name of a run on the user's own text is one that a run can have."""
        assert text_name([path]) == name

    def test_failing_picture_is_a_warning(
        self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Training survives a picture that cannot be written."""
        Path("logs/numbers/log.jpg").mkdir(parents=True)

        assert train.main(training(text_file)) == 0
        assert "log or picture not written (Is a directory); training continues" in capsys.readouterr().err

    def test_dead_stdout(self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Training survives a stdout that has gone."""
        monkeypatch.setattr(sys, "stdout", DeadStream())
        assert train.main(training(text_file)) == 0
        monkeypatch.undo()

        assert capsys.readouterr().err.count("standard output is closed; training continues without it") == 1

    def test_lines_where_there_is_no_terminal(
        self, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A plain line now and then, with loss, speed and time left."""
        monkeypatch.setattr("picogpt.cli.bar.LINE_INTERVAL", 0.0)
        train.main(training(text_file))

        assert re.search(r"step 2 of 6: loss \d\.\d{3}, [\d,]+ characters/s, 0:00:\d\d left", capsys.readouterr().err)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))]
)
def test_signal_saves_and_ends(text_file: Path, number: signal.Signals) -> None:
    """A signal lets the step finish, saves, says where the run stands, and exits with 128 and its number."""
    flags = ["--text", str(text_file), *TINY_FLAGS, "--epochs", "1000", "--steps-per-epoch", "20", "--val-steps", "1"]
    running = subprocess.Popen([*RUN, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with kill_at_exit(running) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch"):
            pass
        process.send_signal(number)
        _, err = process.communicate(timeout=30)

    assert process.returncode == 128 + number
    match = re.search(r"stopped and saved at step ([\d,]+); picogpt-train --run numbers --threads 1 resumes from there", err)
    assert match
    assert "saving; a second Ctrl-C ends at once and loses what was trained since the last checkpoint\n" in err
    checkpoint, _ = RunFolder(Path("logs/numbers")).load_checkpoint()
    assert checkpoint.state["log"]["iter_num"] == int(match[1].replace(",", ""))


class TestHelp:
    @pytest.mark.parametrize("command", ["train", "generate", "eval", "plot", "export"])
    @pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--no-such-flag"]], ids=lambda flags: flags[0])
    def test_answers_without_heavy_imports(self, command: str, flags: list[str]) -> None:
        """Help, version and a wrong flag need no torch and not even numpy, which is what makes them instant."""
        heavy = "torch,numpy,matplotlib,datasets,tqdm,safetensors"
        done = subprocess.run(program("run_without", heavy, command, *flags), capture_output=True, text=True, check=False)

        assert done.returncode == (2 if flags == ["--no-such-flag"] else 0), done.stderr

    @pytest.mark.parametrize("module", [train, generate, evaluation, plot, export], ids=lambda module: module.__name__)
    def test_fits_in_80_columns(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """No line of the help is longer than a terminal of 80 columns is wide."""
        monkeypatch.setenv("COLUMNS", "80")

        assert max(map(len, module.build_parser().format_help().splitlines())) <= 80

    @pytest.mark.timing
    def test_answers_at_once(self) -> None:
        """`--help` in under 0.3 s (the best of three, as the machine may be busy)."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([*RUN, "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)

        assert min(seconds) < 0.3

    @pytest.mark.parametrize(
        "parser",
        [module.build_parser() for module in (train, generate, evaluation, plot, export)],
        ids=lambda parser: parser.prog,
    )
    def test_every_default_is_shown(self, parser: Parser) -> None:
        """Each flag says its default, or is one that has none."""
        for action in parser._actions:
            flag = (action.option_strings or [action.dest])[0]
            if not action.required and flag not in {
                "-h",
                "--version",
                "--fresh",
                "--dry-run",
                "--gradient-checkpointing",
                "--text",
                "--chat",
                "--no-echo",
                "--json",
                "--show-probs",
            }:
                assert "default:" in (action.help or ""), flag


@pytest.fixture
def trained(text_file: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run, trained for a moment."""
    train.main(training(text_file))
    capsys.readouterr()
    return Path("logs/numbers")


class TestGenerate:
    def test_writes_on(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The prompt in small letters and as many characters as asked; the model and the seed on stderr."""
        assert generate.main(["-p", "One and", "-n", "20", "-s", "3"]) == 0
        out, err = capsys.readouterr()

        assert out.startswith("one and")
        assert len(re.sub("<.{1,3}>", "x", out)) == len("one and") + 20 + 1
        assert err == f"model logs/numbers/model.safetensors, seed 3, bfloat16, threads {choose_threads().count}\n"
        assert generate.main(["-p", "One and", "-n", "20", "-s", "3", "-m", "numbers"]) == 0
        assert capsys.readouterr().out == out

    def test_greedy_needs_no_seed(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """At temperature 0 every run is the same, whatever the hop while one window is enough."""
        texts = []
        for hop in ("1", "8"):
            generate.main(["-p", "a", "-n", "6", "-t", "0", "--hop", hop])
            texts.append(capsys.readouterr().out)

        assert texts[0] == texts[1]

    def test_no_echo_and_stop(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Only the new text; cut before a stop text."""
        generate.main(["-p", "one", "-n", "40", "-t", "0"])
        whole = capsys.readouterr().out.removesuffix("\n").removeprefix("one")
        generate.main(["-p", "one", "-n", "40", "-t", "0", "--no-echo"])
        assert capsys.readouterr().out == whole + "\n"
        generate.main(["-p", "one", "-n", "40", "-t", "0", "--no-echo", "--stop", whole[3:5]])
        assert capsys.readouterr().out == whole[: whole.index(whole[3:5])] + "\n"

    def test_json(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One object a sample, each with what it takes to make it again."""
        flags = ["-p", "One", "-n", "30", "-s", "5", "--num-samples", "3", "-t", "2"]
        assert generate.main([*flags, "--json"]) == 0
        samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

        assert [sample["sample"] for sample in samples] == [0, 1, 2]
        assert len({sample["text"] for sample in samples}) == 3
        assert samples[0].keys() == {"model", "seed", "sample", "prompt", "text", "finish_reason"}
        assert {(sample["seed"], sample["prompt"], sample["finish_reason"]) for sample in samples} == {(5, "One", "length")}
        generate.main(flags)
        assert capsys.readouterr().out == "---\n".join(f"one{sample['text']}\n" for sample in samples)

    def test_chat(self, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """A question is wrapped in its tokens, only the answer is shown, and the conversation is kept."""
        seen: list[str] = []
        prefill = RollingDecoder.prefill

        def spy(self: RollingDecoder, ids: Any) -> Any:
            seen.append(CharTokenizer().decode(ids[0]))
            return prefill(self, ids)

        monkeypatch.setattr(RollingDecoder, "prefill", spy)
        type_lines(monkeypatch, "Who?", "Why?")
        assert generate.main(["--chat", "-n", "4", "-t", "0"]) == 0
        answers = capsys.readouterr().out.splitlines()

        assert seen[0] == "<Q>who?</Q>\n<A>"
        assert seen[1] == f"<Q>who?</Q>\n<A>{answers[0]}</A>\n<Q>why?</Q>\n<A>"
        assert len(answers) == 3

    def test_unknown_characters_are_told(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """They become what is near in ASCII, or <?>, with one notice and counts."""
        generate.main(["-p", "café 日日", "-n", "0"])
        out, err = capsys.readouterr()

        assert out == "cafe <?><?>\n"
        assert "prompt: folded to ASCII: 1 ('é' 1); unknown, read as <?>: 2 (28.57%: '日' 2)" in err

    def test_prompt_without_a_flag(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """An argument that belongs to no flag is the prompt, before the flags, after them or between."""
        for flags in (
            ["one and", "-n", "0"],
            ["-n", "0", "one and"],
            ["-n", "0", "one and", "-t", "0"],
            ["-n0", "--", "-one and"],
        ):
            assert generate.main(flags) == 0

            assert capsys.readouterr().out.lstrip("-") == "one and\n"

    def test_counts_with_letters(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """`-n 1k` is a thousand characters."""
        assert generate.main(["one", "-n", "1k", "--json", "-t", "0"]) == 0
        text = json.loads(capsys.readouterr().out)["text"]

        assert len(re.sub("<.{1,3}>", "x", text)) == 1000

    def test_long_prompt(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Of a prompt of ten megabytes the end is read, and that is said."""
        Path("long.txt").write_text("one and two\n" * 900_000)
        assert generate.main(["-f", "long.txt", "-n", "5", "--no-echo"]) == 0

        assert "the prompt has 10,799,999 characters; the model reads the last 80" in capsys.readouterr().err

    @pytest.mark.timing
    def test_long_prompt_at_a_bounded_cost(self, trained: Path) -> None:
        """A prompt of ten megabytes is answered in under 10 s."""
        Path("long.txt").write_text("one and two\n" * 900_000)
        start = time.perf_counter()
        assert generate.main(["-f", "long.txt", "-n", "5", "--no-echo"]) == 0

        assert time.perf_counter() - start < 10

    def test_empty_prompt(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing is a prompt too: the text begins like a line."""
        assert generate.main(["-p", "", "-n", "5", "-t", "0"]) == 0
        assert len(capsys.readouterr().out) >= 6

    @pytest.mark.parametrize("flags", [[], ["-f", "-"]], ids=["pipe", "-f -"])
    def test_prompt_through_a_pipe(self, trained: Path, flags: list[str]) -> None:
        """Without -p, what comes through a pipe is the prompt, binary or not."""
        command = [sys.executable, "-m", "picogpt.cli.generate", "-n", "0", *flags]
        done = subprocess.run(command, input=b"from a pipe\xff\0", capture_output=True, check=True)

        assert done.stdout == b"from a pipey<?>\n"
        done = subprocess.run(command, input=b"\xef\xbb\xbfa\r\nb\r\n", capture_output=True, check=True)
        assert done.stdout == b"a\nb\n"

    def test_broken_pipe_is_quiet(self, trained: Path) -> None:
        """`picogpt-generate -n inf | head -c 10` ends without a word."""
        command = f"{sys.executable} -m picogpt.cli.generate -p x -n inf -s 1 | head -c 10"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, timeout=60)

        assert len(done.stdout) == 10
        assert done.stderr == f"model logs/numbers/model.safetensors, seed 1, bfloat16, threads {choose_threads().count}\n"

    def test_full_disk_is_one_line(self, trained: Path) -> None:
        """`picogpt-generate > /dev/full` says so, without a traceback."""
        command = f"{sys.executable} -m picogpt.cli.generate -p x -s 1 > /dev/full"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)

        assert done.returncode == 1
        assert done.stderr.splitlines()[1:] == [
            "picogpt-generate: No space left on device; free some space on the disk, then start again"
        ]

    def test_ascii_locale(self, trained: Path) -> None:
        """In a locale that can print little, notices of other letters still come out."""
        environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-m", "picogpt.cli.generate", "-n", "0"]
        done = subprocess.run(command, input="日".encode(), capture_output=True, check=True, env=environment)

        assert done.stdout == b"<?>\n"
        assert rb"read as <?>: 1 (100.00%: '\u65e5' 1)" in done.stderr

    def test_without_a_compiler(self, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Numpy writes the same text, and one line says why; a type that it lacks is refused."""
        flags = ["-p", "one", "-s", "3", "-n", "40", "--dtype", "float32"]
        assert generate.main(flags) == 0
        expected = capsys.readouterr().out
        monkeypatch.setenv("CC", "no-such-compiler")

        assert generate.main(flags) == 0
        out, err = capsys.readouterr()
        assert out == expected
        reason = "no C compiler (no-such-compiler, by PATH or CC)"
        assert err.splitlines()[0] == f"numpy computes the model, several times more slowly than C: {reason}"
        assert generate.main([*flags[:-1], "int8"]) == 2
        message = f"picogpt-generate: --dtype int8 needs the native kernels, which are not available: {reason}\n"
        assert capsys.readouterr().err == message

    def test_needs_no_torch(self, trained: Path) -> None:
        """torch, datasets and matplotlib are never imported."""
        command = program("run_without", "torch,datasets,matplotlib,tqdm", "generate", "-p", "x", "-n", "20")
        subprocess.run(command, check=True, capture_output=True)

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (["-t", "-1"], 2, "--temperature must be a number from 0 to 1,000,000, got -1.0"),
            (["-t", "nan"], 2, "--temperature must be"),
            (["-t", "hot"], 2, "argument -t/--temperature: 'hot' is not a number"),
            (["-t", "inf"], 2, "--temperature must be"),
            (["-k", "-1"], 2, "--top-k must be"),
            (["--top-p", "0"], 2, "--top-p must be above 0 and at most 1, got 0.0"),
            (["--top-p", "1.1"], 2, "--top-p must be"),
            (["--min-p", "-0.1"], 2, "--min-p must be from 0 to 1, got -0.1"),
            (["-n", "-1"], 2, "--max-new-tokens must be a whole number of at least 0, or inf, got '-1'"),
            (["-n", "inf", "--num-samples", "2"], 2, "--max-new-tokens must be a number for several samples, got 'inf'"),
            (["-n", "inf", "--json"], 2, "--max-new-tokens must be a number with --json, got 'inf'"),
            (["--num-samples", "0"], 2, "--num-samples must be"),
            (["--hop", "0"], 2, "--hop must be a whole number of at least 1"),
            (["--stop", ""], 2, "--stop must be a text of at least one character"),
            (["-s", "-1"], 2, "--seed must be"),
            (["-p", "x", "-f", "y"], 2, "argument -f/--prompt-file: not allowed with argument -p/--prompt"),
            (["the king", "-p", "x"], 2, "argument -p/--prompt: not allowed with argument TEXT"),
            (["-f", "x", "the king"], 2, "argument TEXT: not allowed with argument -f/--prompt-file"),
            (["the", "king"], 2, "unexpected argument 'king'; put a prompt of several words in quotes"),
            (["--promt", "x"], 2, "unknown flag --promt; did you mean --prompt?"),
            (["--temp", "1"], 2, "unknown flag --temp; did you mean --temperature?"),
            (["--tempature", "1", "-p", "a"], 2, "unknown flag --tempature; did you mean --temperature?"),
            (["--n-predict", "1"], 2, "unknown flag --n-predict; did you mean --max-new-tokens?"),
            (["-n", "1.5"], 2, "--max-new-tokens must be a whole number of at least 0, or inf, got '1.5'"),
            (["-m", "nowhere"], 1, "nowhere: no such file, and no run of that name"),
            ([], 1, "logs: no trained model there; train one with picogpt-train"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_bad_input(self, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str) -> None:
        """One line and the right exit code."""
        try:
            found = generate.main(flags)
        except SystemExit as exit_:
            found = int(exit_.code or 0)
        out, err = capsys.readouterr()

        assert (found, out) == (code, "")
        assert message in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("flags", "code", "message"),
        [
            (["--hop", "9"], 2, "--hop must be from 1 to 8, the model's window, got 9"),
            (["--stop", "日"], 2, "--stop must be made of characters that the model knows, got '日'"),
            (["-f", "nowhere"], 1, "nowhere: cannot be read (No such file or directory); check the path of --prompt-file"),
        ],
    )
    def test_bad_input_with_a_model(
        self, trained: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
    ) -> None:
        """What is wrong for this model, or only seen later."""
        assert generate.main(flags) == code
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("flags", [["--json"], ["--num-samples", "2"]], ids=" ".join)
    def test_what_a_terminal_cannot_do(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
    ) -> None:
        """What is for one prompt is refused where each line is one."""
        monkeypatch.setattr(sys, "stdin", Terminal())

        assert generate.main(flags) == 2
        assert f"{flags[0]} needs a prompt: give one with -p, -f or through a pipe" in capsys.readouterr().err


def test_closed_stdout(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Text that can be printed nowhere is not generated."""
    monkeypatch.setattr(sys, "stdout", None)

    assert generate.main(["-p", "one"]) == 1
    assert "picogpt-generate: standard output is closed; there is nowhere to write to\n" in capsys.readouterr().err


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_generation(trained: Path, samples: int, number: signal.Signals, code: int) -> None:
    """Ctrl-C and SIGTERM end the command within seconds, wherever they meet it, and leave no process behind."""
    command = [sys.executable, "-m", "picogpt.cli.generate", "-p", "a", "-n", "1000000", "--num-samples", str(samples)]
    for delay in (0.0, 0.2, 0.31):
        generating = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with kill_at_exit(generating) as process:
            assert process.stderr is not None
            # The line about the model; before it may be one about kernels that are compiled.
            loaded = next(line for line in process.stderr if line.startswith("model "))
            time.sleep(delay)
            process.send_signal(number)
            # The pipe ends only when no process holds its other end.
            _, err = process.communicate(timeout=10)

        assert process.returncode == code
        # A signal that meets the write of that line leaves it in Python's buffer, which then is written again.
        assert err.removeprefix(loaded) == ("picogpt-generate: interrupted\n" if number == signal.SIGINT else "")


_DROPPED_INTERRUPT = """
import contextlib, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("pressed", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
import picogpt.cli.{command} as command
sys.exit(command.main({arguments!r}))
"""


@pytest.mark.parametrize(
    ("command", "arguments", "module"),
    [
        ("generate", ["a"], "numpy.random"),
        ("eval", ["--dataset", "sample"], "numpy.random"),
        ("train", ["--dataset", "sample", "--chars", "1M"], "torch"),
        ("train", ["--dataset", "sample", "--chars", "1M"], "picogpt.training.plan"),
        ("train", ["--dataset", "rows.parquet"], "pyarrow.parquet"),
    ],
)
def test_ctrl_c_during_imports(trained: Path, command: str, arguments: list[str], module: str) -> None:
    """Ctrl-C ends a command also if a module that is being imported drops the exception, as extension modules do."""
    pq.write_table(pa.table({"text": ["the cat sat on the mat. " * 100] * 30}), "rows.parquet")
    code = _DROPPED_INTERRUPT.format(command=command, arguments=arguments, module=module)

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == f"pressed\npicogpt-{command}: interrupted\n"


def test_loop_on_a_terminal(trained: Path) -> None:
    """Each line is a prompt; Ctrl-C stops the text and not the loop, Ctrl-D leaves."""
    primary, secondary = os.openpty()
    command = [sys.executable, "-m", "picogpt.cli.generate", "-n", "inf", "-t", "0"]
    shown = b""

    def wait_for_prompt(count: int, after: Callable[[], None] = lambda: None) -> None:
        """Wait until so many have been shown; a signal can come just before readline waits for one, and is sent again."""
        nonlocal shown
        while shown.count(b"> ") < count:
            after()
            while select.select([primary], [], [], 2.0)[0] and shown.count(b"> ") < count:
                shown += os.read(primary, 4096)

    loop = subprocess.Popen(command, stdin=secondary, stdout=secondary, stderr=secondary, start_new_session=True)
    with kill_at_exit(loop) as process:
        os.close(secondary)
        interrupt = partial(process.send_signal, signal.SIGINT)
        wait_for_prompt(1)
        for turn in (2, 3):
            os.write(primary, b"one\n")
            before = len(shown)
            while len(shown) < before + 40:
                shown += os.read(primary, 4096)
            wait_for_prompt(turn, interrupt)
        wait_for_prompt(4, interrupt)
        os.write(primary, b"\x04")
        assert process.wait(timeout=20) == 0
    os.close(primary)
    assert b"type a prompt; Ctrl-C ends a text, Ctrl-D the command\r\n" in shown


class TestPlot:
    def test_draws_anew(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One run: the JPG in its folder; several: one beside them, or where asked."""
        (trained / "log.jpg").unlink()
        assert plot.main(["numbers"]) == 0
        assert capsys.readouterr().out == "logs/numbers/log.jpg\n"
        assert (trained / "log.jpg").stat().st_size > 10_000

        assert plot.main(["numbers", str(trained / "log.pkl")]) == 0
        assert Path("logs/compare.jpg").exists()
        assert plot.main(["numbers", "-o", "x.jpg"]) == 0
        assert Path("x.jpg").exists()

    def test_other_formats(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The picture is a JPG or a PNG, and is not called anything else."""
        assert plot.main(["numbers", "-o", "x.PNG", "--x", "seconds"]) == 0
        assert Path("x.PNG").read_bytes().startswith(b"\x89PNG")
        Path("folder.jpg").mkdir()
        assert plot.main(["numbers", "-o", "folder.jpg"]) == 2
        assert "--output: folder.jpg cannot be written; choose another file" in capsys.readouterr().err
        assert plot.main(["numbers", "--x", "steps"]) == 2
        assert "--x must be one of epochs, characters, seconds, got 'steps'" in capsys.readouterr().err
        assert plot.main(["numbers", "-o", "nowhere/x.jpg"]) == 2
        assert "--output: there is no folder nowhere; create it first" in capsys.readouterr().err
        assert plot.main(["numbers", "-o", "x.gif"]) == 2
        assert "--output must end in .jpg or .png, got 'x.gif'" in capsys.readouterr().err

    def test_page(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Of one run: the page that training wrote; of several: each with its sample and its settings."""
        assert plot.main(["numbers", "--html", "x.html"]) == 0
        assert capsys.readouterr().out == "x.html\n"
        assert Path("x.html").read_text() == (trained / "log.html").read_text()

        (trained / "epochs.json").unlink()
        Path("elsewhere").mkdir()
        shutil.copy(trained / "log.pkl", "elsewhere")
        assert plot.main(["numbers", "elsewhere", "--html", "x.html"]) == 0
        page = Path("x.html").read_text()
        assert "<h3>numbers</h3><dl><dt>model</dt><dd>" in page
        assert "<h3>elsewhere</h3><p>Not recorded.</p>" in page

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["x.htm"], "--html must end in .html, got 'x.htm'"),
            (["nowhere/x.html"], "--html: there is no folder nowhere; create it first"),
            (["x.html", "--x", "epochs"], "--x is for a picture, as the page counts characters; leave it out with --html"),
        ],
    )
    def test_wrong_page(self, trained: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A page that cannot be written is one line, before the work."""
        assert plot.main(["numbers", "--html", *flags]) == 2
        assert capsys.readouterr().err == f"picogpt-plot: {message}\n"

    def test_page_or_picture(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One of both is written, so asking for both is one line."""
        with pytest.raises(SystemExit):
            plot.main(["numbers", "--html", "x.html", "-o", "x.png"])
        assert "argument -o/--output: not allowed with argument --html" in capsys.readouterr().err

    def test_unknown_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A run that is not there is one line."""
        assert plot.main(["nowhere"]) == 1
        assert "picogpt-plot: nowhere: no such file, and no run of that name" in capsys.readouterr().err


class TestBoundary:
    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (PicoGPTError("what, where, what to do"), 1, "prog: what, where, what to do\n"),
            (Interrupted("saved", 15), 143, "prog: saved\n"),
            (KeyboardInterrupt(), 130, "prog: interrupted\n"),
            (OSError(28, "No space left on device", "/x"), 1, "prog: /x: No space left on device; free some space on the disk"),
            (
                OSError(errno.EIO, "Input/output error", "/x"),
                1,
                "prog: /x: Input/output error; check the disk, then start again\n",
            ),
            (
                PermissionError(errno.EACCES, "Permission denied", b"/x"),
                1,
                "prog: /x: Permission denied; check the permissions\n",
            ),
            (
                OSError(errno.EMFILE, "Too many open files", "/x"),
                1,
                "prog: /x: Too many open files; allow more open files (ulimit",
            ),
            (
                OSError(errno.EISDIR, "Is a directory", "/.x.part", None, "/x"),
                1,
                "prog: /x: Is a directory; check the path\n",
            ),
            (socket.gaierror(-2, "Name or service not known"), 1, "prog: Name or service not known\n"),
            (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "prog: Connection reset by peer\n"),
            (TimeoutError("timed out"), 1, "prog: timed out\n"),
            (BrokenPipeError(errno.EPIPE, "Broken pipe", "/socket"), 1, "prog: /socket: Broken pipe\n"),
        ],
    )
    def test_errors_become_a_line(self, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
        """Each kind of end has its exit code and its line."""

        def body(_: object) -> int:
            raise error

        assert common.run_command(body, Parser("prog", ""), []) == code
        assert capsys.readouterr().err.startswith(line)

    def test_bugs_keep_their_traceback(self) -> None:
        """What is no error of the user's goes on."""

        def body(_: object) -> int:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            common.run_command(body, Parser("prog", ""), [])

    def test_second_signal_ends_at_once(self) -> None:
        """After the first signal the next one has its usual effect again."""
        before = signal.getsignal(signal.SIGINT)
        stop = StopRequest()
        with stop.listen():
            assert not stop()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert stop()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.parametrize("count", [0, 1])
    def test_ctrl_c_is_deferred(self, count: int) -> None:
        """Ctrl-C within the block is raised at its end, and the handler is the one before again."""
        reached = False
        with pytest.raises(KeyboardInterrupt) if count else contextlib.nullcontext(), deferred_interrupt():
            for _ in range(count):
                signal.raise_signal(signal.SIGINT)
            reached = True
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_deferred_where_signals_are_handled(self) -> None:
        """Where a training run listens, Ctrl-C stays a request to stop."""
        stop = StopRequest()
        with stop.listen(), deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
        assert stop()

    def test_deferred_in_a_thread(self) -> None:
        """A thread that downloads may import, though only the main thread can set handlers."""

        def block() -> bool:
            with deferred_interrupt():
                return True

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(block).result()

    def test_closed_stderr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A notice that nobody can read stops nothing."""
        monkeypatch.setattr(sys, "stderr", DeadStream())
        common.notice("lost")


def test_download_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no terminal the bar is silent."""
    bar = DownloadBar("text")
    bar(5, 10)
    bar(10, 10)

    assert capsys.readouterr().err == ""
