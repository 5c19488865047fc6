"""How many turns a block has: as many as the pause between tokens allows, and the same tokens in any number."""

import pytest

from internjax.decode.engine import Engine
from internjax.decode.pace import Pace
from internjax.decode.request import Request
from internjax.decode.sample import SamplingParams
from tests.decode.small import CONFIG, PARAMS


def paced(seconds_per_turn: float, *, most=4, max_pause=0.01, blocks=20) -> list[int]:
    """Returns the turns of blocks, one after the other, on a device that takes so long for each turn."""
    pace, now, found = Pace(most, max_pause), 100.0, []
    for index in range(blocks):
        found.append(pace.turns)
        now += found[-1] * seconds_per_turn
        pace.ended(now, turns=found[-1], follows=index > 0)
    return found


def test_blocks_are_as_long_as_the_pause_allows():
    assert paced(0.001) == [4] * 20
    assert paced(0.004)[:2] == [4, 4] and paced(0.004)[2:] == [2] * 18  # the second is dispatched before the first ends
    assert paced(0.02)[2:] == [1] * 18  # a turn that takes longer is one block
    assert paced(0.02, max_pause=None) == [4] * 20


def test_blocks_grow_again_and_waiting_for_work_is_no_turn():
    pace, now = Pace(4, 0.01), 0.0
    for _ in range(10):
        now += 0.04
        pace.ended(now, turns=4, follows=True)
    assert pace.turns == 1
    pace.ended(now := now + 1000, turns=1, follows=False)  # there was nothing to do before it
    for _ in range(20):
        now += 0.001
        pace.ended(now, turns=1, follows=True)
    assert pace.turns == 4


def test_tokens_come_one_by_one_and_are_the_same():
    requests = [Request((5, 9, 17 + n), 20, SamplingParams(seed=n)) for n in range(2)]
    found = {}
    for max_pause in (None, 1e-9):
        engine = Engine(PARAMS, CONFIG, max_context=64, num_slots=3, page_size=4, prefill_chunk=16, max_pause=max_pause)
        handles = [engine.submit(request) for request in requests]
        while engine.tick():
            pass
        events = [[event for event in handle.events() if event.ids] for handle in handles]
        found[max_pause] = [[token for event in own for token in event.ids] for own in events]
        # Until it is known how long a turn takes, blocks are long.
        sizes = [len(event.ids) for event in events[0]]
        assert max(sizes) == 4 if max_pause is None else sizes[-4:] == [1] * 4, sizes
    assert found[None] == found[1e-9]
    with pytest.raises(ValueError, match="max_pause is 0; give seconds over 0"):
        Engine(PARAMS, CONFIG, max_context=64, max_pause=0)
