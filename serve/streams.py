"""Answers awaited: the events of several as they come, in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence

from serve.answer import Answer, Event, Result


async def events_of(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Event]]:
    """Events of all answers as they come, with the answer's index. Leaving it in any way aborts what still runs."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    def pump(index: int, answer: Answer) -> None:
        try:
            for event in answer:
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))
        except Exception as error:  # re-raised where the events are read
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(queue.put_nowait, (index, error))

    for index, answer in enumerate(answers):
        threading.Thread(target=pump, args=(index, answer), name=f"answer-{index}", daemon=True).start()
    open_answers = len(answers)
    try:
        while open_answers:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            open_answers -= isinstance(event, Result)
            yield index, event
    finally:
        for answer in answers:
            answer.abort()
