"""Text while it is generated, and stop strings.

Ids become text through `Tokenizer.stream`, which gives out whole characters only, so the pieces of a row joined are the
text of its ids. With stop strings, what may be the beginning of one is held back until it is known not to be: the
pieces end where `cut_at_stop` cuts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from aurora.generation.sampling import SamplingConfig

if TYPE_CHECKING:
    from aurora.processing.processor import AuroraProcessor
    from aurora.processing.text import StreamDecoder, Tokenizer

_CLOSING_S = 2.0
"""How long `TextStream.close` waits for the thread; a prefill that runs is not interrupted."""
_SPARE_TOKENS = 4
"""Tokens a stop string's window has beyond one for each of its bytes, for those that show as nothing."""


class GenerationCancelled(Exception):  # noqa: N818  (it is no error of anything)
    """Raised inside the generating thread when nobody wants the text any more."""


class StopStrings:
    """Tells which rows have just completed a stop string."""

    def __init__(self, tokenizer: Tokenizer | AuroraProcessor, strings: Sequence[str]) -> None:
        """Keep what to look for.

        Args:
            tokenizer: Turns ids into text; a processor's is taken from it.
            strings: The stop strings, none of them empty.

        Raises:
            ValueError: if one is empty.
        """
        if not all(strings):
            raise ValueError(f"stop={list(strings)!r}: want texts that are not empty")
        self.strings = tuple(strings)
        self._tokenizer = _tokenizer_of(tokenizer)
        self._window = max((len(text.encode()) for text in strings), default=0) + _SPARE_TOKENS

    def __call__(self, rows_ids: Sequence[Sequence[int]]) -> list[bool]:
        """Look at rows that have each got one more token.

        Args:
            rows_ids: All new ids of each row; their ends alone are read.

        Returns:
            Whether the text of each row holds a stop string that its last tokens complete.
        """
        return [bool(ids) and self._is_complete(ids) for ids in rows_ids]

    def _is_complete(self, ids: Sequence[int]) -> bool:
        tail = self._tokenizer.decode(ids[self._start(ids) :])
        return any(text in tail for text in self.strings)

    def _start(self, ids: Sequence[int]) -> int:
        """Where to begin, so that what follows reads as it does behind all of the row."""
        left, start = self._window, len(ids)
        while start > 0 and (left > 0 or self._needs_more(ids[start])):
            start -= 1
            left -= ids[start] not in self._tokenizer.special_ids
        return start

    def _needs_more(self, first: int) -> bool:
        """Whether a text that begins with this id may read differently behind others: half a character, or blanks."""
        return self._tokenizer.is_partial(first) or not self._tokenizer.decode([first]).strip()


def make_stopper(sampling: SamplingConfig, tokenizer: Tokenizer | AuroraProcessor | None) -> StopStrings | None:
    """What finds the stop strings of a call.

    Args:
        sampling: Its `stop` is what to look for.
        tokenizer: Turns ids into text.

    Returns:
        None where there are no stop strings.

    Raises:
        ValueError: if there are, but no tokenizer.
    """
    if not sampling.stop_strings:
        return None
    if tokenizer is None:
        raise ValueError(f"stop={sampling.stop!r}: want tokenizer= as well, the processor or its tokenizer")
    return StopStrings(tokenizer, sampling.stop_strings)


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    """Return the text before the stop string that begins first, all of it if there is none."""
    return text[: min((at for at in map(text.find, strings) if at >= 0), default=len(text))]


class TextCallback:
    """A streamer that calls a function with text as it becomes certain."""

    def __init__(
        self,
        tokenizer: Tokenizer | AuroraProcessor,
        callback: Callable[[int, str], None],
        *,
        stop: str | Sequence[str] = (),
    ) -> None:
        """Keep whom to call.

        Args:
            tokenizer: Turns ids into text; special tokens are left out.
            callback: Gets a row's number and its next piece of text, never an empty one. What it raises ends the
                generation.
            stop: The stop strings of the call; a row's text ends before them.
        """
        self._tokenizer = _tokenizer_of(tokenizer)
        self._callback = callback
        self._strings = (stop,) if isinstance(stop, str) else tuple(stop)
        self._rows: list[_RowText] = []

    def put(self, ids: Tensor) -> None:
        """Take the next token of each row, (B,) int64 on the CPU."""
        listed = ids.tolist()
        if not self._rows:
            self._rows = [_RowText(self._tokenizer.stream(), self._strings) for _ in listed]
        for row, (text, token) in enumerate(zip(self._rows, listed, strict=True)):
            self._give(row, text.put(token))

    def end(self) -> None:
        """Give out what was held back; the next `put` begins new rows."""
        rows, self._rows = self._rows, []
        for row, text in enumerate(rows):
            self._give(row, text.end())

    def _give(self, row: int, text: str) -> None:
        if text:
            self._callback(row, text)


