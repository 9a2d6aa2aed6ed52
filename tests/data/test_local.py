"""Data sets in local folders and files: literal names, the hub's layout, every format, and one line for whatever is damaged."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picogpt.cli import eval as evaluation
from picogpt.cli import train
from picogpt.data import ArticleReader, StreamSpec, find_shards, first_articles, local, resolve_stream
from picogpt.data.articles import Cursor
from picogpt.data.hub import read_rows
from picogpt.errors import ConfigError, DataError
from picogpt.runs.folder import RunFolder
from tests.conftest import TINY_FLAGS
from tests.programs import program

FLAGS = [*TINY_FLAGS, "--epochs", "1", "--steps-per-epoch", "3", "--val-steps", "1", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path: Path, texts: list[str]) -> None:
    """A file of one article a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def names_of(folder: Path, config: str | None = None) -> list[str]:
    """The names of the files for training, relative to their folder."""
    shards = find_shards(StreamSpec(name="x", path=str(folder.absolute()), config=config))
    return [Path(file).relative_to(folder.resolve()).as_posix() for file in shards.files]


def texts_of(folder: Path, column: str = "text", start: int = 0) -> list[str]:
    """All texts of the data set in `folder`, each file from row `start` on."""
    shards = find_shards(StreamSpec(name="x", path=str(folder.absolute()), columns=(column,)))
    return [row[0] for file in shards.files for row in read_rows(shards, file, start)]


NAMES = [
    "notes?",
    "notes*",
    "[1]",
    "[!a]",
    "d::e",
    "zip:",
    "a (b)",
    "#1",
    "it's",
    'say "so"',
    "_under",
    "-dash",
    "--fresh",
    "~",
    "$HOME",
    "100%",
    "%41",
    "{a,b}",
    "维基",
    "new\nline",
    os.fsdecode(b"caf\xe9"),
    "file:",
    "a:b",
    "hf:",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_literal(here: Path, name: str) -> None:
    """A folder and a file of any name are themselves: what looks like a pattern, an address or a flag of them is not read as one."""
    write_jsonl(here / name / f"train-{name}.jsonl", ["mine", "mine too"])
    write_jsonl(here / "notes2" / "train.jsonl", ["another's"])
    spec = resolve_stream(name if name != "~" else "./~", None)
    shards = find_shards(spec)

    assert spec.is_local
    assert shards.files == (f"{here.resolve().as_posix()}/{name}/train-{name}.jsonl",)
    assert [row for file in shards.files for row in read_rows(shards, file, 0)] == [("mine",), ("mine too",)]
    assert next(ArticleReader(shards, 0, print).articles(Cursor(0, 0, 0))).empty_before == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["notes?", "d::e", os.fsdecode(b"caf\xe9"), "-x [1]"])
