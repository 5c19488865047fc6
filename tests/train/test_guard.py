"""The guard: the robust rise of a loss by hand, what is reported, what is skipped, and the same after a resume."""

import math

import pytest

from internjax.train.guard import MAX_DOCUMENTS, Guard, Judge, rise, sentence

EVEN = [1.0, 3.0] * 16  # median 2, median absolute deviation 1


def metrics(loss, grad_norm=1.0, weight=8.0):
    return {"loss": loss, "grad_norm": grad_norm, "weight": weight}


def judged(judge, losses, *, first=1):
    rows = [
        judge.incident(step, step - 1, metrics(loss), finite=math.isfinite(loss))
        for step, loss in enumerate(losses, first)
    ]
    return [row for row in rows if row is not None]


def test_rise_by_hand():
    assert rise(2.0 + 1.4826 * 5, EVEN) == pytest.approx((2.0, 5.0))
    assert rise(2.2, [2.0] * 8) == pytest.approx((2.0, 10.0))  # no spread: a hundredth of the median is one deviation
    assert rise(1.0, [0.0] * 8) == (0.0, 0.0)
    assert rise(0.0, EVEN).z < 0


def test_a_loss_far_above_the_recent_ones_is_a_spike():
    above = 2.0 + 1.4826 * 8.01
    assert judged(Judge(Guard()), [*EVEN, 2.0 + 1.4826 * 7.99]) == []
    (row,) = judged(Judge(Guard(), describe=lambda position: [f"doc {position}"]), [*EVEN, above])
    assert row == {
        "step": 33,
        "incident": "spike",
        "position": 32,
        "loss": above,
        "grad_norm": 1.0,
        "weight": 8.0,
        "median": 2.0,
        "z": 8.01,
        "num_documents": 1,
        "documents": ["doc 32"],
    }
    assert "step 33 has a loss spike" in sentence(row) and sentence(row).endswith("data position 32: doc 32")
    assert judged(Judge(Guard(spike_z=None)), [*EVEN, 1e6]) == []
    assert judged(Judge(Guard()), [*EVEN[:31], 1e6]) == []  # less than half a window is no ground to judge on
    assert judged(Judge(Guard()), [*EVEN, -1e6]) == []


def test_a_spike_is_told_once_unless_it_rises_or_comes_again():
    rows = judged(Judge(Guard()), [*EVEN, 50.0, 50.0, 40.0, 60.0, *[2.0] * 11, 40.0])
    assert [(row["step"], row["loss"]) for row in rows] == [(33, 50.0), (36, 60.0), (48, 40.0)]


def test_only_logged_losses_enter_the_window():
    # Odd steps are 100, even ones 1: with every second step logged the window holds ones, and each 100 stands out.
    losses = [100.0, 1.0] * 4
    assert judged(Judge(Guard(spike_window=4), log_every=1), losses) == []
    rows = judged(Judge(Guard(spike_window=4), log_every=2), losses)
    assert [row["step"] for row in rows] == [5] and rows[0]["median"] == 1.0


def test_what_is_not_finite_is_skipped_so_many_times_in_a_row():
    judge = Judge(Guard(not_finite="skip", max_skipped=2))
    ends = []
    for step, loss in enumerate([1.0, math.nan, math.inf, 1.0, math.nan, math.nan, math.nan], 1):
        judge.incident(step, step, metrics(loss), finite=math.isfinite(loss))
        ends.append(judge.ends_the_run())
    assert ends == [False] * 6 + [True] and judge.num_skipped == 3
    stop = Judge(Guard())
    row = stop.incident(1, 0, metrics(1.0, grad_norm=math.inf), finite=False)
    assert stop.ends_the_run() and row["grad_norm"] == "inf" and row["loss"] == 1.0 and "layer" not in row
    assert "layer" not in Judge(Guard()).incident(1, 0, metrics(math.nan) | {"broken_layer": -1}, finite=False)
    row = Judge(Guard()).incident(1, 0, metrics(math.nan) | {"broken_layer": 2}, finite=False)
    assert "), from the output of layer 2 on (counted from 0), on the batch at data position 0" in sentence(row)


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("cut", [1, 20, 33, 36, 37, 38, 45])
def test_a_judge_that_is_resumed_goes_on_as_if_it_had_not_stopped(log_every, cut):
    guard = Guard(not_finite="skip", max_skipped=5, spike_window=8)
    losses = [*EVEN, 50.0, 45.0, 60.0, math.nan, math.nan, math.nan, 1.0, 3.0, 55.0, 2.0, 2.0, 2.0, 2.0, 70.0, 3.0]
    whole = Judge(guard, log_every=log_every)
    incidents = judged(whole, losses)
    rows = [{"step": n, "loss": loss if math.isfinite(loss) else None} for n, loss in enumerate(losses, 1)]
    # The last step of a run is always logged: one that was meant to be shorter has a row between the others.
    logged = [row for row in rows if row["step"] % log_every == 0 or row["step"] == cut]
    resumed = Judge(guard, log_every=log_every)
    resumed.resume(cut, logged, incidents)
    counted = Judge(guard, log_every=log_every)
    judged(counted, losses[:cut])
    assert resumed.num_skipped == counted.num_skipped
    assert judged(resumed, losses[cut:], first=cut + 1) == [row for row in incidents if row["step"] > cut]
    assert {row["incident"] for row in incidents} == {"spike", "not_finite"}


def test_very_many_documents_are_counted_and_not_all_named():
    judge = Judge(Guard(), describe=lambda position: [str(n) for n in range(1000)])
    row = judge.incident(1, 0, metrics(math.nan), finite=False)
    assert row["num_documents"] == 1000 and len(row["documents"]) == MAX_DOCUMENTS
    assert sentence(row).endswith("0; 1; 2 and 997 more")


@pytest.mark.parametrize("wrong", [{"max_skipped": -1}, {"spike_window": 3}, {"spike_z": 0.0}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="guard.max_skipped must be"):
        Guard(**wrong)
