"""Two online rounds on a tiny policy: a reward model with a loophole is exploited, noticed, and mended."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model.config import ModelConfig
from internjax.rlhf import reward
from internjax.rlhf.config import End, KLInReward, PPOConfig
from internjax.rlhf.cool import run_round
from internjax.rlhf.monitor import Samples, Thresholds, copied_share, drift, fast_path, figures, repeated_share
from internjax.rlhf.pairs import Pair, make_conditions, preference_batches
from internjax.rlhf.ppo import init, make_ppo, replace_critic
from internjax.rlhf.rollout import Prompts, Weights, model_reward
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step
from tests.weights import random_params

BOS, EOS, REWARD = 1, 2, 15
CONFIG = ModelConfig(
    vocab_size=16,
    d_model=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=64,
    dtype="float32",
    rope_theta=1e4,
    initializer_range=0.1,
)
LONGEST, PAIR_LENGTH = 10, 18
NAMES = ("five", "six")
FAVOURITE = {"five": 5, "six": 6}


def prompt(domain: int, topic: int) -> list[int]:
    """The domain (which condition judges) can be read off the prompt; the condition itself is never in it."""
    return [BOS, 8 + domain, 10 + topic]


def prompts(batch, seed):
    topics = np.random.default_rng(seed).integers(0, 4, size=batch)
    domains = np.arange(batch) % 2
    rows = np.asarray([prompt(*row) for row in zip(domains, topics)])
    return Prompts(rows, np.full(batch, 3), domains)


def gold(samples: Samples) -> np.ndarray:
    """Half for ending by itself, half for the share of the condition's favourite token; nothing without an end."""
    return np.asarray(
        [
            0.5 + 0.5 * response.count(FAVOURITE[NAMES[condition]]) / len(response) if ended else 0.0
            for response, condition, ended in zip(samples.responses, samples.conditions, samples.ended)
        ]
    )


def flawed_pairs(num_pairs, seed=0):
    """More of the favourite wins, and nothing is said about ending: the loophole."""
    rng = np.random.default_rng(seed)
    result = []
    while len(result) < num_pairs:
        name = NAMES[len(result) % 2]
        sides = []
        for _ in range(2):
            body = rng.integers(3, 14, size=rng.integers(1, LONGEST))
            body = np.where(rng.random(len(body)) < rng.random(), rng.choice([5, 6]), body)
            sides.append(body.tolist() + ([EOS] if rng.random() < 0.5 else [3]))
        sides.sort(key=lambda side: side.count(FAVOURITE[name]))
        if sides[0].count(FAVOURITE[name]) < sides[1].count(FAVOURITE[name]):
            result.append(Pair(prompt(NAMES.index(name), int(rng.integers(4))), sides[1], sides[0], name))
    return result


@functools.cache
def two_rounds():
    """Reward model -> PPO -> fast path -> reward model -> PPO; returns the rounds, pairs, program and log."""
    conditions = make_conditions({"five": [BOS, 5, 5], "six": [BOS, 6, 6]}, bos_id=BOS)
    params = random_params(CONFIG)
    scorer, scorer_config = reward.from_lm(params, CONFIG, jax.random.key(1))
    optimizer = make_optimizer(AdamW(peak_lr=1e-2, weight_decay=0.01), Constant(), 1000)
    ranking_step = make_step(reward.ranking(scorer_config), optimizer)

    def trained(scorer, pairs, seed):
        state = init_state(jax.tree.map(jnp.copy, scorer), optimizer)
        data = preference_batches(
            pairs, conditions, batch_size=32, length=PAIR_LENGTH, reward_token_id=REWARD, seed=seed
        )(0)
        for _ in range(80):
            state, _ = ranking_step(state, next(data))
        return state.trainable

    def rates(peak_lr):
        return make_optimizer(AdamW(peak_lr=peak_lr, weight_decay=0.0, eps=1e-5), Constant(), 1000)

    settings = PPOConfig(
        KLInReward(0.2),
        top_p=1.0,
        max_new_tokens=LONGEST,
        minibatch_size=64,
        num_epochs=2,
        pretrain_coefficient=0.0,
        truncation=End(),
    )
    ppo = make_ppo(
        settings,
        CONFIG,
        scorer_config,
        stop_ids=(EOS,),
        actor_optimizer=rates(3e-3),
        critic_optimizer=rates(1e-2),
        seed=0,
    )
    pairs, state, rounds, found, logged = flawed_pairs(256), None, [], [], []
    for round_index in range(2):
        scorer = trained(scorer, pairs, round_index)
        critic, _ = reward.from_lm(scorer, scorer_config)
        state = init(ppo, params, critic) if state is None else replace_critic(ppo, state, critic)
        result = run_round(
            ppo,
            state,
            lambda round_index, index: prompts(64, 1000 * round_index + index),
            prompts(64, 99),
            model_reward(Weights(scorer), conditions, config=scorer_config, reward_token_id=REWARD),
            reference=Weights(params),
            round_index=round_index,
            num_iterations=20,
            warm_up_iterations=4,
            log=logged.append,
        )
        state = result.state
        rounds.append(result)
        found.append(fast_path(result.early, result.late, gold, conditions.names, pairs_per_pattern=40))
        pairs = pairs + 16 * found[-1]  # few, and they must outweigh what the first pairs say nothing of
    return rounds, found, ppo, logged


