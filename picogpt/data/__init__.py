"""Data loading: files and named corpora in memory, streams of the hub; all cut into batches. No torch here; batches are numpy."""

from picogpt.data.articles import ArticleReader
from picogpt.data.batches import Batch, RandomSource, Source, Stop, TextSource, WaitInterrupted, split_text
from picogpt.data.corpora import DATASETS, load_dataset
from picogpt.data.first_articles import draw_validation
from picogpt.data.hub import NAMED_STREAMS, StreamSpec, find_shards, resolve_stream
from picogpt.data.shards import Shards
from picogpt.data.stream import StreamSource, download_bytes
from picogpt.data.text import Corpus, check_unknown, read_texts

__all__ = [
    "DATASETS",
    "NAMED_STREAMS",
    "ArticleReader",
    "Batch",
    "Corpus",
    "RandomSource",
    "Shards",
    "Source",
    "Stop",
    "StreamSource",
    "StreamSpec",
    "TextSource",
    "WaitInterrupted",
    "check_unknown",
    "download_bytes",
    "draw_validation",
    "find_shards",
    "load_dataset",
    "read_texts",
    "resolve_stream",
    "split_text",
]