def test_a_run_on_an_odd_name(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on such a folder trains, is kept under a name of its own and resumes by it."""
    write_jsonl(here / name / "train[1].jsonl", [f"article {i} " * 9 for i in range(100)])
    assert train.main([f"--dataset={name}", "--run", "odd", *FLAGS]) == 0
    assert train.main(["--run", "odd", "--epochs", "2"]) == 0

    assert "resuming from step 3" in capsys.readouterr().err
    assert RunFolder(Path("logs/odd")).read_config()["data"]["dataset"] == str(here / name)


def test_a_folder_before_a_part(here: Path) -> None:
    """A folder called a:b is itself; without it, a:b is the part b of the folder a."""
    write_jsonl(here / "a" / "train.jsonl", ["x"])
    spec = resolve_stream("a:b", None)

    assert (spec.path, spec.config, spec.address) == (str(here / "a"), "b", f"{here / 'a'}:b")
    assert resolve_stream("a", None).address == str(here / "a")
    (here / "a:b").mkdir()
    assert resolve_stream("a:b", None).path == str(here / "a:b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "notes.md",
            r"^dataset notes.md: not a file of .parquet, .*, .txt, which may be compressed \(.gz, .bz2, .xz\); give a plain text",
        ),
        ("packed.gz", "^dataset packed.gz: not a file of .parquet, .arrow, .jsonl"),
        (".jsonl", "^dataset .jsonl: not a file of .parquet, .arrow, .jsonl"),
        ("pipe.jsonl", "^dataset pipe.jsonl: not a file of .parquet, .arrow, .jsonl"),
        (
            "./gone",
            r"^dataset ./gone: there is no such folder or file; name ORG/NAME\[:CONFIG\] on the hub, a folder, or a file of .par",
        ),
        ("/nowhere/gone", "^dataset /nowhere/gone: there is no such folder or file"),
        ("gone.csv", "^dataset gone.csv: there is no such folder or file"),
        ("data/gone.jsonl.gz", "^dataset data/gone.jsonl.gz: there is no such folder or file"),
    ],
)
def test_no_data_set(here: Path, name: str, message: str) -> None:
    """A file of another kind, and a path to nothing, are no names of the hub: one line says what is possible."""
    for other in ("notes.md", "packed.gz", ".jsonl"):
        (here / other).write_text("{}\n")
    os.mkfifo(here / "pipe.jsonl")

    with pytest.raises(ConfigError, match=message) as caught:
        resolve_stream(name, None)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "dataset"
    assert resolve_stream("org/name.csv:default", None).path == "org/name.csv"


LAYOUTS = [
    (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "train.jsonl"], [0, 1]),
    (["train/b.jsonl", "train/a.jsonl", "test/a.jsonl", "c.jsonl"], [1, 0]),
    (["deep/er/training-2/a.jsonl", "validation/a.jsonl"], [0]),
    (["my_train_1.jsonl", "my_test_1.jsonl", "other.jsonl"], [0]),
    (["train.jsonl", "dev.jsonl"], [0]),
    (["z.jsonl", "trainer.jsonl", "x/y.jsonl"], [1, 2, 0]),
    ([".hidden.jsonl", ".git/a.jsonl", "__pycache__/a.jsonl", "_a.jsonl"], [3]),
    (["a.JSONL", "b.jsonl.bak", "config.json", "notes.md"], [0]),
    (["a.jsonl", "b.jsonl", "c.txt"], [0, 1]),
]


@pytest.mark.parametrize(("names", "expected"), LAYOUTS)
def test_the_hubs_layout(here: Path, names: list[str], expected: list[int]) -> None:
    """Numbered files in data, then folders, then files called train, then all; hidden ones and other formats are left out."""
    for name in names:
        write_jsonl(here / name, ["x"])

    assert names_of(here) == [names[i] for i in expected]


def test_as_the_library_lists_them(here: Path) -> None:
    """The files of a folder with a plain name are those that `datasets` finds, in its order: older runs resume."""
    import datasets

    for names, _ in LAYOUTS:
        folder = here / f"folder{len(list(here.iterdir()))}"
        for name in names:
            write_jsonl(folder / name, ["x"])
        files = datasets.load_dataset_builder(str(folder)).config.data_files["train"]
        shards = find_shards(StreamSpec(name="x", path=str(folder)))

        # The library takes a.jsonl.bak for data and a.JSONL for none; here it is the last suffix that counts, in any case.
        assert [file for file in files if not file.endswith(".bak")] == [
            file for file in shards.files if not file.endswith(".JSONL")
        ], names


README = """---
configs:
- config_name: one
  data_files: "one/*"
- config_name: two
  data_dir: two
- config_name: three
  data_files:
  - split: train
    path: ["three [x].jsonl", "deep/**/*.jsonl"]
  - split: test
    path: one/a.jsonl
---
A card.
"""


def test_parts_listed_in_the_readme(here: Path) -> None:
    """A part is named after the folder; without one, the parts that there are, are named."""
    for name in ("one/a.jsonl", "two/train.jsonl", "two/test.jsonl", "three [x].jsonl", "deep/er/a.jsonl"):
        write_jsonl(here / name, ["x"])
    (here / "README.md").write_text(README)

    assert names_of(here, "one") == ["one/a.jsonl"]
    assert names_of(here, "two") == ["two/train.jsonl"]
    assert names_of(here, "three") == ["deep/er/a.jsonl", "three [x].jsonl"]
    with pytest.raises(DataError, match=r"lists several configurations; name one as .*:CONFIG, of one, two, three"):
        names_of(here)
    with pytest.raises(DataError, match=r"lists no configuration four; name one as .*:CONFIG, of one, two, three"):
        names_of(here, "four")
    (here / "README.md").write_text(README.replace("data_dir: two", "data_dir: two\n  default: true"))
    assert names_of(here) == ["two/train.jsonl"]
    with pytest.raises(DataError, match=r"lists no configuration four; name one as .*:CONFIG, of one, two, three"):
        names_of(here, "four")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("configs: [", "README.md: invalid YAML at its beginning"),
        ("configs: 3", "README.md: its configs are not a list of configurations"),
        ("configs:\n- data_files: ../*", r"README.md: \.\./\* is outside the folder"),
        ("configs:\n- data_files: ../*.txt\n  data_dir: one", r"README.md: \.\./\*\.txt is outside the folder"),
        ("configs:\n- data_dir: ../secret", r"README.md: \.\./secret is outside the folder"),
        ("configs:\n- data_dir: /secret", r"README.md: /secret is outside the folder"),
        ("configs:\n- data_dir: [", "README.md: invalid YAML at its beginning"),
        ("date: 2024-02-30", "README.md: invalid YAML at its beginning .day is out of range for month."),
        ("x: " + 2000 * "[", "README.md: invalid YAML at its beginning"),
        ("configs:\n- data_files: none/*", "no file matches the patterns of its train split$"),
        ("configs:\n- data_files: {train: none/*, test: t*}", "no file matches the patterns of its train split; it has test$"),
    ],
)
def test_damaged_readme(here: Path, yaml: str, message: str) -> None:
    """A README.md whose list of parts is damaged is one line."""
    write_jsonl(here / "train.jsonl", ["x"])
    (here / "README.md").write_text(f"---\n{yaml}\n---\n")

    with pytest.raises(DataError, match=message):
        names_of(here)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the folder is empty; a data set has files of .parquet, .arrow, .jsonl"),
        (["a.pdf", ".hidden.jsonl"], "no data files in it; a data set has files of .parquet"),
        (["test.jsonl", "dev.jsonl"], "it has no train split; it has validation, test"),
    ],
)
def test_nothing_to_train_on(here: Path, names: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a usable file is one true line, and nothing is written."""
    folder = here / "d"
    folder.mkdir()
    for name in names:
        write_jsonl(folder / name, ["x"])

    assert train.main(["--dataset", "d", *FLAGS]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"picogpt-train: {folder.resolve()}: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (here / "logs").exists()


TEXTS = ["one", "", 'with "quotes", commas\nand lines', "NA", "null", "123", "é 维基", " spaces "]


def write_all(folder: Path) -> None:
    """`TEXTS` in every format that can hold them."""
    folder.mkdir()
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, folder / "parquet.parquet", row_group_size=3)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    lines = "\n\n".join(map(json.dumps, rows))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.json").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name, comma in (("table.csv", ","), ("table.tsv", "\t")):
        cells = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
        text = f"id{comma}text\r\n" + "".join(f"{i}{comma}{cell}\r\n" for i, cell in enumerate(cells))
        (folder / name).write_text(text, encoding="utf-8", newline="")


def test_every_format(here: Path) -> None:
    """A text is the same in every format, from any row on, the words NA and null and numbers included."""
    write_all(here / "all")
    for file in sorted((here / "all").iterdir()):
        folder = here / file.name.replace(".", "-")
        folder.mkdir()
        file.rename(folder / file.name)
        for start in (0, 1, 3, 7, 8, 20):
            assert texts_of(folder, start=start) == TEXTS[start:], (file.name, start)
        if file.suffix in {".csv", ".tsv"}:
            assert texts_of(folder, "id") == [str(i) for i in range(len(TEXTS))]


def test_a_file_alone(here: Path) -> None:
    """A file of any format is a data set with the same texts as its folder, from any row on, whatever else lies beside it."""
    write_all(here / "all")
    for file in sorted((here / "all").iterdir()):
        spec = resolve_stream(f"all/{file.name}", None)
        shards = find_shards(spec)

        assert spec.address == str(file)
        assert shards.files == (file.resolve().as_posix(),)
        assert [row[0] for row in read_rows(shards, shards.files[0], 3)] == TEXTS[3:]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("articles.jsonl", "articles"),
        ("my.articles.JSONL", "my.articles"),
        ("a b.jsonl.gz", "a-b"),
        ("notes?.jsonl", "notes-"),
        ("-dash.jsonl", "dash"),
        ("维基.jsonl", "stream"),
    ],
)
def test_name_of_a_files_run(here: Path, name: str, run: str) -> None:
    """A run is called after its file, without the suffixes; of a folder the whole name counts."""
    (here / name).write_text("{}\n")
    (here / "my.folder.csv").mkdir()

    assert resolve_stream(name, None).short_name == run
    assert resolve_stream("my.folder.csv", None).short_name == "my.folder.csv"


