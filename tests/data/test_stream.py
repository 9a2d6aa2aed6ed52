"""Streams: the real library over real HTTP against a hub on the loopback, and the pool against plain iterables.

`PICOGPT_TORTURE=10 pytest tests/data/test_stream.py` resumes ten times as often.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picogpt.cli import train
from picogpt.data import (
    NAMED_STREAMS,
    ArticleReader,
    Shards,
    StreamSource,
    StreamSpec,
    WaitInterrupted,
    articles,
    draw_validation,
    find_shards,
    first_articles,
    outage,
    resolve_stream,
    stream,
)
from picogpt.data.articles import Article, Cursor
from picogpt.data.first_articles import Validation
from picogpt.data.outage import Outage
from picogpt.data.shards import Row
from picogpt.errors import ConfigError, DataError, RunError
from picogpt.runs.folder import RunFolder
from picogpt.tokenizer import CharTokenizer
from tests.conftest import HUB_PORT, TINY_FLAGS, checkpoint_bytes
from tests.hub import COMMIT, Hub, free_port, serving
from tests.programs import kill_at_exit, program

TIMES = int(os.environ.get("PICOGPT_TORTURE", "1"))
FILES = tuple(f"file-{i}" for i in range(3))
SHARDS = Shards(files=FILES, format="parquet", columns=("text",), commit=COMMIT)
decode = CharTokenizer().decode


class Nowhere:
    """Keeps no validation text."""

    def save_validation(self, ids: npt.NDArray[np.uint8]) -> None:
        """Not kept."""


NOWHERE = Nowhere()


def article(number: int) -> str:
    """A text with a number of its own; some are empty, short or long."""
    if number % 11 == 0:
        return ""
    return f"({number}) " + " ".join(f"word{number % 17}{i}" for i in range(number % 13 * 9 + 1))


def rows_of(file: str, row: int) -> Iterator[Row]:
    """Rows of a data set of three files of 200 articles."""
    number = FILES.index(file)
    for i in range(row, 200):
        yield (article(number * 200 + i),)


def make_source(*, batch_size: int = 2, sequence_len: int = 40, read: Any = rows_of, notify: Any = None) -> StreamSource:
    """A source on that data set."""
    reader = ArticleReader(SHARDS, 7, notify or (lambda _: None), read)
    validation = draw_validation(ArticleReader(SHARDS, 7, lambda _: None, rows_of), 3000).ids
    return StreamSource(reader, validation, sequence_len=sequence_len, batch_size=batch_size, seed=7)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small pool and short waits."""
    monkeypatch.setattr(stream, "POOL", 64)
    monkeypatch.setattr(outage, "LONGEST_WAIT", 0.02)


def batches(source: StreamSource, steps: range) -> list[bytes]:
    """The inputs of some steps."""
    return [source.train_batch(k).inputs.tobytes() for k in steps]


def test_goes_on_at_the_very_article() -> None:
    """A hundred stops at random, each resumed in a new source from the snapshot: the batches of one that never stopped."""
    straight = make_source()
    straight.begin(NOWHERE)
    expected = batches(straight, range(400))
    straight.close()
    generator = random.Random(0)
    source = make_source()
    source.begin(NOWHERE)
    found: list[bytes] = []
    stops = sorted(generator.sample(range(1, 400), 100))
    for start, end in zip([0, *stops], [*stops, 400], strict=True):
        found += batches(source, range(start, end))
        arrays, plain = source.snapshot()
        source.close()
        source = make_source()
        source.restore(arrays, plain)
    source.close()

    assert found == expected


def test_the_pool_grows() -> None:
    """It has 64 sequences for the first batch, grows by a batch's two at each, and ends at eight times as many."""
    source = make_source()
    source.begin(NOWHERE)
    sizes = []
    for k in range(300):
        source.train_batch(k)
        sizes.append(len(source.snapshot()[0]["pool"]))
    source.close()

    assert sizes == [min(64 + 2 * (k + 1), 512) for k in range(300)]


