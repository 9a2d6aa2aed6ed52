"""Standard input and output through real pipes and terminals: nothing is lost, and notices have lines of their own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from picogpt.config import GPTConfig
from picogpt.runs.folder import RunFolder
from tests.programs import kill_at_exit, program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither such pipes nor such terminals")

SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=8, context_len=8)
GENERATE = [sys.executable, "-m", "picogpt.cli.generate", "--threads", "1"]


@pytest.fixture(autouse=True)
def _model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an untrained model in it."""
    rng = np.random.default_rng(0)
    C = SHAPE.n_embd
    sizes = {
        "transformer.wte.weight": (SHAPE.vocab_size, C),
        "transformer.wpe.weight": (SHAPE.context_len + 1, C),
        "transformer.h.0.ln_1.weight": (C,),
        "transformer.h.0.ln_1.bias": (C,),
        "transformer.h.0.attn.c_attn.weight": (3 * C, C),
        "transformer.h.0.attn.c_attn.bias": (3 * C,),
        "transformer.h.0.attn.c_proj.weight": (C, C),
        "transformer.h.0.attn.c_proj.bias": (C,),
        "transformer.h.0.ln_2.weight": (C,),
        "transformer.h.0.ln_2.bias": (C,),
        "transformer.h.0.mlp.c_fc.weight": (4 * C, C),
        "transformer.h.0.mlp.c_fc.bias": (4 * C,),
        "transformer.h.0.mlp.c_proj.weight": (C, 4 * C),
        "transformer.h.0.mlp.c_proj.bias": (C,),
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
    }
    run = RunFolder(tmp_path / "logs" / "tiny")
    run.create()
    run.save_model({name: rng.normal(0, 0.1, size).astype(np.float32) for name, size in sizes.items()}, SHAPE)
    monkeypatch.chdir(tmp_path)


def small_pipe() -> tuple[int, int]:
    """A pipe that holds a page, whose writing end is non-blocking."""
    reader, writer = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    return reader, writer


def read_slowly(reader: int) -> bytes:
    """All that comes, in small pieces with pauses at first."""
    content = b""
    while piece := os.read(reader, 1000):
        content += piece
        time.sleep(0.02 if len(content) < 20_000 else 0)
    os.close(reader)
    return content


def output_of(command: list[str]) -> bytes:
    """What a command writes to a non-blocking stdout with a slow reader."""
    reader, writer = small_pipe()
    running = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    with kill_at_exit(running) as process:
        os.close(writer)
        content = read_slowly(reader)
        process.wait(timeout=60)

    assert process.returncode == 0
    return content


def test_slow_reader_gets_every_byte() -> None:
    """Of a long prompt and what follows it nothing is lost on a non-blocking pipe."""
    Path("long.txt").write_text("one and two and three\n" * 10_000)
    content = output_of([*GENERATE, "-f", "long.txt", "-n", "30", "-s", "1"])

    assert content.startswith(b"one and two and three\n" * 9_999)
    plain = subprocess.run([*GENERATE, "-f", "long.txt", "-n", "30", "-s", "1"], capture_output=True, check=True).stdout
    assert content == plain


@pytest.mark.parametrize("command", ["train", "generate", "eval", "plot", "export"])
def test_every_command_waits(command: str) -> None:
    """The help of each command comes whole through such a pipe, read only once it is full."""
    flags = [sys.executable, "-m", f"picogpt.cli.{command}", "--help"]

    assert output_of(flags) == subprocess.run(flags, capture_output=True, check=True).stdout


def test_slow_writer_is_read_to_the_end() -> None:
    """A prompt that comes bit by bit through a non-blocking stdin is read whole."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    running = subprocess.Popen([*GENERATE, "-n", "0"], stdin=reader, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with kill_at_exit(running) as process:
        os.close(reader)

        def write() -> None:
            for word in (b"one", b" and", b" two\n"):
                time.sleep(0.3)
                os.write(writer, word)
            os.close(writer)

        thread = threading.Thread(target=write)
        thread.start()
        out, err = process.communicate(timeout=60)
        thread.join()

    assert (out, process.returncode) == (b"one and two\n", 0), err


def test_full_disk_at_the_end_is_one_line() -> None:
    """Results that are still buffered when the work is done count too: one line, exit 1."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(program("end_a_command", "done"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("prog: No space left on device; free some space on the disk, then start again\n")
    assert "Traceback" not in done.stderr