class TextStream:
    """Iterates over the text of a generation while it runs in a thread of its own.

    ```python
    with TextStream(processor).start(model.generate, **inputs, max_new_tokens=256) as stream:
        for text in stream:
            print(text, end="", flush=True)
    ```

    Leaving the loop or the `with` block, by Ctrl-C as well, ends the generation within a step; an error in it is raised
    where the text is read. Without `start` it is a streamer for a `generate` that runs in the caller's own thread.
    """

    def __init__(self, tokenizer: Tokenizer | AuroraProcessor, *, stop: str | Sequence[str] = ()) -> None:
        """Prepare a stream for one generation.

        Args:
            tokenizer: Turns ids into text; special tokens are left out.
            stop: Stop strings, which `start` hands on to `generate`.
        """
        self._tokenizer = _tokenizer_of(tokenizer)
        self._stop = [stop] if isinstance(stop, str) else list(stop)
        self._queue: SimpleQueue[tuple[int, str] | None] = SimpleQueue()
        self._texts = TextCallback(self._tokenizer, lambda row, text: self._queue.put((row, text)), stop=self._stop)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: BaseException | None = None

    def start(self, generate: Callable[..., Any], *args: Any, **options: Any) -> TextStream:
        """Call `generate` in a thread.

        Args:
            generate: Takes `streamer`, and `stop` with `tokenizer` where this stream has stop strings.
            *args: For it.
            **options: For it.

        Returns:
            This stream.

        Raises:
            ValueError: if it was started before, or the options hold what it sets itself.
        """
        if self._thread is not None:
            raise ValueError("TextStream: was started before, want a new one for each generation")
        if options.get("stop") or options.get("streamer"):
            raise ValueError("TextStream.start: got stop or streamer, want stop strings in TextStream(..., stop=)")
        if self._stop:
            options |= {"stop": self._stop, "tokenizer": self._tokenizer}
        options["streamer"] = self

        def run() -> None:
            try:
                self._result = generate(*args, **options)
            except GenerationCancelled:
                pass
            except BaseException as error:  # raised again in the thread that reads
                self._error = error
            finally:
                self._queue.put(None)

        # A daemon, so that a program that is interrupted does not wait for a prefill.
        self._thread = threading.Thread(target=run, name="aurora-generate", daemon=True)
        self._thread.start()
        return self

    def put(self, ids: Tensor) -> None:
        """Take the next token of each row.

        Args:
            ids: (B,) int64 on the CPU.

        Raises:
            GenerationCancelled: if the stream was closed.
        """
        if self._closed.is_set():
            raise GenerationCancelled("the stream was closed")
        self._texts.put(ids)

    def end(self) -> None:
        """Give out what was held back."""
        self._texts.end()
        if self._thread is None:
            self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of the only row.

        Raises:
            ValueError: if there are several.
        """
        for row, text in self.by_row():
            if row > 0:
                raise ValueError("TextStream: got text of several rows, want `for row, text in stream.by_row()`")
            yield text

    def by_row(self) -> Iterator[tuple[int, str]]:
        """Yield pieces with the number of their row, as they come."""
        try:
            while (piece := self._queue.get()) is not None:
                yield piece
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    @property
    def result(self) -> Any:
        """What `generate` returned, None if it was cancelled; waits for it, and raises what it raised."""
        if self._thread is None:
            raise ValueError("TextStream.result: nothing was started, want start() first")
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def close(self) -> None:
        """End the generation with its next token, and wait a moment for it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_S)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _RowText:
    """Text of one row as its ids arrive, up to the first stop string."""

    def __init__(self, decoder: StreamDecoder, strings: Sequence[str]) -> None:
        self._decoder = decoder
        self._strings = strings
        self._held = ""
        self._cut = False

    def put(self, token_id: int) -> str:
        """Take one id and return the text that is now certain, often empty."""
        return self._take(self._decoder.put(token_id), final=False)

    def end(self) -> str:
        """Return the rest."""
        return self._take(self._decoder.end(), final=True)

    def _take(self, text: str, *, final: bool) -> str:
        if self._cut:
            return ""
        text = self._held + text
        known = cut_at_stop(text, self._strings)
        self._cut = len(known) < len(text)
        self._held = "" if self._cut or final else self._beginning(text)
        return known[: len(text) - len(self._held)]

    def _beginning(self, text: str) -> str:
        """The longest end of the text that a stop string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        ends = (text[-length:] for length in range(min(longest, len(text)), 0, -1))
        return next((end for end in ends if any(string.startswith(end) for string in self._strings)), "")


def _tokenizer_of(one: Tokenizer | AuroraProcessor) -> Tokenizer:
    # Not isinstance: the processor's module brings pictures and templates along.
    inner: Tokenizer | None = getattr(one, "tokenizer", None)
    return cast("Tokenizer", one) if inner is None else inner
