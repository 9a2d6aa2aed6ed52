"""The way to the hub: malformed variables, and every request of a start and of a resume failing in every way, over real HTTP."""

from __future__ import annotations

import contextlib
import functools
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from picogpt.cli import train
from picogpt.data import (
    NAMED_STREAMS,
    ArticleReader,
    Shards,
    StreamSource,
    StreamSpec,
    articles,
    draw_validation,
    find_shards,
    first_articles,
    hub,
    network,
    outage,
    stream,
)
from picogpt.data.articles import Cursor
from picogpt.data.network import HubError, check_environment, explain
from picogpt.data.outage import Outage, run_in_thread
from picogpt.errors import DataError
from picogpt.tokenizer import CharTokenizer
from tests.conftest import HUB_PORT
from tests.data.test_stream import FLAGS, NOWHERE, README, SHARDS, article, decode, parquet
from tests.hub import Hub, serving
from tests.programs import kill_at_exit, program

KINDS: list[Any] = ["reset", 503, 429, "hang", "cut", "short"]
WIKIPEDIA = NAMED_STREAMS["wikipedia"]


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, a small pool, and a folder to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "REQUEST_TIMEOUT", 0.3)
    monkeypatch.setattr(outage, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(stream, "POOL", 8)
    monkeypatch.setattr(first_articles, "VALIDATION_CHARS", 500)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def served() -> Iterator[Hub]:
    """A small Wikipedia where this process looks for the hub."""
    served = Hub(
        "wikimedia/wikipedia", {f"20231101.en/train-0000{i}-of-00002.parquet": parquet(i * 50, 50) for i in range(2)} | README
    )
    with serving(served, HUB_PORT):
        yield served


def forget() -> None:
    """Begin as a process does that has never asked the hub for anything."""
    import huggingface_hub

    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE, ignore_errors=True)


def begin(notices: list[str] | None = None) -> Shards:
    """Ask for all that a first start asks for: files, columns and the validation text."""
    forget()
    notify = (notices if notices is not None else []).append
    shards = find_shards(WIKIPEDIA, notify)
    draw_validation(ArticleReader(shards, 7, notify, patience=outage.START_PATIENCE), 500)
    return shards


def resume(shards: Shards) -> list[str]:
    """Ask for all that the rest of a pass asks for."""
    forget()
    found = []
    for item in ArticleReader(shards, 7, lambda _: None).articles(Cursor(0, 0, 5)):
        if item.cursor.pass_number:
            break
        found.append(decode(item.ids))
    return found


SHIFTS = [0, *(pytest.param(shift, marks=pytest.mark.slow) for shift in range(1, len(KINDS)))]
"""All requests with one kind of fault each; the slow tests go through all the other pairs of request and kind."""


def requests_that_may_fail(served: Hub, work: Callable[[], object], shift: int) -> int:
    """How many requests `work` makes, each of which may fail once without a difference; the k-th does so in kind k + shift."""
    served.requests.clear()
    expected = work()
    count = len(served.requests)
    for k in range(count):
        served.requests.clear()
        kind = KINDS[(k + shift) % len(KINDS)]
        served.fault_of = {k: kind}.get
        assert work() == expected, f"{kind} at request {k}"
    return count


@pytest.mark.slow
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_request_of_a_start(served: Hub, shift: int) -> None:
    """Whichever request of a first start fails, in whatever way, it is asked again and the start is as it would have been."""
    assert requests_that_may_fail(served, begin, shift) > 12


@pytest.mark.parametrize("shift", SHIFTS)
def test_every_request_of_a_resume(served: Hub, shift: int) -> None:
    """So is each request of a run that resumes: no article is lost or repeated."""
    shards = begin()
    assert requests_that_may_fail(served, functools.partial(resume, shards), shift) > 3


def from_on(k: int, kind: Any, number: int) -> Any:
    """The fault of request `number` where all from the k-th on fail."""
    return kind if number >= k else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "junk"])
