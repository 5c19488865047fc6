"""Online rounds of COOL RLHF: PPO against a reward model, with responses of the early and the late policy kept apart.

InternLM2 technical report (arXiv:2403.17297), section 4.2.2. A round returns values; the loop that the method is stands
in the experiment, because it passes through data and reward training:

    for round_index in range(num_rounds):
        result = run_round(ppo, state, prompts, probe, reward, round_index=round_index, ...)
        pairs += fast_path(result.early, result.late, gold, conditions.names)    # and train the reward model on them
        reward, state = model_reward(...), result.state
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from internjax.rlhf.monitor import Samples, make_samples
from internjax.rlhf.ppo import PPO, PPOState, draw, iteration, on
from internjax.rlhf.rollout import Prompts, Reward, Weights
from internjax.train.batch import Batch

# First component of every place: draws for training and draws for looking never share a seed.
TRAINING, PROBE = range(2)


class Round(NamedTuple):
    """The policy and critic after a round, responses to the probe prompts before and after it, and figures."""

    state: PPOState
    early: Samples
    late: Samples
    metrics: list[dict[str, float]]
    """One row per iteration: those of `ppo.iteration`, with `round`, `iteration` and `warm_up`."""


def probe_policy(ppo: PPO, state: PPOState, probe: Prompts, reward: Reward, *, round_index: int, stage: int) -> Samples:
    """Returns the present policy's responses to the probe prompts, scored. Nothing is learned from them."""
    drawn = draw(ppo, state, probe, place=(PROBE, round_index, stage))
    with on(ppo.mesh):
        return make_samples(drawn, np.asarray(reward(drawn), np.float32))


def run_round(
    ppo: PPO,
    state: PPOState,
    prompts: Callable[[int, int], Prompts],
    probe: Prompts,
    reward: Reward,
    *,
    round_index: int,
    num_iterations: int,
    warm_up_iterations: int = 0,
    reference: Weights | None = None,
    pretrain: Callable[[int], Iterator[Batch]] | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> Round:
    """Returns the outcome of one round: probe, `warm_up_iterations` of the critic alone, `num_iterations`, probe.

    `prompts(round_index, index)` gives the prompts of an iteration, warm-up included (the report has 50 of warm-up and
    400 in all). `log` is called with every row of metrics. All draws depend on (seed, round, iteration, row) alone.
    """
    early = probe_policy(ppo, state, probe, reward, round_index=round_index, stage=0)
    rows = []
    for index in range(warm_up_iterations + num_iterations):
        warm_up = index < warm_up_iterations
        result = iteration(
            ppo,
            state,
            prompts(round_index, index),
            reward,
            reference=reference,
            pretrain=None if warm_up else pretrain,
            place=(TRAINING, round_index, index),
            train_actor=not warm_up,
        )
        state = result.state
        rows.append({"round": round_index, "iteration": index, "warm_up": float(warm_up)} | result.metrics)
        if log is not None:
            log(rows[-1])
    late = probe_policy(ppo, state, probe, reward, round_index=round_index, stage=1)
    return Round(state, early, late, rows)
