"""Where tasks run: in threads of this process, or on a Ray cluster; and how far they are.

The same functions, so the same bytes. A task writes its result into the work folder and returns little, so an executor
is no more than a map. With Ray every node must see the input and the output folder under the same path.
"""

import contextlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""(function, items) -> its results, in the order of the items. The text of an item says what it is, in errors."""
MOST_RETRIES = 3
"""Of a task whose worker dies; a document that kills it does so each time."""


@contextlib.contextmanager
def local(num_threads: int | None = None) -> Iterator[Map]:
    """Gives a map over threads of this process (default: one per core); compiled loops leave the interpreter to others.

    After the first error no further item is begun.
    """
    num_threads = num_threads or os.cpu_count() or 1

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        if num_threads == 1:
            yield from map(function, items)
            return
        with futures.ThreadPoolExecutor(num_threads) as pool:
            waiting = [pool.submit(function, item) for item in items]
            try:
                for future in waiting:
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()

    yield run


@contextlib.contextmanager
def ray(address: str | None = None) -> Iterator[Map]:
    """Gives a map over the Ray cluster at `address` (None: one is started here, or the one already joined is used).

    A task whose worker or node dies is begun again, elsewhere, MOST_RETRIES times; then ValueError names it. Nothing is
    reported to anybody.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")  # 30 are too few on a busy machine
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray needs the package ray: pip install -e '.[cluster]' in the checkout") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            wanted = f"joined at {address}; look at `ray status` there" if address else "started; is the machine busy?"
            raise ValueError(f"Ray could not be {wanted} ({error})") from error

    @ray.remote(max_retries=MOST_RETRIES, num_cpus=1)
    def call(function: Any, item: Any) -> Any:
        return function(item)

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        in_flight = 4 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        shared = ray.put(function)
        waiting = [call.remote(shared, item) for item in items[:in_flight]]
        for number in range(len(items)):
            if in_flight + number < len(items):
                waiting.append(call.remote(shared, items[in_flight + number]))
            try:
                yield ray.get(waiting[number])
            except ray.exceptions.RayError as error:
                for other in waiting[number + 1 :]:
                    ray.cancel(other)
                if isinstance(error, ray.exceptions.RayTaskError):
                    raise (error.cause if error.cause is not None else error) from None
                what = textwrap.shorten(str(items[number]), 400)
                raise ValueError(
                    f"the worker of {what} died {1 + MOST_RETRIES} times ({_first_line(error)}); leave out "
                    "what it dies of, or give the cluster more memory; the same command goes on where it was"
                ) from error

    try:
        yield run
    finally:
        if started:
            ray.shutdown()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives what shows (what, done, of how many): a bar on a terminal, a line per step of the chain elsewhere."""
    tqdm: Any = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
    bar: Any = None
    label_now = ""

    def show(label: str, done: int, total: int) -> None:
        nonlocal bar, label_now
        if tqdm is None:
            if done == total:
                print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
            return
        if label != label_now or bar is None:
            if bar is not None:
                bar.close()
            bar, label_now = tqdm(total=total, desc=label, dynamic_ncols=True), label
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