def test_a_link_to_a_file(here: Path) -> None:
    """A link counts by its own name: caches keep files under names without a suffix."""
    write_jsonl(here / "blobs" / "3f2a", ["x"])
    (here / "train.jsonl").symlink_to(here / "blobs" / "3f2a")
    shards = find_shards(resolve_stream("train.jsonl", None))

    assert shards.files == ((here.resolve() / "train.jsonl").as_posix(),)
    assert list(read_rows(shards, shards.files[0], 0)) == [("x",)]


@pytest.mark.parametrize("text", ['[{"text":"a"},\n{"text":"b"}]', '\ufeff [\n{"text":"a"},\n{"text":"b"}\n]\n'])
def test_lists_of_objects(here: Path, text: str) -> None:
    """A list of objects is read however its lines are broken."""
    (here / "list").mkdir()
    (here / "list" / "data.json").write_text(text, encoding="utf-8")

    assert texts_of(here / "list") == ["a", "b"]


def test_lines_of_a_text(here: Path) -> None:
    """A row of a text file is a line, in a column called text."""
    (here / "train.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\nthree")

    assert texts_of(here) == ["one", "", "two", "three"]
    assert texts_of(here, start=2) == ["two", "three"]
    with pytest.raises(DataError, match="train.txt: it has no column body; name one of text with --text-column"):
        texts_of(here, "body")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content"), [("train.csv", "text\n" + '"a b c"\n' * 200), ("notes.txt", "a line\n" * 200)])
