"""Settings refuse what is out of range, and budgets come to the right number of steps."""

from __future__ import annotations

from typing import Any

import pytest

from picogpt.checks import DTYPES, check_choice, check_run_name, check_threads, parse_count, parse_new_tokens
from picogpt.config import DataConfig, GPTConfig, SampleConfig, TrainConfig
from picogpt.errors import ConfigError
from picogpt.runs.settings import RunSettings
from picogpt.schedule import RECIPE_BUDGETS, Budget, Pace, Schedule, suitable_chars, suitable_settings
from picogpt.training.request import TrainRequest


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (GPTConfig, {"n_layer": 0}, "n_layer must be a whole number of at least 1, got 0"),
        (GPTConfig, {"n_embd": True}, "n_embd must be a whole number"),
        (GPTConfig, {"n_head": 7}, r"n_embd must be a multiple of n_head \(7\), got 256"),
        (GPTConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (GPTConfig, {"dropout": float("nan")}, r"dropout must be in \[0, 1\), got nan"),
        (TrainConfig, {"recipe": "slow"}, "recipe must be one of fast, seed, got 'slow'"),
        (TrainConfig, {"optimizer": "sgd"}, "optimizer must be muon or adamw, got 'sgd'"),
        (TrainConfig, {"decay": "steps"}, "decay must be one of linear, cosine"),
        (TrainConfig, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (TrainConfig, {"windows": 0}, "windows must be a whole number of at least 1"),
        (TrainConfig, {"muon_interval": 0}, "muon_interval must be a whole number of at least 1, got 0"),
        (TrainConfig, {"muon_interval": 101}, "muon_interval must be at most 100, got 101"),
        (TrainConfig, {"sync_every": -1}, "sync_every must be a whole number of at least 0"),
        (TrainConfig, {"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0"),
        (TrainConfig, {"decay_steps": 0}, "decay_steps must be a whole number of at least 1"),
        (TrainConfig, {"lr": 0.0}, "lr must be a rate from 1e-9 to 0.1, got 0.0"),
        (TrainConfig, {"lr": float("inf")}, "lr must be a rate"),
        (TrainConfig, {"lr": 1.0}, "lr must be a rate from 1e-9 to 0.1, got 1.0"),
        (TrainConfig, {"muon_lr": 1.5}, "muon_lr must be a rate from 1e-9 to 1, got 1.5"),
        (Schedule, {"total_steps": 0, "steps_per_epoch": 1, "val_steps": 1}, "total_steps must be a whole number of at least 1"),
        (Schedule, {"total_steps": 1, "steps_per_epoch": 1, "val_steps": 1, "epoch_start": -1}, "epoch_start must be"),
        (Schedule, {"total_steps": 1, "steps_per_epoch": 1, "val_steps": 1, "decay_start": -1}, "decay_start must be"),
        (Schedule, {"total_steps": 1, "steps_per_epoch": 1, "val_steps": 1, "decay_done": 1.1}, "decay_done must be a share"),
        (TrainConfig, {"min_lr": 1.0}, r"min_lr must be from 0 to lr \(0.003\), got 1.0"),
        (TrainConfig, {"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        (TrainConfig, {"weight_decay": -0.1}, "weight_decay must be a number of at least 0"),
        (TrainConfig, {"grad_clip": float("nan")}, "grad_clip must be a number of at least 0"),
        (TrainConfig, {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        (TrainConfig, {"seed": 2**63}, r"seed must be below 2\*\*63"),
        (Budget, {"epochs": 0}, "epochs must be a whole number of at least 1"),
        (Budget, {"minutes": 0.0}, "minutes must be a number above 0, got 0.0"),
        (Budget, {"minutes": float("inf")}, "minutes must be a number above 0, got inf"),
        (Budget, {"minutes": 1.0, "chars": 5}, "minutes must be given without chars"),
        (Budget, {"val_steps": 0}, "val_steps must be a whole number of at least 1"),
        (SampleConfig, {"temperature": -1.0}, "temperature must be a number from 0 to 1,000,000, got -1.0"),
        (SampleConfig, {"temperature": float("nan")}, "temperature must be a number from 0 to 1,000,000"),
        (SampleConfig, {"top_k": -1}, "top_k must be a whole number of at least 0"),
        (SampleConfig, {"seed": -1}, "seed must be a whole number of at least 0"),
    ],
)
def test_refuses(kind: Any, values: dict[str, Any], message: str) -> None:
    """A value out of range is refused with the field, the range and the value."""
    with pytest.raises(ConfigError, match=message):
        kind(**values)


@pytest.mark.parametrize("name", ["../x", "/etc", "", "a" * 65, "-rf", "a\0b", ".", "a/b", "a b", "a\n"])
def test_run_names_refused(name: str) -> None:
    """A run's name is never a path or a flag."""
    with pytest.raises(ConfigError, match="run must be 1 to 64 letters"):
        check_run_name(name)


def test_small_checks() -> None:
    """Names and numbers that the command line checks early."""
    assert check_run_name("wikipedia-2.b_1") == "wikipedia-2.b_1"
    assert check_choice("dtype", None, DTYPES) is None
    assert check_threads(2) == 2
    assert parse_new_tokens("inf") is None
    assert parse_new_tokens("0") == 0
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16, got 'int8'"):
        check_choice("dtype", "int8", DTYPES)
    with pytest.raises(ConfigError, match="threads must be from 1 to 1024, got 0"):
        check_threads(0)


@pytest.mark.parametrize("text", ["-1", "1.5", "", "1e-9", "infinite"])
def test_new_tokens_refused(text: str) -> None:
    """A number of characters is whole, or inf."""
    with pytest.raises(ConfigError, match="max_new_tokens must be a whole number of at least 0, or inf"):
        parse_new_tokens(text)


def test_recipes() -> None:
    """Recipe seed is the original's; what is given comes before the recipe; None gives nothing."""
    seed = TrainConfig.from_recipe("seed", {"lr": None, "grad_clip": 0.5})

    assert (seed.batch_size, seed.windows, seed.lr, seed.min_lr, seed.warmup_steps) == (8, 10, 6e-4, 6e-5, 2000)
    assert (seed.decay, seed.decay_steps, seed.beta1, seed.beta2, seed.weight_decay) == ("cosine", 600_000, 0.9, 0.95, 0.1)
    assert seed.grad_clip == 0.5
    with pytest.raises(ConfigError, match="recipe must be one of fast, seed, got 'x'"):
        TrainConfig.from_recipe("x", {})


PACE = Pace(seconds_per_step=0.4, seconds_per_val_batch=0.5, seconds_per_epoch_end=1.0)


@pytest.mark.parametrize(
    ("budget", "pace", "expected"),
    [
        (Budget(**RECIPE_BUDGETS["seed"]), None, (150_000, 500, 100)),
        # 700,000 characters, in epochs of at least four steps.
        (Budget(), None, (70, 4, 1)),
        (Budget(steps_per_epoch=50), None, (70, 50, 10)),
        (Budget(epochs=3, steps_per_epoch=7, val_steps=2), None, (21, 7, 2)),
        (Budget(chars=1_000_000), None, (100, 5, 1)),
        (Budget(chars=1_000_001), None, (101, 6, 1)),
        (Budget(chars=5), None, (1, 4, 1)),
        (Budget(chars=1_000_000, steps_per_epoch=50), None, (100, 50, 10)),
        # 300 s less 20 epoch ends of 1 s leave 560 steps of half a second, a fifth of a validation batch included.
        (Budget(minutes=5), PACE, (560, 28, 5)),
        # In 24 s only 6 epoch ends fit into a quarter of the time; 18 s are left.
        (Budget(minutes=0.4), PACE, (36, 6, 1)),
        (Budget(minutes=1e-6), PACE, (1, 4, 1)),
        # An epoch of 10 steps takes 4 + 4 x 0.5 + 1 s.
        (Budget(minutes=7, steps_per_epoch=10, val_steps=4), PACE, (600, 10, 4)),
        (Budget(minutes=7, steps_per_epoch=5), PACE, (600, 5, 1)),
    ],
)
def test_schedule(budget: Budget, pace: Pace | None, expected: tuple[int, int, int]) -> None:
    """A budget in steps, steps an epoch and validation batches."""
    schedule = budget.schedule(chars_per_step=10_000, train_chars=100_000, pace=pace)

    assert (schedule.total_steps, schedule.steps_per_epoch, schedule.val_steps) == expected


@pytest.mark.parametrize(
    ("train_chars", "expected"),
    [
        (2_700, 54_000),  # 20 passes
        (35_000, 700_000),
        (116_136, 700_000),  # the sample play, 6 passes
        (175_000, 700_000),
        (270_000, 1_080_000),  # 4 passes
        (1_003_854, 4_015_416),  # Tiny Shakespeare, 4 passes
        (5_000_000, 20_000_000),
        (100_000_000, 20_000_000),  # a fifth of the text
        (None, 20_000_000),  # a stream
    ],
)
def test_suitable_length(train_chars: int | None, expected: int) -> None:
    """Passes over a short, a middling and a long text, in characters."""
    assert suitable_chars(train_chars) == expected


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, 0.02), (800, 0.02), (1_602, 0.014), (3_204, 0.01), (9_610, 0.0058), (15_625, 0.0045)]
)
def test_suitable_rate_of_muon(steps: int, expected: float) -> None:
    """The default up to 800 steps, a half of it after four times as many."""
    assert suitable_settings(steps, 1.0)["muon_lr"] == expected


@pytest.mark.parametrize(("passes", "expected"), [(0.0, 0.0), (1.99, 0.0), (2.0, 0.1), (20.0, 0.1)])
def test_suitable_weight_decay(passes: float, expected: float) -> None:
    """A text that is read at least twice is not to be memorized."""
    assert suitable_settings(1, passes)["weight_decay"] == expected


@pytest.mark.parametrize(
    ("budget", "train_chars", "expected"),
    [
        (Budget(chars=12_345), None, 10),
        (Budget(epochs=2, steps_per_epoch=7), None, 14),
        (Budget(epochs=2), None, 1_000),
        (Budget(), 100_000, 547),  # 700,000 characters
        (Budget(), None, 15_625),
        # 3,600 s, less a second for each of 20 ends of epochs, at 3,000 characters a second.
        (Budget(minutes=60), None, 8_391),
    ],
)
def test_expected_steps(budget: Budget, train_chars: int | None, expected: int) -> None:
    """The steps that a new run will have; minutes at a nominal speed."""
    assert budget.expected_steps(chars_per_step=1_280, train_chars=train_chars) == expected


def test_a_sequence_for_each_rank() -> None:
    """The default step has a sequence for each rank; a requested number stays, and so does that of recipe seed."""
    sizes = [
        TrainRequest(**given).training(None, 3)[0].batch_size for given in ({}, {"train": {"batch_size": 1}}, {"recipe": "seed"})
    ]

    assert sizes == [3, 1, 8]
    assert [TrainRequest().training(None, ranks)[0].batch_size for ranks in (1, 2, 3, 4)] == [2, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "is_open"), [({}, True), ({"chars": 5}, False), ({"minutes": 1.0}, False), ({"epochs": 2}, False)]
)
def test_length_of_a_recipe(given: dict[str, int], is_open: bool) -> None:
    """The original's 300 epochs, unless a length is given; recipe fast has none of its own."""
    _, fast = TrainRequest(recipe="fast", length=given).training(None)
    _, seed = TrainRequest(recipe="seed", length=given).training(None)

    assert fast.is_open is is_open
    assert seed.epochs == (300 if is_open else given.get("epochs"))


@pytest.mark.parametrize(
    ("step", "ends", "left"),
    [(7, True, 3), (8, False, 3), (16, False, 3), (17, True, 2), (27, True, 1), (29, False, 1), (30, True, 0)],
)
def test_epochs_counted_from_a_step(step: int, ends: bool, left: int) -> None:
    """Epochs of 10 steps from step 7 on: they end with 17, 27 and the run's 30."""
    schedule = Schedule(total_steps=30, steps_per_epoch=10, val_steps=1, epoch_start=7)

    assert schedule.ends_epoch(step) is ends
    assert schedule.epochs_left(step) == left


def test_schedule_of_a_run_that_goes_on() -> None:
    """Minutes and characters are those of the whole run: what is done and spent counts."""
    spent = Pace(seconds_per_step=0.4, seconds_per_val_batch=0.5, seconds_per_epoch_end=1.0, seconds_spent=240.0)

    # 60 s are left, 15 of them for epoch ends: 90 steps more.
    assert Budget(minutes=5).schedule(chars_per_step=1, pace=spent, steps_done=400).total_steps == 490
    assert Budget(minutes=4).schedule(chars_per_step=1, pace=spent, steps_done=400).total_steps <= 400


def run_settings() -> RunSettings:
    """Settings with a value in every part."""
    return RunSettings(
        model=GPTConfig(),
        train=TrainConfig(),
        budget=Budget(minutes=1.0),
        schedule=Schedule(total_steps=1, steps_per_epoch=1, val_steps=1),
        data=DataConfig(text=("/a.txt",), name="a", characters=3, sha256="0"),
        dtype="float32",
        threads=2,
    )


def test_settings_round_trip() -> None:
    """Settings come back from their dict as they were, versions and the like beside them."""
    content = {**run_settings().to_dict(), "versions": {}}
    content["data"] = {**content["data"], "text": list(content["data"]["text"])}

    assert RunSettings.from_dict(content) == run_settings()


def test_settings_of_an_older_run() -> None:
    """What was not there when a run was begun stays out of it."""
    content = run_settings().to_dict()
    del content["train"]["muon_interval"], content["attention"]
    settings = RunSettings.from_dict(content)

    assert (settings.train.muon_interval, settings.attention) == (1, None)


def test_settings_of_an_unknown_attention() -> None:
    """A form of attention that is none is named, with those there are."""
    with pytest.raises(ConfigError, match="attention must be one of fused, products, got 'flash'"):
        RunSettings.from_dict({**run_settings().to_dict(), "attention": "flash"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "fp16", "dtype must be one of auto, float32, bfloat16, got 'fp16'"),
        ("device", "gpu", "device must be one of auto, cpu, cuda, mps, got 'gpu'"),
        ("threads", 0, "threads must be from 1 to 1024, got 0"),
        ("ranks", 0, "ranks must be a whole number of at least 1, got 0"),
        ("kernels", "cuda", "kernels must be one of auto, c, torch, got 'cuda'"),
    ],
)
def test_settings_of_an_unknown_backend(field: str, value: object, message: str) -> None:
    """An edited backend is named before torch is asked for it."""
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_dict({**run_settings().to_dict(), field: value})