def test_snapshot_bytes() -> None:
    """What a checkpoint holds of a stream is known before the first step, but for a part of an article."""
    source = make_source()
    need = source.snapshot_bytes
    source.begin(NOWHERE)
    for k in range(300):
        source.train_batch(k)
    arrays, _ = source.snapshot()
    source.close()

    carry = arrays.pop("carry")
    assert 0 <= need - sum(array.nbytes for array in arrays.values()) < 1000
    assert len(carry) < 1000
    assert source.snapshot_bytes == need


def digests(file: str, row: int) -> Iterator[Row]:
    """Rows of a data set of three files of 200 articles without a word in common."""
    for i in range(row, 200):
        yield (hashlib.sha256(f"{file} {i}".encode()).hexdigest(),)


def test_passes_are_cut_and_ordered_anew() -> None:
    """Later passes over the same articles bring hardly a sequence that an earlier one brought."""
    source = make_source(read=digests)
    source.begin(NOWHERE)
    inputs = [sequence.tobytes() for k in range(2000) for sequence in source.train_batch(k).inputs]
    passes = source._usage.train_chars / (600 * 66)
    source.close()

    assert passes > 4
    # Sequences of 40 characters are cut at the same place as in an earlier pass one time in 40.
    assert len(set(inputs)) > 0.9 * len(inputs)


def test_every_article_is_read_once_a_pass() -> None:
    """In a pass each article that is not empty comes once, in the order of its file, files in another order each pass."""
    reader = ArticleReader(SHARDS, 7, lambda _: None, rows_of)
    read = []
    for item in reader.articles(Cursor(0, 0, 0)):
        if item.cursor.pass_number == 2:
            break
        read.append((item.cursor.pass_number, decode(item.ids).partition(" ")[0]))
    expected = {f"({n})" for n in range(600) if n % 11}

    for epoch in (0, 1):
        names = [name for number, name in read if number == epoch]
        assert len(names) == len(expected)
        assert set(names) == expected
    assert [name for number, name in read if number == 0] != [name for number, name in read if number == 1]


def test_text_is_cut_without_loss() -> None:
    """Sequences laid end to end, each beginning with the last character of the one before, are the articles joined."""
    source = make_source()
    source.begin(NOWHERE)
    for _ in range(50):
        source._cut_next(lambda: False)
    source.close()
    sequences = [sequence for sequence, _ in source._fresh]
    text = decode(np.concatenate([sequences[0], *(sequence[1:] for sequence in sequences[1:])]))
    reader = ArticleReader(SHARDS, 7, lambda _: None, rows_of)
    joined = ""
    for item in reader.articles(Cursor(0, 0, 0)):
        if not item.for_validation:
            joined += decode(item.ids) + "\n\n"
        if len(joined) > len(text):
            break

    assert joined.startswith(text)
    assert all(sequence[0] == before[-1] for before, sequence in itertools.pairwise(sequences))


def test_share_of_text() -> None:
    """Every article is counted once, on its side, however often the run was resumed, and the share is said."""
    source = make_source()
    source.begin(NOWHERE)
    for k in range(300):
        source.train_batch(k)
        if k % 50 == 49:
            arrays, plain = source.snapshot()
            source.close()
            source = make_source()
            source.restore(arrays, plain)
    source.close()
    cursor, found = source._cursor, dict.fromkeys(("train", "val", "train chars", "val chars", "empty"), 0)
    for item in ArticleReader(SHARDS, 7, lambda _: None, rows_of).articles(Cursor(0, 0, 0)):
        if item.cursor >= cursor:
            break
        side = "val" if item.for_validation else "train"
        found[side] += 1
        found[f"{side} chars"] += len(item.ids)
        found["empty"] += item.empty_before
    share = found["train chars"] / (found["train chars"] + found["val chars"])

    assert min(found.values()) > 3
    assert source.summary() == (
        f"read so far: {found['train']:,} articles with {found['train chars']:,} characters to train on, {found['val']:,} with "
        f"{found['val chars']:,} for validation, {found['empty']:,} empty ones; {share:.1%} of the text is trained on"
    )