def test_tables_and_texts_are_trained_on(here: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a CSV, or with lines of text, trains like any other, and resumes."""
    (here / "cs").mkdir()
    (here / "cs" / name).write_text(content)
    assert train.main(["--dataset", "cs", *FLAGS]) == 0
    assert train.main(["--run", "cs", "--epochs", "2"]) == 0

    assert "resuming from step 3" in capsys.readouterr().err


FILE_RUNS = [
    ("talk.jsonl.gz", gzip.compress(b'{"said": "a b c d e f g h i j k l m n o"}\n' * 200), ["--text-column", "said"]),
    pytest.param(
        "talk.tsv", b"said\tn\n" + b"a b c d e f g h i j k l m n o\t1\n" * 200, ["--text-column", "said"], marks=pytest.mark.slow
    ),
    pytest.param("talk.txt", b"a b c d e f g h i j k l m n o\n" * 200, [], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "content", "flags"), FILE_RUNS, ids=["jsonl.gz", "tsv", "txt"])
def test_a_file_is_trained_on(
    here: Path, name: str, content: bytes, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a file is called after it, resumes from any folder, is evaluated on it, and stops if the file has changed."""
    file = here / "d" / name
    file.parent.mkdir()
    file.write_bytes(content)
    assert train.main(["--dataset", f"d/{name}", *flags, *FLAGS]) == 0
    assert f"{file}: one file, streamed; one article in twenty" in capsys.readouterr().err
    monkeypatch.chdir(here / "d")
    assert train.main(["--run", "talk", "--logs-dir", str(here / "logs"), "--epochs", "2"]) == 0
    assert "resuming from step 3" in capsys.readouterr().err
    monkeypatch.chdir(here)
    scored = ["-m", "talk", "--dataset", f"d/{name}", *flags, "--windows", "2", "--threads", "1"]
    assert evaluation.main(scored) == 0
    assert f"{file}: one file; scoring validation articles" in capsys.readouterr().err

    file.write_bytes(content + b"\n")
    assert train.main(["--run", "talk", "--epochs", "3"]) == 1
    assert "text is" in capsys.readouterr().err


def parquet_of(column: str) -> bytes:
    """A parquet file with one column."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: ["x" * 50] * 50}), sink)
    return bytes(sink.getvalue())


GOOD = {
    ".parquet": parquet_of("text"),
    ".jsonl": b'{"text": "an article"}\n' * 50,
    ".csv": b"text,n\nan article,1\n" * 1 + b"an article,2\n" * 50,
    ".txt": b"an article\n" * 50,
    ".jsonl.gz": gzip.compress(b'{"text": "an article"}\n' * 50),
}
DAMAGED = [
    (".parquet", bytes(4096), "cannot be read"),
    (".parquet", b"", r"it is empty, 0 bytes"),
    (".parquet", GOOD[".parquet"][:-100], "cannot be read"),
    (".parquet", parquet_of("body"), "it has no column text; name one of body with --text-column"),
    (".parquet", b"<html>", "cannot be read"),
    (".jsonl", b"", "it is empty, 0 bytes"),
    (".jsonl", GOOD[".jsonl"][:-5], "its last line is not a complete JSON object"),
    (".jsonl", b'{"body": "x"}\n', "it has no column text; name one of body with --text-column"),
    (".jsonl", '{"text": "é"}\n'.encode("latin-1"), "not UTF-8 text"),
    (".jsonl", b'{"text": "x"}\n'.decode().encode("utf-16"), "not UTF-8 text"),
    (".jsonl", b"[1]\n", "the list contains something other than objects"),
    (".jsonl", b"3\n", "line 1 is not a JSON object"),
    (".jsonl", b"[" * 100_000 + b"\n", "cannot be read"),
    (".jsonl", bytes(4096), "line 1 is not a complete JSON object"),
    (".csv", b"", "it is empty, 0 bytes"),
    (".csv", b"body,n\nx,1\n", "it has no column text; name one of body, n with --text-column"),
    (".csv", b"text,n\nx\n", "line 2 has 1 fields where the first line has 2"),
    (".csv", b'text,n\n"x\n', "cannot be read"),
    (".txt", b"", "it is empty, 0 bytes"),
    (".txt", b"caf\xe9\n", "not UTF-8 text"),
    (".jsonl.gz", GOOD[".jsonl.gz"][:-20], "cannot be read"),
    (".jsonl.gz", b"no gzip", "cannot be read"),
]


@pytest.mark.parametrize("position", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize(("suffix", "content", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damage_is_one_line(
    here: Path, position: int, suffix: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is damaged, empty, cut short, of another encoding or without the column is named at once, before training."""
    folder = here / "d"
    folder.mkdir()
    (folder / f"{1 - position}{suffix}").write_bytes(GOOD[suffix])
    (folder / f"{position}{suffix}").write_bytes(content)

    assert train.main(["--dataset", "d", *FLAGS]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"picogpt-train: {folder.resolve() / str(position)}{suffix}: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (here / "logs").exists()


@pytest.mark.parametrize(("suffix", "content", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damage_of_a_file_alone(
    here: Path, suffix: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is named itself has the same checks and messages."""
    (here / f"a{suffix}").write_bytes(content)

    assert train.main(["--dataset", f"a{suffix}", *FLAGS]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"picogpt-train: {here.resolve() / 'a'}{suffix}: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (here / "logs").exists()


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (
            ".jsonl",
            b'{"text": "an article"}\n' * 99 + b"{half\n" + b'{"text": "an article"}\n' * 9,
            "line 100 is not a complete JSON",
        ),
        (".jsonl", b'{"text": "an article"}\n' * 99 + b'{"text": 3}\n{"text": "x"}\n', "column text holds int, not text"),
        pytest.param(".txt", b"an article\n" * 9999 + b"caf\xe9\n", "not UTF-8 text", marks=pytest.mark.slow),
        (".csv", b"text\n" + b"an article\n" * 99 + b'"a"b\n', "cannot be read"),
    ],
)
def test_damage_further_in(here: Path, suffix: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage that is met on the way ends the run with one line that names the file; the run is saved."""
    folder = here / "d"
    write_jsonl(folder / "x", [])
    (folder / f"a{suffix}").write_bytes(content)
    flags = [*FLAGS, "--epochs", "1", "--steps-per-epoch", "10000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_articles, "VALIDATION_CHARS", 10)
        patch.setattr("picogpt.data.stream.POOL", 4)
        code = train.main(["--dataset", "d", *flags])
    err = capsys.readouterr().err

    assert code == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"picogpt-train: {folder.resolve() / 'a'}{suffix}: "), err
    assert message in err.splitlines()[-1]
    assert (here / "logs" / "d" / "checkpoint.safetensors").exists()


def test_a_file_that_cannot_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is one line with the file's name too."""
    write_jsonl(here / "train.jsonl", ["x"])

    def broken(_file: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(local, "_opened", broken)
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read \(Input/output error\)"):
        texts_of(here)


def test_a_folder_that_cannot_be_listed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose names cannot be read is one line."""

    def refused(_base: object, onerror: object) -> object:
        raise PermissionError(13, "Permission denied", "locked")

    monkeypatch.setattr("picogpt.data.layout.os.walk", refused)
    with pytest.raises(DataError, match=r"locked: cannot be read \(Permission denied\); check its permissions"):
        names_of(here)


@pytest.mark.slow
def test_without_a_home(here: Path) -> None:
    """A local data set needs no folder of the hub's library, nor the library: an unwritable HOME and odd variables do not matter."""
    write_jsonl(here / "d" / "train.jsonl", ["an article of some length"] * 300)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HOME": "/proc/nowhere",
        "ALL_PROXY": "socks5://127.0.0.1:1080",
        "HF_ENDPOINT": "notaurl",
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(here),
    }
    process = subprocess.run(
        program("run_without", "datasets", "train", "--dataset", "d", *FLAGS),
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )

    assert process.returncode == 0, process.stderr
