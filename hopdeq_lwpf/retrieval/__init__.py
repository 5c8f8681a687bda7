"""One retrieval step as a fixed-point function, with its energy. Knows no solver."""

from hopdeq_lwpf.retrieval.context import RetrievalContext as RetrievalContext
from hopdeq_lwpf.retrieval.context import combine as combine
from hopdeq_lwpf.retrieval.context import times as times
from hopdeq_lwpf.retrieval.function import INJECT as INJECT
from hopdeq_lwpf.retrieval.function import AnyContext as AnyContext
from hopdeq_lwpf.retrieval.function import Retrieval as Retrieval
from hopdeq_lwpf.retrieval.streamed import streams as streams
from hopdeq_lwpf.retrieval.streamed_context import StreamedContext as StreamedContext