def test_a_start_gives_up_after_a_stated_time(
    served: Hub, kind: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every request from the k-th on fails, a start says how long it tries, then ends with one line and exit code 1."""
    forget()
    find_shards(WIKIPEDIA)
    monkeypatch.setattr(outage, "START_PATIENCE", 0.2)
    monkeypatch.setattr(hub, "START_PATIENCE", 0.2)
    monkeypatch.setattr(outage, "DAMAGE_PATIENCE", 0.2)
    monkeypatch.setattr(network, "REQUEST_TIMEOUT", 0.05)
    # The one after those for the list of files and the columns is for the validation text.
    for k in range(len(served.requests) + 1):
        forget()
        served.requests.clear()
        served.fault_of = functools.partial(from_on, k, kind)
        code = train.main(["--dataset", "wikipedia", *FLAGS])
        err = capsys.readouterr().err
        assert code == 1, (k, err)
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("picogpt-train: "), err
        assert kind == "junk" or "check the network" in err.splitlines()[-1] or "damaged" in err.splitlines()[-1], err
    assert not Path("logs").exists()


def fail_for_ever(waiting: Outage, *, damaged: bool) -> None:
    """Fail until the outage gives up."""
    while True:
        waiting.wait("x", "reset", damaged=damaged)


def test_explain() -> None:
    """The class of the innermost cause and its message; of our own error, whose message says what failed, that alone."""
    failed = OSError("request failed")
    failed.__cause__ = HubError("ConnectError: name not known\nand more")

    assert explain(failed) == "ConnectError: name not known"
    assert explain(TimeoutError()) == "TimeoutError: TimeoutError"


def test_the_stated_time_of_a_start() -> None:
    """A start tries for half a minute."""
    now = [0.0]
    notices: list[str] = []

    def pause(seconds: float) -> bool:
        now[0] += seconds
        return False

    waiting = Outage(notices.append, pause, lambda: now[0], patience=outage.START_PATIENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outage, "LONGEST_WAIT", 60.0)
        with pytest.raises(DataError, match=r"x: no answer for 31 s \(reset\); check the network, then start the same command"):
            fail_for_ever(waiting, damaged=False)

    assert notices == ["x: reset; no answer for 0 s, retrying for 30 s more"]


def test_damage_on_the_hub_is_not_waited_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong bytes are tried for half a minute; an outage of hours before and between does not count."""
    monkeypatch.setattr(outage, "LONGEST_WAIT", 60.0)
    now = [0.0]

    def pause(seconds: float) -> bool:
        now[0] += seconds
        return False

    waiting = Outage(lambda _: None, pause, lambda: now[0])
    for _ in range(3):
        for _ in range(100):
            waiting.wait("x", "reset")
        waiting.wait("x", "wrong bytes", damaged=True)
    waiting.over()
    with pytest.raises(
        DataError, match=r"x: cannot be read, tried for 31 s \(reset\); the file is damaged or has another format"
    ):
        fail_for_ever(waiting, damaged=True)


FORMATS = {
    "train.csv": b"id,text\n" + b"".join(f'{i},"{article(i)}"\n'.encode() for i in range(100)) + b"100,NA\n",
    "train.tsv": b"id\ttext\n" + b"".join(f"{i}\t{article(i)}\n".encode() for i in range(100)) + b"100\tNA\n",
    "train.txt": b"".join(f"{article(i)}\n".encode() for i in range(100)) + b"NA\n",
    "train.jsonl": b"".join(f'{{"text": "{article(i)}"}}\n'.encode() for i in range(100)) + b'{"text": "NA"}\n',
    "train[1].jsonl": b"".join(f'{{"text": "{article(i)}"}}\n'.encode() for i in range(100)) + b'{"text": "NA"}\n',
    "train #?%41 x.txt": b"".join(f"{article(i)}\n".encode() for i in range(100)) + b"NA\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_the_hub(name: str) -> None:
    """Tables, texts and names of any characters are read from the hub, and half an answer of theirs is no end of theirs."""
    served = Hub("some/thing", {name: FORMATS[name]})
    served.data = name
    with serving(served, HUB_PORT):
        forget()
        shards = find_shards(StreamSpec(name="some/thing", path="some/thing"))
        served.faults += ["short", "cut", "reset"]
        found = []
        for item in ArticleReader(shards, 7, lambda _: None).articles(Cursor(0, 0, 0)):
            if item.cursor.pass_number:
                break
            found.append(decode(item.ids))

    assert found == [*(article(i) for i in range(100) if article(i)), "na"]
    assert not served.faults


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": b"body,n\nx,1\n"}, "some/thing: it has no column text; name one of body, n with --text-column"),
        ({"train.jsonl": b""}, "some/thing: cannot be read, tried for .* s .it has no rows.; the file is damaged"),
        ({"a.xyz": b"x"}, "some/thing: it has no data files"),
        ({}, "some/thing: it has no data files"),
        ({"train.parquet": b"no parquet"}, "some/thing: cannot be read, tried for .* s .*; the file is damaged"),
        ({"test.jsonl": b'{"text": "x"}\n'}, "some/thing: it has no train split; it has test"),
        ({"train.txt": b"caf\xe9"}, "some/thing: cannot be read, tried for .* s .*; the file is damaged"),
    ],
)
def test_what_is_wrong_on_the_hub(files: dict[str, bytes], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without data, without the column or with a damaged file is one line, soon."""
    monkeypatch.setattr(outage, "DAMAGE_PATIENCE", 0.1)
    with serving(Hub("some/thing", files), HUB_PORT):
        forget()
        with pytest.raises(DataError, match=message):
            find_shards(StreamSpec(name="some/thing", path="some/thing"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080", r"socks5://127.0.0.1:1080: SOCKS proxies need one more package; pip install"),
        ("all_proxy", "http://[::1", "not a valid address; set it to http://HOST:PORT"),
        ("HTTPS_PROXY", "ftp://proxy", "not a valid address"),
        ("HTTPS_PROXY", "http://joe:secret@proxy:0", r"'http://\*\*\*@proxy:0' is not a valid address"),
        ("HTTP_PROXY", "joe:sec/r@t@proxy:0", r"'http://\*\*\*@proxy:0' is not a valid address"),
        ("ALL_PROXY", "socks5://joe:secret@127.0.0.1:1080", r"ALL_PROXY: socks5://\*\*\*@127.0.0.1:1080: SOCKS proxies need"),
        ("https_proxy", "http://host:port", "not a valid address"),
        ("HTTP_PROXY", "://", "not a valid address"),
        ("HTTP_PROXY", "http://a b:3", "not a valid address"),
        ("HF_ENDPOINT", "notaurl", "'notaurl' is not a valid address; set it to https://huggingface.co"),
        ("HF_ENDPOINT", "https://", "not a valid address"),
        ("HF_TOKEN", "\u201chf_abc\u201d", "'\u201c' cannot be part of a token; copy it again"),
        ("HF_TOKEN", "hf_a bc", "' ' cannot be part of a token"),
        ("HUGGING_FACE_HUB_TOKEN", "hf_\u00e9", "'\u00e9' cannot be part of a token"),
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set, and a stream needs the hub; unset HF_HUB_OFFLINE, or use --text"),
    ],
)
def test_malformed_variables(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    """A proxy, an address or a token that is malformed is named before anything is asked for."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(network, "find_spec", lambda _: None)

    with pytest.raises(DataError, match=rf"^{variable}.*{message}" if not message.startswith(variable) else message):
        check_environment()


def test_good_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library takes is taken."""
    for variable, value in {
        "ALL_PROXY": "socks5h://me:secret@127.0.0.1:1080",
        "HTTPS_PROXY": "proxy:3128",
        "http_proxy": "http://[::1]:80/",
        "HF_ENDPOINT": "https://mirror.example/hub",
        "HF_TOKEN": " hf_abc\n",
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(network, "find_spec", lambda _: True)

    check_environment()


def test_malformed_variables_at_a_start_and_a_resume(
    served: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are one line, and nothing is asked for."""
    forget()
    assert train.main(["--dataset", "wikipedia", *FLAGS, "--epochs", "1", "--steps-per-epoch", "2"]) == 0
    capsys.readouterr()
    served.requests.clear()
    monkeypatch.setenv("ALL_PROXY", "nonsense://")
    hub._library.cache_clear()
    for flags in (["--run", "wikipedia", "--epochs", "2"], ["--dataset", "wikipedia", "--run", "new", *FLAGS]):
        assert train.main(flags) == 1
        assert capsys.readouterr().err.startswith(
            "picogpt-train: ALL_PROXY: 'nonsense://' is not a valid address; set it to http://HOST"
        )
    assert served.requests == []
    monkeypatch.delenv("ALL_PROXY")


def test_a_stored_token_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that a login has left is named."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "\u201chf_abc\u201d")

    with pytest.raises(DataError, match="token: it has no valid token; log in again, or delete the file"):
        network.disable_retries()


def test_certificates_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else keeps the library from making a connection is one line."""

    def broken() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/gone.pem")

    monkeypatch.setattr("huggingface_hub.utils._http.default_client_factory", broken)
    with pytest.raises(
        DataError, match=r"no connection can be made \(/gone.pem: No such file or directory\); check NO_PROXY, SSL_CERT"
    ):
        network.disable_retries()


def test_a_cache_that_cannot_be_written(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unwritable HOME is no network that is gone."""

    def refused(*_: object) -> None:
        raise OSError(30, "Read-only file system", "/home/me/.cache")

    monkeypatch.setattr(hub, "_ask_hub", refused)
    with pytest.raises(DataError, match=r"\(/home/me/.cache: Read-only file system\); set HF_HOME to a writable folder"):
        find_shards(WIKIPEDIA)


def test_work_in_the_background() -> None:
    """Its answer and its error come back, and its pause ends once nobody waits."""
    assert run_in_thread(lambda pause: pause(0)) is False

    with pytest.raises(ZeroDivisionError):
        run_in_thread(lambda _: 1 // 0)


def texts(rows: list[str]) -> Any:
    """A reader of files that all have these rows."""
    return lambda _file, row: iter([(text,) for text in rows[row:]])


def test_a_stream_too_short_for_a_sequence() -> None:
    """A whole pass without text for one sequence is one line, at a first start and while batches are drawn."""
    reader = ArticleReader(SHARDS, 7, lambda _: None, texts(["short"] * 9))
    message = (
        r"file-0 and 2 more files: too short, \d+ characters to train on where a sequence needs 1,001 \(one article in 20 is"
    )
    with pytest.raises(DataError, match=message):
        draw_validation(reader, sequence_len=1000)
    short = StreamSource(
        ArticleReader(SHARDS, 7, lambda _: None, texts(["short"] * 9)), SHARDS_VALIDATION, sequence_len=1000, batch_size=2, seed=0
    )
    short.begin(NOWHERE)

    with pytest.raises(DataError, match=message):
        short.train_batch(0)
    short.close()


SHARDS_VALIDATION = CharTokenizer().encode("\n\n")


def test_nothing_but_validation() -> None:
    """A data set whose every article is for validation has nothing to train on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(articles, "_is_for_validation", lambda *_: True)
        with pytest.raises(DataError, match="too short, 0 characters to train on where a sequence needs 11 "):
            draw_validation(ArticleReader(SHARDS, 7, lambda _: None, texts(["an article"])), sequence_len=10)


def test_a_sequence_over_two_passes_is_enough_where_a_pass_has_one() -> None:
    """A pass with text for one sequence begins; one that was resumed in its middle is not taken for a short one."""
    source = StreamSource(
        ArticleReader(SHARDS, 7, lambda _: None, texts(["long enough"] * 9)),
        SHARDS_VALIDATION,
        sequence_len=40,
        batch_size=2,
        seed=0,
    )
    source._cursor = Cursor(3, 2, 8)
    source.begin(NOWHERE)

    assert source.train_batch(0).inputs.shape == (2, 40)
    source.close()


def test_a_bug_in_the_reader_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the reader's thread reaches whoever takes articles; nobody waits for ever."""
    reader = ArticleReader(SHARDS, 7, lambda _: None, texts(["x"]))
    monkeypatch.setattr(reader, "_encode", lambda _: 1 // 0)
    reader.start(Cursor(0, 0, 0))

    with pytest.raises(ZeroDivisionError):
        reader.take(lambda: False)
    reader.close()


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["listing", "validation", "pool"])
def test_signals_while_it_starts(served: Hub, number: int, stage: str, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM end a start at once, or as soon as it is saved, while the hub hangs, or sends articles that never fill the pool."""
    endless = "stream.POOL=1000000" if stage == "pool" else "first_articles.VALIDATION_CHARS=1000000000"
    home = tmp_path / "home"
    forget()
    find_shards(WIKIPEDIA)
    asked = len(served.requests)
    served.requests.clear()
    if stage == "validation":
        served.fault_of = lambda count: "hang" if count >= asked else None
    if stage == "listing":
        served.fault_of = lambda _: "hang"
    starting = subprocess.Popen(
        program("train_with_constants", f"picogpt.data.{endless}", "--dataset", "wikipedia", *FLAGS),
        env=served.environment(HUB_PORT, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with kill_at_exit(starting) as process:
        assert process.stderr is not None
        if stage == "pool":
            for line in iter(process.stderr.readline, ""):
                if "steps of" in line:
                    break
        else:
            wanted = 1 if stage == "listing" else asked + 1
            deadline = time.monotonic() + 60
            while len(served.requests) < wanted and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        began = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=20)

    assert process.returncode in {128 + number, -number}, err
    assert time.monotonic() - began < 10
    assert "Traceback" not in err