def test_batches_mix_articles() -> None:
    """The sequences of a batch begin in different articles."""
    source = make_source(batch_size=8)
    source.begin(NOWHERE)
    for k in range(50):
        source.train_batch(k)
        articles = [source._article_of[row] for row in source._draw(k + 1)]
        assert len(set(articles)) == 8
    source.close()


def sides(seed: int) -> dict[str, bool]:
    """Of each article of the first pass, whether it is for validation."""
    found: dict[str, bool] = {}
    for item in ArticleReader(SHARDS, seed, lambda _: None, rows_of).articles(Cursor(0, 0, 0)):
        if item.cursor.pass_number:
            return found
        found[decode(item.ids).partition(" ")[0]] = item.for_validation
    return found


def test_validation_articles_are_never_trained_on() -> None:
    """About one in twenty, the same ones whatever the order, and none of them in the pool."""
    here = sides(7)
    source = make_source()
    source.begin(NOWHERE)
    for k in range(300):
        source.train_batch(k)
    pool = "".join(decode(sequence) for sequence in source._pool)
    source.close()

    assert here == sides(99)
    assert 0.02 < sum(here.values()) / len(here) < 0.1
    assert not [name for name, validation in here.items() if validation and f"\n\n{name} " in pool]


def test_question_and_answer() -> None:
    """Two columns are a question and its answer in their tokens."""
    shards = Shards(files=("f",), format="parquet", columns=("question", "response"), commit=COMMIT)
    reader = ArticleReader(shards, 0, lambda _: None, lambda *_: iter([("Why?", "Because.")]))

    assert decode(next(reader.articles(Cursor(0, 0, 0))).ids) == "<Q>why?</Q>\n<A>because.</A>"


class Broken:
    """Rows that fail now and then, each time in another way."""

    def __init__(self, errors: list[Exception], every: int = 17) -> None:
        self.errors, self.every, self.count = errors, every, 0

    def __call__(self, file: str, row: int) -> Iterator[Row]:
        for columns in rows_of(file, row):
            self.count += 1
            if self.count % self.every == 0 and self.errors:
                raise self.errors.pop(0)
            yield columns


