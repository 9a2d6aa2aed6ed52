"""Texts, the named corpora, and batches."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from picogpt.config import Fold, TrainConfig
from picogpt.data import Corpus, TextSource, check_unknown, corpora, load_dataset, read_texts
from picogpt.errors import ConfigError, DataError
from picogpt.tokenizer import CharTokenizer
from tests.conftest import tiny_source

decode = CharTokenizer().decode


def read(*paths: Path | str) -> str:
    """What comes of some paths, decoded again."""
    return decode(read_texts([str(path) for path in paths], name="x").ids)


def mapped_memory(folder: Path) -> list[int]:
    """Memory (kB) of each mapping of a file in `folder`."""
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return [int(found[1]) for region in regions if str(folder) in region and (found := re.search(r"Rss: +(\d+)", region))]


class TestText:
    def test_files_and_folders_in_order(self, tmp_path: Path) -> None:
        """A folder is read to its bottom in the order of names; texts are joined by a newline; other files are left out."""
        (tmp_path / "d" / "sub").mkdir(parents=True)
        for name, text in {"d/b.txt": "two", "d/a.txt": "one", "d/sub/c.txt": "three", "d/x.csv": "no", "z": "last"}.items():
            (tmp_path / name).write_text(text)

        assert read(tmp_path / "d", tmp_path / "z") == "one\ntwo\nthree\nlast"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"\xef\xbb\xbfa\r\nb\rc\n", "a\nb\nc\n"),
            (b"caf\xe9 \x93x\x94", 'cafe "x"'),
            ("é日".encode(), "e<?>"),
            ("a\r\né".encode("utf-16"), "a\ne"),
        ],
        ids=["mark and line ends", "CP1252", "beyond ASCII", "UTF-16"],
    )
    def test_encodings(self, tmp_path: Path, content: bytes, expected: str) -> None:
        """A byte order mark goes, line ends become newlines, and what has no ASCII spelling becomes one unknown character."""
        (tmp_path / "a").write_bytes(content)

        assert read(tmp_path / "a") == expected

    def test_blocks_join(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A text longer than a block comes out the same, letters of several bytes at the seam included."""
        monkeypatch.setattr("picogpt.data.text._BLOCK_BYTES", 4)
        (tmp_path / "a").write_text("abéc日éfé", encoding="utf-8")
        corpus = read_texts([str(tmp_path / "a")], name="x")

        assert decode(corpus.ids) == "abec<?>efe"
        assert corpus.tally.folded == {"é": 3}
        assert corpus.tally.unknown == {"日": 1}

    def test_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`-` is standard input."""
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello")))

        assert read("-") == "hello"

    def test_closed_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A closed standard input is said."""
        monkeypatch.setattr("sys.stdin", None)
        with pytest.raises(DataError, match="standard input is closed"):
            read("-")

    def test_fifo(self, tmp_path: Path) -> None:
        """A named pipe is read like a file."""
        path = tmp_path / "pipe"
        os.mkfifo(path)
        writer = threading.Thread(target=lambda: path.write_text("through a pipe"))
        writer.start()

        assert read(path) == "through a pipe"
        writer.join()

    def test_fifo_with_its_own_alphabet(self, tmp_path: Path) -> None:
        """A pipe can be read once; for its own characters a text is read twice."""
        path = tmp_path / "pipe"
        os.mkfifo(path)
        writer = threading.Thread(target=lambda: path.write_text("Through a pipe"))
        writer.start()
        corpus = read_texts([str(path)], name="pipe", scratch=tmp_path, alphabet=None)

        assert CharTokenizer(corpus.alphabet).decode(corpus.ids.tolist()) == "Through a pipe"
        writer.join()

    def test_empty_path(self) -> None:
        """A shell variable that is not set is not the current folder."""
        with pytest.raises(DataError, match="^the path of a text is empty; name a file or a folder, or . for this one$"):
            read("")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none", None, "none: cannot be read .No such file or directory.; check the path"),
            ("zero", b"ab\0c", "zero: not text .zero bytes"),
            ("empty", b"", "empty: no text in it"),
            ("mark", b"\xef\xbb\xbf", "mark: no text in it"),
            ("utf16le", "text".encode("utf-16-le"), "utf16le: not text .zero bytes, but no byte order mark.; convert it"),
        ],
    )
    def test_refused(self, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
        """What is no text is one clear line with the file's name."""
        if content is not None:
            (tmp_path / name).write_bytes(content)

        with pytest.raises(DataError, match=message):
            read(tmp_path / name)

    def test_empty_folder(self, tmp_path: Path) -> None:
        """A folder without texts is said."""
        with pytest.raises(DataError, match=r"the folder has no \.txt or \.md file; name another folder"):
            read(tmp_path)

    @pytest.mark.parametrize(
        ("text", "fold", "expected"),
        [
            ("ééé日abcdef", True, "folded to ASCII: 3 ('é' 3); unknown, read as <?>: 1 (10.00%: '日' 1)"),
            ("ééé日abcdef", False, "unknown, read as <?>: 4 (40.00%: 'é' 3, '日' 1)"),
            (
                "éПриПи😀😀",
                "latin",
                "folded to ASCII: 1 ('é' 1); transliterated: 5 ('П' 2, 'и' 2, 'р' 1); unknown, read as <?>: 2 (25.00%: '😀' 2)",
            ),
            ("It’s", True, "capitals become small letters; folded to ASCII: 1 ('’' 1); no character unknown"),
            ("Abc", True, "capitals become small letters; no character unknown"),
            ("abc", True, "every character known"),
        ],
        ids=["both", "no fold", "transliterated", "folded alone", "capitals", "all known"],
    )
    def test_what_becomes_of_characters(self, tmp_path: Path, text: str, fold: Fold, expected: str) -> None:
        """Folded, transliterated and unknown characters are counted, the commonest named; lost capitals are no "every character known"."""
        (tmp_path / "a").write_text(text, encoding="utf-8")

        assert str(read_texts([str(tmp_path / "a")], name="x", fold=fold).tally) == expected

    def test_mostly_unknown_is_rejected(self, tmp_path: Path) -> None:
        """A text above half unknown is rejected; above a hundredth it is warned of, with what follows; below that nothing is said."""
        notices: list[str] = []
        for name, text in {"most": "日本語x", "some": "日" + "x" * 98, "few": "日" + "x" * 100}.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        tallies = {name: read_texts([str(tmp_path / name)], name=name).tally for name in ("most", "some", "few")}

        with pytest.raises(DataError, match=r"most: 75% of its characters are unknown \('日' 1, '本' 1, '語' 1\)"):
            check_unknown("most", tallies["most"], notices.append)
        check_unknown("some", tallies["some"], notices.append)
        check_unknown("few", tallies["few"], notices.append)
        check_unknown("begun", tallies["most"], notices.append, reject=False)
        assert [notice[:34] for notice in notices] == ["warning: some: 1.0% of its charact", "warning: begun: 75.0% of its chara"]
        assert "loss comes out too low" in notices[0]
        assert "never sampled" in notices[0]

    def test_long_text_lies_in_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A text too long for the memory is the same one, mapped from a file that has no name, and gives the same batches."""
        path = tmp_path / "a"
        path.write_text("".join(f"line {i} é\n" for i in range(2000)), encoding="utf-8")
        whole = read_texts([str(path)], name="x")
        monkeypatch.setattr("picogpt.data.text.MAX_CHARS_IN_MEMORY", 1000)
        monkeypatch.setattr("picogpt.data.text._BLOCK_BYTES", 300)
        mapped = read_texts([str(path)], name="x", scratch=tmp_path)
        sources = [TextSource(corpus, sequence_len=50, batch_size=3, seed=0) for corpus in (whole, mapped)]

        assert mapped.mapped is not None
        assert whole.mapped is None
        assert mapped.fingerprint == whole.fingerprint
        assert mapped.tally == whole.tally
        assert whole.tally.folded == {"é": 2000}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        for k in range(30):
            one, other = (source.train_batch(k).inputs for source in sources)
            assert np.array_equal(one, other)
        for first, second in zip(*(source.val_batches(9) for source in sources), strict=True):
            assert np.array_equal(first.targets, second.targets)

    @pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell its memory")
    def test_long_text_takes_no_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """However much of it is read, by the fingerprint or in batches, the pages are given back."""
        path = tmp_path / "a"
        path.write_text("some more text\n" * 400_000)
        monkeypatch.setattr("picogpt.data.text.MAX_CHARS_IN_MEMORY", 1000)
        monkeypatch.setattr("picogpt.data.text._BLOCK_BYTES", 1 << 18)
        corpus = read_texts([str(path)], name="x", scratch=tmp_path)
        source = TextSource(corpus, sequence_len=1000, batch_size=8, seed=0)
        assert corpus.fingerprint
        for k in range(700):
            source.train_batch(k)
        assert len(list(source.val_batches(50))) == 50

        assert 0 < len(held := mapped_memory(tmp_path)) < 3
        assert sum(held) < 1000

    def test_no_room_for_a_long_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that fills on the way is one line, and nothing stays on it."""
        path = tmp_path / "a"
        path.write_text("text\n" * 1000)
        monkeypatch.setattr("picogpt.data.text.MAX_CHARS_IN_MEMORY", 100)
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Path("/dev/full").open("wb"))  # noqa: SIM115

        with pytest.raises(DataError, match=r"no space for the ids of a long text.*No space left on device.*another --logs-dir"):
            read_texts([str(path)], name="x", scratch=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_fingerprint(self, tmp_path: Path) -> None:
        """The same text has the same fingerprint, another one another."""
        prints = []
        for text in ("abc", "abc", "abd"):
            (tmp_path / "a").write_text(text)
            prints.append(read_texts([str(tmp_path / "a")], name="x").fingerprint)

        assert prints[0] == prints[1] != prints[2]


class _Handler(BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Handler]]:
    """A server that stands for the address of Tiny Shakespeare, and a working folder of the test's own."""
    import hashlib

    class Handler(_Handler):
        content = b"A Citizen:\nGood morrow to the gulls, and to the bread.\n" * 9

    handler = Handler
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_URL", f"http://127.0.0.1:{http.server_port}/input.txt")
    monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(handler.content).hexdigest())
    monkeypatch.setattr(corpora, "_TINY_SHAKESPEARE_BYTES", len(handler.content))
    yield handler
    http.shutdown()
    http.server_close()
    thread.join()


