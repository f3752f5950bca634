"""Where files that appear whole were before evaluation wrote such files too."""

from evaluation.atomic import UNFINISHED_SUFFIX, file_sha256, sync, write_whole

__all__ = ["UNFINISHED_SUFFIX", "file_sha256", "sync", "write_whole"]