def test_settings_of_an_unknown_folding() -> None:
    """A rule of folding that a newer version may have is named, and not read as another one."""
    content = run_settings().to_dict()
    content["data"]["fold"] = "greek"
    with pytest.raises(ConfigError, match="fold must be false, true or latin, got 'greek'"):
        RunSettings.from_dict(content)


@pytest.mark.parametrize("content", [{}, {"model": {"n_layers": 3}}, {"model": 5}], ids=["empty", "unknown field", "no dict"])
def test_settings_refused(content: dict[str, Any]) -> None:
    """A config that is damaged is one clear error."""
    with pytest.raises(ConfigError, match="the run's config is not valid"):
        RunSettings.from_dict(content)


def test_recipe_floor_follows_its_peak() -> None:
    """The original's lowest learning rate is a tenth of its highest, also where another one is given."""
    assert TrainConfig.from_recipe("seed", {"lr": 1e-5}).min_lr == pytest.approx(1e-6)
    assert TrainConfig.from_recipe("seed", {"lr": 1e-5, "min_lr": 0.0}).min_lr == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("-1", -1),
        ("+5", 5),
        ("2M", 2_000_000),
        ("2m", 2_000_000),
        ("1k", 1000),
        ("1.5k", 1500),
        ("0.002G", 2_000_000),
        ("1e6", 1_000_000),
        ("2.5e+3", 2500),
        ("1e3k", 1_000_000),
        ("40,960", 40_960),
        ("2_000_000", 2_000_000),
        ("3.0", 3),
        (str(2**64 - 1), 2**64 - 1),
    ],
)
def test_counts(text: str, number: int) -> None:
    """A whole number may be written in several ways, and is exact."""
    assert parse_count(text) == number


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "1.0005k", "1e-3", "1e1000", "2 M", "2MB", "1,00", "1__0", "inf", "nan", "٣", "0x10"]
)
def test_no_counts(text: str) -> None:
    """What is no whole number is rejected, and an example given."""
    with pytest.raises(ConfigError, match="is not a whole number; write it like 2000000, 2M or 2e6"):
        parse_count(text)
