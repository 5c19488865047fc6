"""What a person sees while a run trains: a bar on a terminal, a line every ten seconds elsewhere."""

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax

SECONDS_BETWEEN_LINES = 10.0


class Memory(NamedTuple):
    """Bytes in use: the peak of this process's fullest device, or what the process holds where devices do not tell."""

    num_bytes: int
    where: Literal["device", "host"]


def memory_in_use() -> Memory:
    """Returns the memory in use now."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    if peaks:
        return Memory(max(peaks), "device")
    try:
        with open("/proc/self/statm") as file:
            return Memory(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), "host")
    except OSError:  # no Linux: the peak is all that can be asked for, in bytes on macOS
        return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "host")


class Progress:
    """Shows step, loss, rate, tokens per second, MFU, memory and time left; `shown` False shows nothing."""

    def __init__(self, num_steps: int, mode: Literal["auto", "bar", "lines", "none"] = "auto", *, shown: bool = True):
        self._num_steps = num_steps
        self._last_line = 0.0
        self._bar = None
        interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._lines = mode == "lines" or (mode == "auto" and not interactive)
        if shown and (mode == "bar" or (mode == "auto" and interactive)):
            try:
                from tqdm.auto import tqdm
            except ImportError:
                self._lines = True
            else:
                self._bar = tqdm(total=num_steps, unit="step", dynamic_ncols=True)
        self._lines = self._lines and shown

    def start(self, first_step: int) -> None:
        """Puts the bar at the step that a resumed run goes on from."""
        if self._bar is not None:
            self._bar.initial = self._bar.n = first_step
            self._bar.refresh()

    def note(self, text: str) -> None:
        """Shows one line of text."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Shows that `what` is under way and for how long: every second on the bar, every ten seconds in lines."""
        ended, started = threading.Event(), time.monotonic()

        def tick():
            while not ended.wait(1.0 if self._bar is not None else SECONDS_BETWEEN_LINES):
                text = f"{what} ... {time.monotonic() - started:.0f} s"
                if self._bar is not None:
                    self._bar.set_postfix_str(text)
                else:
                    self.note(text)

        if self._bar is None and not self._lines:
            yield
            return
        self.note(f"{what} ...")
        ticker = threading.Thread(target=tick, name="progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            ended.set()
            ticker.join()

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        tokens_per_second: float,
        seconds_left: float | None,
        mfu: float | None = None,
    ) -> None:
        """Shows the state of things after `step`; a loss of None is that of a step that was skipped."""
        line = self._lines and (time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or step == self._num_steps)
        if self._bar is None and not line:
            return
        numbers = {"loss": "skipped" if metrics["loss"] is None else f"{metrics['loss']:.4f}"}
        if "learning_rate" in metrics:
            numbers["lr"] = f"{metrics['learning_rate']:.2e}"
        if tokens_per_second:
            numbers["tokens/s"] = f"{tokens_per_second:,.0f}"
        if mfu:
            numbers["MFU"] = f"{mfu:.1%}"
        memory = memory_in_use()
        numbers["memory" if memory.where == "device" else "host memory"] = f"{memory.num_bytes / 1e9:.1f} GB"
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._last_line = time.monotonic()
            shown = "  ".join(f"{name} {value}" for name, value in numbers.items())
            left = "" if seconds_left is None else f"  {_clock(seconds_left)} left"
            self.note(f"step {step}/{self._num_steps}  {shown}{left}")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
