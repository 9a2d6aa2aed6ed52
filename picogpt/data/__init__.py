"""Where text comes from: files and named corpora, cut into batches. Knows no torch; batches are numpy arrays."""

from picogpt.data.batches import Batch, Source, TextSource
from picogpt.data.corpora import DATASETS, load_dataset
from picogpt.data.text import Corpus, read_texts

__all__ = ["DATASETS", "Batch", "Corpus", "Source", "TextSource", "load_dataset", "read_texts"]
