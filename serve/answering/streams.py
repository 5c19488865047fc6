"""Answers awaited: the events of several as they come, in an event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial

from serve.answering.answer import Answer, Event, Result

MORE_READERS = 512
"""Threads of this process that read answers beside the first of each request: a request may have as many answers as
that, and a server runs hundreds of requests."""
_more = threading.BoundedSemaphore(MORE_READERS)


def all_or_none(starts: Iterable[Callable[[], Answer]]) -> list[Answer]:
    """The answers that are started one after the other; if one cannot be, the others are aborted."""
    answers: list[Answer] = []
    try:
        for start in starts:
            answers.append(start())
    except BaseException:
        _abort(answers)
        raise
    return answers


async def submitted(starts: Iterable[Callable[[], Answer]], *, brief: bool = False) -> list[Answer]:
    """`all_or_none` in a thread; answers that are no longer waited for when they are there are aborted.

    brief: to start them takes less time than a thread to get its turn; then it is done here.
    """
    if brief:
        return all_or_none(starts)
    answers: list[Answer] = []
    lock, is_left = threading.Lock(), threading.Event()

    def run() -> None:
        started = all_or_none(starts)
        with lock:
            answers.extend(started)
            if is_left.is_set():
                _abort(answers)

    try:
        await asyncio.to_thread(run)
    except BaseException:
        with lock:
            is_left.set()
            _abort(answers)
        raise
    return answers


def _abort(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer.abort()


async def events_of(answers: Sequence[Answer], *, num_readers: int | None = None) -> AsyncIterator[tuple[int, Event]]:
    """Events of all answers as they come, with the answer's index. Leaving it in any way aborts what still runs.

    num_readers: answers that are read at once, in a thread each (None: all), as far as MORE_READERS reach. Those that
    wait for a reader are drawn all the same: their events come later, and a stop string is seen later.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    def pump(index: int, answer: Answer) -> None:
        try:
            for event in answer:
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))
        except Exception as error:  # re-raised where the events are read
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(queue.put_nowait, (index, error))

    unread, more = collections.deque(enumerate(answers)), _more
    most, num_started = num_readers or len(answers), 0

    def read(*, is_first: bool) -> None:
        try:
            with contextlib.suppress(IndexError):  # nothing is left to read
                while True:
                    pump(*unread.popleft())
        finally:
            if not is_first:
                more.release()

    def start_readers() -> None:
        """The first, and as many more as are wanted and left; what they find to read they share."""
        nonlocal num_started
        while unread and num_started < most and (num_started == 0 or more.acquire(blocking=False)):
            reader = partial(read, is_first=num_started == 0)
            try:
                threading.Thread(target=reader, name=f"reader-{num_started}", daemon=True).start()
            except RuntimeError:  # the system gives no more threads
                if num_started == 0:
                    raise
                more.release()
                return
            num_started += 1

    open_answers = len(answers)
    try:
        start_readers()
        while open_answers:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Result):
                open_answers -= 1
                start_readers()  # others may have ended since
            yield index, event
    finally:
        unread.clear()
        _abort(answers)
