"""End with exit code 3 while the data set in the current folder is still being read."""

from pathlib import Path

from picogpt.cli.common import end_process
from picogpt.data import ArticleReader, StreamSpec, find_shards
from picogpt.data.articles import Cursor

reader = ArticleReader(find_shards(StreamSpec(name="x", path=str(Path.cwd()))), 0, print)
reader.start(Cursor(0, 0, 0))
reader.take(lambda: False)
reader.close()
print("read", end="")
end_process(3)