def test_outages_are_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks, it goes on from the very article, says so each time, and the batches are the same."""
    straight = make_source()
    straight.begin(NOWHERE)
    expected = batches(straight, range(900))
    straight.close()
    errors: list[Exception] = [ConnectionError("reset"), TimeoutError("hang"), ValueError("wrong bytes"), OSError("no name")] * 3
    notices: list[str] = []
    monkeypatch.setattr(outage, "NOTICE_INTERVAL", 0.0)
    source = make_source(read=Broken(errors), notify=notices.append)
    source.begin(NOWHERE)
    found = batches(source, range(900))
    source.close()

    assert found == expected
    assert len(notices) == 24
    assert re.fullmatch(r"file-\d, row \d+: ConnectionError: reset; no answer for 0 s, retrying for 86,400 s more", notices[0])
    assert notices[1] == "the stream is back after 0 s"


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


def wait_for_ever(waiting: Outage) -> None:
    """Fail without an end."""
    while True:
        waiting.wait("f, row 3", "reset")


def test_hours_of_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits grow to a minute; a line at once, one a minute, and one when it is over; after a day it gives up."""
    monkeypatch.setattr(outage, "LONGEST_WAIT", 60.0)
    clock = Clock()
    notices: list[tuple[float, str]] = []
    waiting = Outage(lambda line: notices.append((clock.now, line)), clock.wait, lambda: clock.now)
    waiting.over()
    while clock.now < 5 * 3600:
        waiting.wait("f, row 3", "ConnectionError: down")
    waiting.over()
    waiting.over()
    times = [when for when, _ in notices]

    assert clock.waits[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert times[0] == 0
    assert all(60 <= later - earlier <= 120 for earlier, later in itertools.pairwise(times[:-1]))
    assert notices[1][1].startswith("f, row 3: ConnectionError: down; no answer for 63 s, retrying for 86,337 s more")
    assert notices[-1] == (clock.now, f"the stream is back after {clock.now:,.0f} s")
    with pytest.raises(
        DataError, match=r"f, row 3: no answer for 86,4\d\d s \(reset\); check the network, then start the same command again"
    ):
        wait_for_ever(waiting)


def test_a_flapping_network_is_not_a_flood_of_lines() -> None:
    """Failures that follow each other closely are said once a minute."""
    clock = Clock()
    notices: list[str] = []
    waiting = Outage(notices.append, clock.wait, lambda: clock.now)
    for _ in range(1000):
        waiting.wait("f, row 3", "reset")
        waiting.over()

    assert len(notices) == 2


def test_gives_up_after_a_stated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When patience is over there is one clear line."""
    monkeypatch.setattr(outage, "PATIENCE", 0.05)
    monkeypatch.setattr("threading.Event.wait", lambda self, timeout=None: self.is_set())
    source = make_source(read=Broken([ConnectionError("down")] * 10**6, every=1))
    source.begin(NOWHERE)

    with pytest.raises(
        DataError, match=r"no answer for \d s \(ConnectionError: down\); check the network, then start the same command again"
    ):
        source.train_batch(0)
    source.close()


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("gated")])
def test_what_is_gone_is_not_waited_for(error: Exception) -> None:
    """A file that is not there any more ends the run at once."""
    source = make_source(read=Broken([error], every=5))
    source.begin(NOWHERE)

    with pytest.raises(DataError, match=r"file-\d: cannot be read \((FileNotFoundError: gone|PermissionError: gated)\); "):
        source.train_batch(0)
    source.close()


def test_articles_of_all_sizes() -> None:
    """Null and empty ones are passed over and counted, tiny ones joined, one of 10 MB cut, and nothing between is lost."""
    texts = ["", "a", "b" * 10_000_000, "", "", "c", *(f"d{i}" for i in range(2000))]
    shards = Shards(files=("one",), format="parquet", columns=("text",), commit=COMMIT)
    reader = ArticleReader(shards, 0, lambda _: None, lambda _, row: iter([(text,) for text in texts[row:]]))
    source = StreamSource(reader, np.zeros(100, np.uint8), sequence_len=10_000, batch_size=2, seed=0)
    source.begin(NOWHERE)
    while source._usage.train_articles < 1000:
        source._cut_next(lambda: False)
    source.close()
    sequences = [sequence for sequence, _ in source._fresh]
    text = decode(np.concatenate([sequences[0], *(sequence[1:] for sequence in sequences[1:])]))
    kept = [text for row, text in enumerate(texts) if text and not articles._is_for_validation("one", row)]

    assert "\n\n".join(kept).startswith(text.removesuffix("\n"))
    assert len(text) > 10_000_000
    assert source._usage.empty_articles == 3


def test_a_column_of_numbers(here: Path) -> None:
    """A column that holds no text is one line, and not waited for."""
    pq.write_table(pa.table({"text": list(range(50))}), here / "train.parquet")

    with pytest.raises(DataError, match="train.parquet: column text holds int, not text; name another one with --text-column"):
        find_shards(StreamSpec(name="x", path=str(here)))


def test_folder_without_a_part_for_training(here: Path) -> None:
    """The parts that there are, are named."""
    (here / "test.jsonl").write_text('{"text": "one"}\n')

    with pytest.raises(DataError, match="it has no train split; it has test"):
        find_shards(StreamSpec(name="x", path=str(here)))


def test_a_process_ends_while_it_reads(here: Path) -> None:
    """What the library still reads neither holds up nor aborts a process that ends."""
    digits = random.Random(0).randbytes(20_000_000).hex()  # not to be packed into one read
    texts = [digits[i : i + 1000] for i in range(0, len(digits), 1000)]
    pq.write_table(pa.table({"text": texts}), here / "train.parquet", row_group_size=1000)
    process = subprocess.run(program("end_while_reading"), check=False, capture_output=True, text=True, cwd=here, timeout=30)

    assert (process.returncode, process.stdout, process.stderr) == (3, "read", "")


def test_nothing_but_empty_articles() -> None:
    """A data set without text is said, and does not turn for ever."""
    reader = ArticleReader(SHARDS, 7, lambda _: None, lambda *_: iter([("",)] * 5))

    with pytest.raises(DataError, match="no text in the whole data set"):
        next(reader.articles(Cursor(0, 0, 0)))


def test_too_small_for_validation() -> None:
    """A data set of a handful of articles may have none for validation."""
    only = next(file for file in FILES if not articles._is_for_validation(file, 0))
    reader = ArticleReader(SHARDS, 7, lambda _: None, lambda file, row: iter([("one",)] if file == only else []))

    with pytest.raises(DataError, match="file-0 and 2 more files: too small, no article is held out for validation"):
        draw_validation(reader)


def test_the_length_of_a_short_stream() -> None:
    """A data set that ends before the validation text is complete has a known length, which a resumed run keeps."""

    def draw(characters: int) -> Validation:
        return draw_validation(ArticleReader(SHARDS, 7, lambda _: None, rows_of), characters)

    first_pass = itertools.takewhile(
        lambda item: item.cursor.pass_number == 0, ArticleReader(SHARDS, 7, print, rows_of).articles(Cursor(0, 0, 0))
    )
    trained_on = [len(item.ids) + 2 for item in first_pass if not item.for_validation]
    whole = draw(10**6)
    reader = ArticleReader(SHARDS, 7, print, rows_of)
    source = StreamSource(reader, whole.ids, sequence_len=40, batch_size=2, seed=7, train_chars=whole.train_chars)
    resumed = make_source()
    source.begin(NOWHERE)
    resumed.restore(*source.snapshot())
    for each in (source, resumed):
        each.close()

    assert whole.train_chars == sum(trained_on)
    assert draw(3000).train_chars is None
    assert (make_source().train_chars, source.train_chars, resumed.train_chars) == (None, whole.train_chars, whole.train_chars)


def test_a_short_stream_has_a_suitable_length(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a length a small file is not read twenty million times over, and its passes are counted, also after a resume."""
    rows = [json.dumps({"text": "sentences of some letters. " * 9}) for _ in range(100)]
    (here / "rows.jsonl").write_text("\n".join(rows))
    assert train.main(["--dataset", "rows.jsonl", *TINY_FLAGS, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "20 passes over the text" in told.out + told.err
    assert (
        train.main(["--dataset", "rows.jsonl", *TINY_FLAGS, "--chars", "4800", "--steps-per-epoch", "50", "--val-steps", "1"])
        == 0
    )
    assert "epoch 2 of 2, 0.2 passes" in capsys.readouterr().out
    assert train.main(["--run", "rows", "--chars", "9600", "--val-steps", "1"]) == 0
    assert "0.4 passes" in capsys.readouterr().out


def test_stop_while_waiting() -> None:
    """A stop that comes while nothing can be read loses nothing: what was cut is in the snapshot."""

    def stuck(file: str, row: int) -> Iterator[Row]:
        for i, columns in enumerate(rows_of(file, row), start=row):
            if i == 40:
                raise ConnectionError("down")
            yield columns

    straight = make_source()
    straight.begin(NOWHERE)
    expected = batches(straight, range(200))
    straight.close()
    notices: list[str] = []
    source = make_source(read=stuck, notify=notices.append)
    source.begin(NOWHERE)
    k = 0
    with contextlib.suppress(WaitInterrupted):
        for k in range(1000):
            source.train_batch(k, lambda: bool(notices) and not source._reader._buffer._items)
    assert 0 < k < 180
    arrays, plain = source.snapshot()
    source.close()
    other = make_source()
    other.restore(arrays, plain)

    assert batches(other, range(k, k + 20)) == expected[k : k + 20]
    other.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikipedia", StreamSpec(name="wikipedia", path="wikimedia/wikipedia", config="20231101.en")),
        ("a/b", StreamSpec(name="a/b", path="a/b")),
        ("a/b:c", StreamSpec(name="a/b:c", path="a/b", config="c")),
    ],
)
def test_names(name: str, expected: StreamSpec) -> None:
    """Names, repositories and their parts."""
    assert resolve_stream(name, None) == expected
    assert resolve_stream(name, "body").columns == ("body",)


def test_unknown_name() -> None:
    """Anything else is wrong usage."""
    with pytest.raises(
        ConfigError,
        match=r"dataset must be auto, sample, .* ORG/NAME\[:CONFIG\], a folder, or a file of .*, got 'wikipedla'; did you mean wikipedia\?$",
    ):
        resolve_stream("wikipedla", None)


def parquet(start: int, count: int = 250) -> bytes:
    """A file of articles, in row groups of 50."""
    texts = [article(i) if i % 7 else None for i in range(start, start + count)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [str(i) for i in range(count)], "text": texts}), sink, row_group_size=50)
    return sink.getvalue()