class TestCorpora:
    def load(self, name: str) -> tuple[Corpus, list[str], list[tuple[int, int]]]:
        notices: list[str] = []
        progress: list[tuple[int, int]] = []
        corpus = load_dataset(name, notify=notices.append, progress=lambda *step: progress.append(step))
        return corpus, notices, progress

    @pytest.mark.parametrize("name", ["tinyshakespeare", "auto"])
    def test_fetched_once(self, server: type[_Handler], name: str) -> None:
        """Fetched the first time, with progress where it was asked for, and read from the folder after that."""
        corpus, notices, progress = self.load(name)
        path = Path("dataset/tinyshakespeare.txt")

        assert path.read_bytes() == server.content
        assert corpus.name == "tinyshakespeare"
        assert notices == ["downloaded Tiny Shakespeare to dataset/tinyshakespeare.txt"]
        assert bool(progress) == (name == "tinyshakespeare")
        server.content = b"gone"
        assert self.load(name)[1] == []

    def test_wrong_content_is_refused(self, server: type[_Handler]) -> None:
        """A page that is not the text is not kept."""
        server.content = b"<html>please log in</html>"

        with pytest.raises(DataError, match="the download has a wrong SHA-256"):
            self.load("tinyshakespeare")
        assert not Path("dataset").exists()

    def test_changed_file_is_refused(self, server: type[_Handler]) -> None:
        """A file of that name with another content is not taken for it."""
        Path("dataset").mkdir()
        Path("dataset/tinyshakespeare.txt").write_text("something else")

        with pytest.raises(DataError, match="not Tiny Shakespeare .its SHA-256 differs."):
            self.load("tinyshakespeare")

    def test_unreadable_file(self, server: type[_Handler]) -> None:
        """A folder in the file's place is said."""
        Path("dataset/tinyshakespeare.txt").mkdir(parents=True)

        with pytest.raises(DataError, match="cannot be read"):
            self.load("tinyshakespeare")

    def test_unwritable_folder(self, server: type[_Handler]) -> None:
        """A file in the folder's place is said."""
        Path("dataset").write_text("")

        with pytest.raises(DataError, match="cannot be written"):
            self.load("tinyshakespeare")

    def test_no_network(self, server: type[_Handler], monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a network the named text is one clear line, and auto is the sample, saying why."""
        monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")

        with pytest.raises(
            DataError, match="Tiny Shakespeare cannot be downloaded .*put the file at dataset/tinyshakespeare.txt"
        ):
            self.load("tinyshakespeare")
        corpus, notices, _ = self.load("auto")
        assert corpus.name == "sample"
        assert re.search("cannot be downloaded .*; using the sample play instead", notices[0])

    def test_malformed_proxy(self, server: type[_Handler], monkeypatch: pytest.MonkeyPatch) -> None:
        """An address of a proxy that cannot be read is one clear line, and auto is the sample."""
        monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of the first request
        monkeypatch.setenv("http_proxy", "http:/proxy:3128")
        monkeypatch.setenv("no_proxy", "")

        with pytest.raises(
            DataError, match=r"Tiny Shakespeare cannot be downloaded from .* \(proxy URL with no authority: .*proxy:3128"
        ):
            self.load("tinyshakespeare")
        assert self.load("auto")[0].name == "sample"
        monkeypatch.setattr("urllib.request._opener", None)

    def test_no_hypertext(self, server: type[_Handler], monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer that is no HTTP is one clear line too."""
        monkeypatch.setattr(_Handler, "send_response", lambda self, _: self.wfile.write(b"junk\r\n\r\n"))

        with pytest.raises(DataError, match="Tiny Shakespeare cannot be downloaded"):
            self.load("tinyshakespeare")

    def test_slow_network(self, server: type[_Handler], monkeypatch: pytest.MonkeyPatch) -> None:
        """Auto does not wait for a server that does not answer."""
        asked, answered = threading.Event(), threading.Event()

        def hang(*_: object) -> bytes:
            asked.set()
            answered.wait(10)
            return b""

        monkeypatch.setattr(corpora, "AUTO_TIMEOUT", 0.05)
        monkeypatch.setattr(corpora, "_download", hang)
        corpus, notices, _ = self.load("auto")

        assert corpus.name == "sample"
        assert "no answer within 0.05 s" in notices[0]
        assert asked.is_set()
        answered.set()

    def test_unknown_name(self) -> None:
        """Another name is wrong usage."""
        with pytest.raises(ConfigError, match="dataset must be one of auto, sample, tinyshakespeare .* got 'x'"):
            self.load("x")

    def test_sample(self) -> None:
        """The sample play: at least 80 kB, every character known, speakers and lines, and no line twice."""
        corpus, _, _ = self.load("sample")
        text = (Path(corpora.__file__).parents[2] / "dataset" / "sample.txt").read_text()
        speeches = text.strip("\n").split("\n\n")
        lines = [line.strip().lower() for speech in speeches for line in speech.split("\n")[1:]]

        assert len(corpus.ids) >= 80_000
        assert not corpus.tally.unknown
        assert all(re.fullmatch(r"[A-Z][A-Z -]+:\n[^\n]+(\n[^\n]+)*", speech) for speech in speeches)
        assert len(set(lines)) == len(lines)


class TestBatches:
    def test_batch_is_a_function_of_seed_and_step(self) -> None:
        """The same seed and step give the same batch in any order of asking; another seed or step another."""
        config = TrainConfig(batch_size=2, windows=3)
        first, second = tiny_source(config), tiny_source(config)
        late = second.train_batch(100)

        assert np.array_equal(first.train_batch(5).inputs, second.train_batch(5).inputs)
        assert np.array_equal(first.train_batch(100).targets, late.targets)
        starts = {seed: tiny_source(TrainConfig(batch_size=2, windows=3, seed=seed))._starts_of_pass(0) for seed in (1, 2)}
        assert not np.array_equal(starts[1], starts[2])

    def test_targets_follow_inputs(self) -> None:
        """Each target is the character after its input."""
        batch = tiny_source(TrainConfig(batch_size=2, windows=3)).train_batch(0)

        assert batch.inputs.shape == batch.targets.shape == (2, 24)
        assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])

    def test_a_pass_reads_everything_once(self) -> None:
        """The sequences of a pass touch and do not overlap; passes differ in order and starting point."""
        source = tiny_source(TrainConfig(batch_size=2, windows=3))
        passes = [source._starts_of_pass(number) for number in range(4)]

        for starts in passes:
            assert np.array_equal(np.diff(np.sort(starts)), np.full(len(starts) - 1, 24))
            assert starts.min() >= 0
            assert starts.max() + 24 < len(source.train_ids)
            assert len(starts) * 24 > len(source.train_ids) - 2 * 24
        assert len({starts.min() for starts in passes}) > 1

    def test_split(self) -> None:
        """90 % to train on, the rest to validate, as with Tiny Shakespeare's 1,003,854 and 111,540."""
        source = tiny_source(TrainConfig(batch_size=2, windows=3))

        assert (len(source.train_ids), len(source.val_ids)) == (2700, 300)
        assert int(corpora_share() * 1_115_394) == 1_003_854

    def test_validation_is_the_same_every_time(self) -> None:
        """Validation sequences are fixed, spread evenly, and read everything at most once."""
        source = tiny_source(TrainConfig(batch_size=5, windows=3))
        batches = list(source.val_batches(100))

        assert [batch.inputs.shape for batch in batches] == [(5, 24), (5, 24), (2, 24)]
        assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(batches, source.val_batches(100), strict=True))
        assert len(list(source.val_batches(1))) == 1

    def test_validation_text_shorter_than_a_sequence(self) -> None:
        """It is one shorter sequence."""
        config = TrainConfig(batch_size=2, windows=10)
        batches = list(tiny_source(config, n_chars=300).val_batches(3))

        assert [batch.inputs.shape for batch in batches] == [(1, 29)]

    def test_short_text(self) -> None:
        """A text too short for a sequence says how much is needed, and that much is enough."""
        config = TrainConfig(batch_size=2, windows=10)
        with pytest.raises(DataError, match="tiny: too short, 30 characters where sequences of 80 need at least 91"):
            tiny_source(config, n_chars=30)
        with pytest.raises(DataError, match="too short, 1 characters where sequences of 80 need at least 91"):
            TextSource(Corpus(name="x", ids=np.ones(1, np.uint8)), sequence_len=80, batch_size=1, seed=0)
        ids = np.ones(91, dtype=np.uint8)

        assert TextSource(Corpus(name="x", ids=ids), sequence_len=80, batch_size=1, seed=0).train_batch(3)


def corpora_share() -> float:
    """The share of a text that is trained on."""
    from picogpt.data import batches

    return batches.TRAIN_FRACTION