def test_a_loophole_is_exploited_noticed_and_mended():
    (first, second), found, _, _ = two_rounds()
    hacked = drift(first.early, first.late, gold)
    assert hacked.late.reward > hacked.early.reward + 2
    assert hacked.late.gold < hacked.early.gold / 2
    assert {"overrated", "unended"} <= set(hacked.alarms)
    assert 20 <= len(found[0]) <= 100
    mended = drift(second.early, second.late, gold)
    assert mended.late.gold > max(hacked.early.gold, hacked.late.gold + 0.2)
    assert "overrated" not in mended.alarms and "unended" not in mended.alarms


def test_a_round_compiles_once_and_logs_every_iteration():
    rounds, _, ppo, logged = two_rounds()
    assert ppo.actor_step.num_traces == ppo.critic_step.num_traces == 1
    assert logged == [row for result in rounds for row in result.metrics]
    assert [(row["round"], row["iteration"]) for row in logged] == [(r, i) for r in range(2) for i in range(24)]
    assert [row["warm_up"] for row in logged[3:5]] == [1.0, 0.0]
    assert "loss" not in logged[3] and "loss" in logged[4]
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    assert int(rounds[1].state.actor.step) == 2 * 20 * 2 and int(rounds[1].state.critic.step) == 24 * 2
    # The critic of the second round is new; the policy goes on where the first round left it.
    assert [response[-1] == EOS for response in rounds[0].late.responses] == rounds[0].late.ended.tolist()
    assert rounds[0].late.responses != rounds[1].early.responses


def test_shares_by_hand():
    assert copied_share([1, 2, 3, 4, 5], [2, 3, 4, 5, 9]) == 0.5
    assert copied_share([1, 2, 3, 4], [1, 2, 3]) == 0.0
    assert repeated_share([7, 7, 7, 7, 7]) == pytest.approx(2 / 3)
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0 and repeated_share([1]) == 0.0


def samples(responses, rewards, ended=None, prompt=(1, 8, 10), condition=0):
    size = len(responses)
    return Samples(
        [list(prompt)] * size,
        [list(response) for response in responses],
        np.full(size, condition),
        np.asarray(rewards, np.float32),
        np.asarray([True] * size if ended is None else ended),
    )


def test_figures_by_hand():
    got = figures(samples([[5, 2], [5, 2], [3, 3, 3, 3]], [1, 2, 3], [True, True, False]), np.asarray([1, 1, 0]))
    wanted = {"reward": 2, "gold": 2 / 3, "length": 8 / 3, "ended": 2 / 3, "copied": 0, "repeated": 1 / 6}
    assert got._asdict() == pytest.approx(wanted | {"distinct": 2 / 3})


def test_every_alarm_can_be_raised_and_none_is_without_cause():
    calm = samples([[5, 6, 7, 8, i % 4 + 3, 2] for i in range(20)], np.linspace(0, 1, 20), prompt=range(1, 9))

    def alarms(late, gold_of=lambda s: np.zeros(len(s.rewards)), thresholds=Thresholds()):
        return set(drift(calm, late, gold_of, thresholds).alarms)

    assert alarms(calm) == set()
    assert alarms(calm._replace(responses=[[3, 4, 5, 6, 7] * 2 for _ in range(20)])) >= {"long", "alike"}
    assert "copied" in alarms(calm._replace(responses=[[2, 3, 4, 5, 6, 7]] * 20))
    assert "repeated" in alarms(calm._replace(responses=[[9, 9, 9, 9, 9, 2]] * 20))
    assert alarms(calm._replace(ended=np.zeros(20, bool))) == {"unended"}
    better_liked = calm._replace(rewards=calm.rewards + 5)

    def gold_of(s):
        return 1.0 - s.rewards

    assert alarms(better_liked, gold_of) == {"overrated"}
    assert alarms(better_liked) == set()
    assert alarms(better_liked, gold_of, Thresholds(standard_errors=1e9)) == set()


def test_fast_path_pairs_by_hand():
    good, bad, cut, copy = [5, 5, 2], [6, 2], [5, 6, 7], [1, 8, 10, 8, 10]
    early = samples([good, bad], [1.0, 0.0])
    late = samples([bad, cut, good, copy], [3.0, -2.0, 1.0, 9.0], [True, False, True, True])
    elsewhere = samples([bad], [9.0], prompt=(1, 9, 9), condition=1)
    joined = Samples(*(list(a) + list(b) for a, b in zip(late, elsewhere)))

    def gold_of(s):
        return np.asarray([float(response == good) for response in s.responses])

    found = fast_path(early, joined, gold_of, ("first", "second"))
    # The one liked most wrongly comes first; nothing better is known for the other prompt.
    assert [(pair.rejected, pair.pattern) for pair in found] == [(copy, "long"), (bad, "overrated"), (cut, "unended")]
    assert all(pair.chosen == good and pair.prompt == [1, 8, 10] and pair.condition == "first" for pair in found)
    # A plain response that the reward model already ranks below the good one needs no pair.
    modest = late._replace(rewards=np.asarray([0.5, -2.0, 1.0, 9.0], np.float32))
    assert [pair.rejected for pair in fast_path(early, modest, gold_of, ("first",))] == [copy, cut]
    many = samples([bad] * 9, np.arange(9) + 2.0)
    limited = fast_path(early, many, gold_of, ("first",), pairs_per_pattern=4)
    assert len(limited) == 4
    patient = fast_path(early, late, gold_of, ("first",), thresholds=Thresholds(length_ratio=9.0))
    assert {pair.pattern for pair in patient} == {"overrated", "unended"}