@pytest.fixture
def hub() -> Hub:
    """A small Wikipedia."""
    return Hub(
        "wikimedia/wikipedia", {f"20231101.en/train-0000{i}-of-00003.parquet": parquet(i * 250) for i in range(3)} | README
    )


README = {
    "README.md": b"---\nconfigs:\n- config_name: 20231101.en\n  data_files:\n  - split: train\n    path: 20231101.en/*\n---\n",
}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own waits between tries take no time, and a server that hangs is noticed soon."""
    import huggingface_hub

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(outage, "NOTICE_INTERVAL", 0.0)


@pytest.fixture
def library(hub: Hub) -> Iterator[Shards]:
    """The small Wikipedia over HTTP, in this process, through the real library."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    with serving(hub, HUB_PORT):
        yield find_shards(NAMED_STREAMS["wikipedia"])


EXPECTED = [article(i) for i in range(750) if i % 7 and i % 11]


def first_pass(shards: Shards, notices: list[str]) -> list[str]:
    """All texts of the first pass, in the data set's own order."""
    found: dict[str, list[str]] = {}
    for item in ArticleReader(shards, 7, notices.append).articles(Cursor(0, 0, 0)):
        if item.cursor.pass_number:
            break
        text = decode(item.ids)
        found.setdefault(str(item.cursor.file), []).append(text)
    return sorted(itertools.chain(*found.values()), key=EXPECTED.index)