def test_broken_socket_is_no_reader_that_left() -> None:
    """A connection that breaks is an error, though Python calls it by the same name as a closed stdout."""
    done = subprocess.run(program("end_a_command", "broken"), capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (1, "prog: Broken pipe\n")


def test_results_come_before_the_error() -> None:
    """Text that was still buffered when Ctrl-C came stands above the line that says so."""
    command = program("end_a_command", "interrupted")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)

    assert (done.returncode, done.stdout) == (130, "a text\nprog: interrupted\n")


def test_any_name_can_be_printed() -> None:
    """Bytes of a name that are no text come out as they are, other letters as an ASCII terminal can show them."""
    code = "from picogpt.stdio import install_blocking_streams; install_blocking_streams(); print('caf\\udce9 日')"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=ascii_only)

    assert done.stdout == b"caf\xe9 \\u65e5\n"


class Terminal:
    """A process on a terminal of its own, and what it has shown."""

    def __init__(self, command: list[str]) -> None:
        self._primary, secondary = pty.openpty()
        environment = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=secondary, stdout=secondary, stderr=secondary, start_new_session=True, env=environment
        )
        os.close(secondary)
        self.shown = b""

    def wait_for(self, text: bytes, count: int = 1) -> None:
        """Read until `text` has been shown so many times."""
        deadline = time.monotonic() + 60
        while self.shown.count(text) < count:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._primary], [], [], 1.0)[0]:
                self.shown += os.read(self._primary, 4096)

    def type(self, text: bytes) -> None:
        """Type `text`."""
        os.write(self._primary, text)

    def end(self) -> bytes:
        """Wait for the end of the process; all that was shown."""
        while True:
            try:
                piece = os.read(self._primary, 4096)
            except OSError:
                break
            if not piece:
                break
            self.shown += piece
        self.process.wait(timeout=60)
        os.close(self._primary)
        return self.shown


def test_pasted_lines_are_one_prompt() -> None:
    """Text of several lines, pasted at the prompt, is one prompt; typed lines are one each."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    terminal = Terminal([*GENERATE, "-n", "0", "--chat"])
    terminal.wait_for(b"\x1b[?2004h")  # the terminal is asked to mark what is pasted
    terminal.type(b"\x1b[200~one \xe6\x97\xa5\rtwo \xe6\x97\xa5\rthree\x1b[201~")
    terminal.wait_for(b"three")
    terminal.type(b"\r")
    terminal.wait_for(b"\x1b[?2004h", 2)
    terminal.type(b"four \xe6\x97\xa5\r")
    terminal.wait_for(b"\x1b[?2004h", 3)
    terminal.type(b"\x04")
    shown = terminal.end().decode(errors="replace")

    assert terminal.process.returncode == 0
    assert re.findall(r"unknown, read as <\?>: (\d+)", shown) == ["2", "1"]


def test_notices_have_lines_of_their_own() -> None:
    """On a terminal a notice stands before the prompt's echo, and an interruption below the text."""
    terminal = Terminal([*GENERATE, "-p", "one \u65e5", "-n", "inf", "-s", "1"])
    terminal.wait_for(b"one <?>")
    time.sleep(0.2)
    terminal.process.send_signal(2)
    lines = terminal.end().decode(errors="replace").replace("\r", "").splitlines()

    echo = next(i for i, line in enumerate(lines) if line.startswith("one <?>"))
    assert lines[echo - 1].startswith("prompt: unknown, read as <?>: 1 ")
    assert lines[-1] == "picogpt-generate: interrupted"
    assert terminal.process.returncode == 130
