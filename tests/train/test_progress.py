"""What a person sees of a run: numbers, notes, and that compiling takes its time."""

import time

import jax
import pytest

from internjax.train import progress as progress_module
from internjax.train.progress import Memory, Progress, memory_in_use

METRICS = {"loss": 2.5, "learning_rate": 3e-4}


@pytest.fixture
def two_gigabytes(monkeypatch):
    monkeypatch.setattr(progress_module, "memory_in_use", lambda: Memory(2_000_000_000, "device"))


def test_a_line_shows_loss_rate_speed_memory_and_time_left(capsys, two_gigabytes):
    progress = Progress(100, "lines")
    progress.start(0)
    progress.update(1, METRICS, tokens_per_second=1234.5, seconds_left=75, mfu=0.4321)
    progress.update(2, METRICS, tokens_per_second=1234.5, seconds_left=75)  # too soon for another line
    progress.update(100, {"loss": None}, tokens_per_second=1234.5, seconds_left=7275)
    progress.update(100, {"loss": 1.0}, tokens_per_second=0.0, seconds_left=None)
    assert capsys.readouterr().err.splitlines() == [
        "step 1/100  loss 2.5000  lr 3.00e-04  tokens/s 1,234  MFU 43.2%  memory 2.0 GB  1:15 left",
        "step 100/100  loss skipped  tokens/s 1,234  memory 2.0 GB  2:01:15 left",
        "step 100/100  loss 1.0000  memory 2.0 GB",
    ]


def test_a_bar_goes_on_where_the_run_goes_on(capsys):
    bar = Progress(100, "bar")
    bar.start(40)
    bar.update(41, METRICS, tokens_per_second=1.0, seconds_left=1.0)
    bar.note("a note")
    bar.close()
    shown = capsys.readouterr().err
    assert "a note" in shown and "41/100" in shown


def test_nothing_is_shown_where_nothing_is_wanted(capsys):
    for silent in (Progress(1, "none"), Progress(1, "lines", shown=False), Progress(1, "bar", shown=False)):
        silent.note("x")
        with silent.during("compiling"):
            silent.update(1, METRICS, tokens_per_second=1.0, seconds_left=0.0)
    assert capsys.readouterr().err == ""


def test_what_takes_long_says_for_how_long(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.05)
    progress = Progress(1, "lines")
    with pytest.raises(KeyError), progress.during("compiling the step"):
        time.sleep(0.3)
        raise KeyError
    time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compiling the step ..." and lines[1] == "compiling the step ... 0 s" and 3 <= len(lines) <= 7
    time.sleep(0.12)
    assert capsys.readouterr().err == ""  # it ends with the block


def test_memory_is_the_peak_of_the_fullest_device_or_what_the_process_holds(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory_in_use().where == "host" and memory_in_use().num_bytes > 1e7
    peaks = [{"peak_bytes_in_use": 3}, None, {"peak_bytes_in_use": 5}]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(stats) for stats in peaks])
    assert memory_in_use() == Memory(5, "device")