@pytest.mark.parametrize("fault", ["reset", "hang", "cut", "short", "junk", 429, 500, 503, "loop"])
def test_each_fault_is_waited_out(hub: Hub, library: Shards, at_once: None, fault: int | str) -> None:
    """Whatever the server does, longer than the library's own patience, each article comes exactly once."""
    hub.faults += [None, None, None, *[fault] * 8]
    notices: list[str] = []

    assert first_pass(library, notices) == EXPECTED
    assert hub.faults == []
    assert notices
    assert re.fullmatch(r"the stream is back after \d s", notices[-1])


def test_no_name_is_waited_out(hub: Hub, library: Shards, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a network without names, and a hub that refuses connections when a file is to be opened."""
    look_up, failures = socket.getaddrinfo, iter(range(20))

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(failures, None) is not None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up(*arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", failing)
    hub.faults += [None, None, None, "reset"]
    notices: list[str] = []

    assert first_pass(library, notices) == EXPECTED
    assert next(failures, None) is None
    assert any("name resolution" in line for line in notices), notices


@pytest.mark.parametrize("status", [404, 416, 410, 401, 403])
def test_what_the_hub_refuses_is_final(hub: Hub, library: Shards, at_once: None, status: int) -> None:
    """A file that is gone, or not allowed, is one line that says what to do."""
    hub.faults += [None, None, None, *[status] * 3]
    advice = "set HF_TOKEN" if status in {401, 403} else "--fresh starts over"

    with pytest.raises(DataError, match=rf"wikipedia@{COMMIT}/.*parquet: cannot be read \(.*\); .*{advice}"):
        first_pass(library, [])


class Logged(ArticleReader):
    """Notes the place of every article that is taken."""

    def __init__(self, shards: Shards, log: list[Cursor]) -> None:
        super().__init__(shards, 7, lambda _: None)
        self.log = log

    def take(self, stop: Any) -> Article:
        item = super().take(stop)
        self.log.append(item.cursor)
        return item


def test_random_resumes_lose_and_repeat_nothing(library: Shards) -> None:
    """The places of all articles taken, over runs killed at random after a snapshot at random: each once, in order."""

    def source() -> StreamSource:
        return StreamSource(Logged(library, log), np.zeros(100, np.uint8), sequence_len=40, batch_size=2, seed=7)

    generator = random.Random(0)
    log: list[Cursor] = []
    found: list[bytes] = []
    running = source()
    running.begin(NOWHERE)
    for _ in range(10 * TIMES):
        found += batches(running, range(len(found), len(found) + generator.randrange(60)))
        (arrays, plain), taken = running.snapshot(), len(log)
        batches(running, range(len(found), len(found) + generator.randrange(30)))
        running.close()
        del log[taken:]  # what came after the snapshot has gone with the process
        running = source()
        running.restore(arrays, plain)
    found += batches(running, range(len(found), len(found) + 20))
    running.close()
    undisturbed = ArticleReader(library, 7, lambda _: None)
    expected = [item.cursor for item in itertools.islice(undisturbed.articles(Cursor(0, 0, 0)), len(log))]
    lost, repeated = len(set(expected) - set(log)), len(log) - len(set(log))

    assert (lost, repeated) == (0, 0), f"{10 * TIMES} resumes, {len(log):,} articles"
    assert log == expected
    log.clear()
    straight = source()
    straight.begin(NOWHERE)
    assert batches(straight, range(len(found))) == found
    straight.close()


def test_going_on_downloads_no_more_than_the_current_file(hub: Hub, library: Shards) -> None:
    """From a place in the last file on, no other file is asked for."""
    reader = ArticleReader(library, 7, lambda _: None)
    cursor = Cursor(0, 2, 5)
    hub.requests.clear()
    next(reader.articles(cursor))

    asked = {request.rpartition("/")[2] for request in hub.requests if ".parquet" in request}
    assert asked == {reader._file(cursor).rpartition("/")[2]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = [*TINY_FLAGS, "--epochs", "2", "--steps-per-epoch", "40", "--val-steps", "1", "--batch-size", "2"]


def start(hub: Hub, port: int, here: Path, *flags: str, **changes: str) -> subprocess.Popen[str]:
    """A real training process that takes the loopback for the hub."""
    command = program("train_on_a_short_stream", "--dataset", "wikipedia", *FLAGS, *flags)
    environment = {**hub.environment(port, here / "hf"), **changes}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with kill_at_exit(process):
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait, at most 20 s."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


@pytest.mark.slow
def test_over_http_with_faults_and_a_kill(hub: Hub, here: Path) -> None:
    """Resets, cut bodies, errors of the server and a `kill -9` on the way: the bytes of an undisturbed run."""
    with serving(hub) as port:
        length = ["--epochs", "4"]  # long enough after the first for a kill to come in time
        code, out, err = finish(start(hub, port, here, *length, "--run", "calm"))
        assert code == 0, err
        assert "wikimedia/wikipedia: 3 files at commit 0123456789ab, streamed" in err
        assert out.count("epoch") == 4
        with kill_at_exit(start(hub, port, here, *length, "--run", "rough")) as process:
            assert process.stdout is not None
            process.stdout.readline()
        assert process.returncode == -signal.SIGKILL
        hub.faults += ["reset", 503, "cut"]
        code, _, err = finish(start(hub, port, here, *length, "--run", "rough"))
        assert code == 0, err

    assert hub.faults == []
    assert checkpoint_bytes("rough") == checkpoint_bytes("calm")
    assert RunFolder(Path("logs/calm")).read_config()["data"]["commit"] == COMMIT


@pytest.mark.slow
def test_signal_during_an_outage(here: Path) -> None:
    """While a server hangs a signal still ends the run at once, saved, and it goes on when the network is back."""
    files = {f"20231101.en/train-{i:05}-of-00008.parquet": parquet(i * 25, 25) for i in range(8)}
    hub = Hub("wikimedia/wikipedia", files | README)
    with serving(hub) as port:
        with kill_at_exit(start(hub, port, here, "--run", "waiting", "--epochs", "200")) as process:
            assert process.stdout is not None
            process.stdout.readline()
            hub.faults += ["hang"] * 100
            wait_until(lambda: len(hub.faults) < 100)
            process.send_signal(signal.SIGTERM)
            code, _, err = finish(process)
        assert code == 128 + signal.SIGTERM, err
        assert "stopped and saved at step" in err
        hub.faults.clear()
        hub.released.set()
        with kill_at_exit(start(hub, port, here, "--run", "waiting", "--epochs", "200")) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("epoch")
            process.terminate()
            _, _, err = finish(process)

    assert "resuming from step" in err


@pytest.mark.slow
def test_going_on_without_the_hub(hub: Hub, here: Path) -> None:
    """A run needs no list of files to go on: offline, or without its commit, it says so; without a network it waits."""
    port = free_port()
    with serving(hub, port):
        assert finish(start(hub, port, here))[0] == 0
        offline = finish(start(hub, port, here, "--epochs", "3", HF_HUB_OFFLINE="1"))
        hub.commit = "f" * 40
        changed = finish(start(hub, port, here, "--epochs", "3"))
    hub.commit = COMMIT
    with kill_at_exit(start(hub, port, here, "--epochs", "3")) as process:
        assert process.stderr is not None
        failed = next(line for line in iter(process.stderr.readline, "") if "no answer" in line)
        hub.requests.clear()
        with serving(hub, port):
            code, out, err = finish(process)

    assert offline[0] == changed[0] == 1
    assert "unset HF_HUB_OFFLINE, or use --text" in offline[2]
    assert re.search(rf"wikipedia@{COMMIT}/.*parquet: cannot be read \(.*\); .*--fresh starts over", changed[2])
    assert re.search(r"train-0000\d-of-00003.parquet, row \d+: ConnectError: .*refused; no answer for 0 s, retrying for", failed)
    assert (code, out.count("epoch 3 of 3")) == (0, 1), err
    assert "the stream is back after" in err
    assert not [request for request in hub.requests if "README" in request]


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--dataset", "nobody/nothing"], {}, "nobody/nothing: no such data set on the hub, or it needs permission"),
        (["--dataset", "wikimedia/wikipedia:20231101.xx"], {}, "BuilderConfig '20231101.xx' not found"),
        (["--text-column", "body"], {}, "wikimedia/wikipedia: it has no column body; name one of id, text with --text-column"),
        ([], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and a stream needs the hub; unset HF_HUB_OFFLINE, or use --text"),
    ],
    ids=["wrong name", "wrong part", "missing column", "offline"],
)
def test_clear_lines(hub: Hub, here: Path, flags: list[str], changes: dict[str, str], message: str) -> None:
    """What cannot work is one line, exit 1, and nothing is written."""
    with serving(hub) as port:
        code, out, err = finish(start(hub, port, here, *flags, **changes))

    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert not (here / "logs").exists()


@pytest.mark.slow
def test_folder_like_the_hubs(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of parquet files is streamed like the hub's, under its own name; a changed one stops the run."""
    monkeypatch.setattr(first_articles, "VALIDATION_CHARS", 2000)
    folder = here / "my-articles"
    folder.mkdir()
    for i in range(2):
        (folder / f"train-{i}.parquet").write_bytes(parquet(i * 250))
    assert train.main(["--dataset", str(folder), *FLAGS]) == 0
    assert "2 files in this folder, streamed" in capsys.readouterr().err
    assert train.main(["--run", "my-articles", "--epochs", "3"]) == 0
    assert "resuming from step 80" in capsys.readouterr().err

    (folder / "train-1.parquet").write_bytes(parquet(1000))
    assert train.main(["--run", "my-articles", "--epochs", "4"]) == 1
    assert "text is" in capsys.readouterr().err


def test_damaged_validation(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A validation text that was changed is refused."""
    run = RunFolder(here / "run")
    run.create()
    run.save_validation(np.arange(50, dtype=np.uint8))
    assert np.array_equal(run.load_validation(), np.arange(50))
    path = run.path / "validation.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    with pytest.raises(RunError, match="validation.safetensors: damaged"):
        run.load_validation()
