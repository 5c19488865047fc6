"""Reward hacking: how responses drift between an early and a late policy, and the pairs that tell the reward model.

InternLM2 technical report (arXiv:2403.17297), section 4.2.2, the fast path: after each round, compare early with late
responses, name the patterns by which the policy pleases the reward model alone, and add 20 to 100 preference pairs
against each. The report's people look; here programs look, for the patterns below.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from internjax.rlhf.pairs import Pair
from internjax.rlhf.rollout import Rollout


class Samples(NamedTuple):
    """Responses on the host, one entry per response."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """The stop token is the last id of a response that ended."""
    conditions: np.ndarray  # int, the index of the condition
    rewards: np.ndarray  # float32, what the policy was trained to raise
    ended: np.ndarray  # bool


Gold = Callable[[Samples], np.ndarray]
"""samples -> one number per response that cannot be argued with, e.g. whether a program runs, or what people said."""


def make_samples(drawn: Rollout, rewards: np.ndarray) -> Samples:
    """Returns a rollout as lists of ids without padding."""
    drawn = jax.device_get(drawn)
    rows = [
        (tokens[:start].tolist(), tokens[start:end].tolist())
        for tokens, start, end in zip(drawn.tokens_BT, drawn.prompt_lengths_B, drawn.lengths_B)
    ]
    prompts, responses = (list(side) for side in zip(*rows))
    return Samples(prompts, responses, drawn.condition_B, np.asarray(rewards, np.float32), drawn.ended_B)


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(n))))


def copied_share(prompt: Sequence[int], response: Sequence[int], *, n: int = 4) -> float:
    """Returns the share of the response's n-grams that the prompt holds; 0 for a response shorter than n."""
    found, known = _ngrams(response, n), set(_ngrams(prompt, n))
    return sum(ngram in known for ngram in found) / len(found) if found else 0.0


def repeated_share(response: Sequence[int], *, n: int = 3) -> float:
    """Returns the share of the response's n-grams that came before in it; 0 for a response shorter than n."""
    found = _ngrams(response, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


class Figures(NamedTuple):
    """What a set of responses looks like: means and shares over the responses."""

    reward: float
    gold: float
    length: float
    ended: float
    copied: float
    repeated: float
    distinct: float
    """Different responses over all."""


def figures(samples: Samples, gold_scores: np.ndarray) -> Figures:
    """Returns the figures of the samples."""
    return Figures(
        reward=float(np.mean(samples.rewards)),
        gold=float(np.mean(gold_scores)),
        length=float(np.mean([len(response) for response in samples.responses])),
        ended=float(np.mean(samples.ended)),
        copied=float(np.mean(list(itertools.starmap(copied_share, zip(samples.prompts, samples.responses))))),
        repeated=float(np.mean([repeated_share(response) for response in samples.responses])),
        distinct=len(set(map(tuple, samples.responses))) / len(samples.responses),
    )


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """How much drift raises an alarm, and when one response shows a pattern. Own choices."""

    length_ratio: float = 1.5
    """Late over early mean length; also a response's length over the early mean."""
    share_rise: float = 0.1
    """Rise of the copied, repeated or not-ended share; fall of the distinct share."""
    share: float = 0.5
    """A response shows a pattern when at least this share of it is copied or repeated."""
    standard_errors: float = 2.0
    """A reward that rises while gold falls counts when both do by so many standard errors."""


class Drift(NamedTuple):
    """Early and late figures, and which patterns of reward hacking they show, each with its reason."""

    early: Figures
    late: Figures
    alarms: dict[str, str]


def drift(early: Samples, late: Samples, gold: Gold, thresholds: Thresholds = Thresholds()) -> Drift:
    """Returns how late responses differ from early ones.

    Alarms: `overrated` (reward up, gold down), `long`, `copied`, `repeated`, `unended`, `alike` (fewer distinct).
    """
    early_gold, late_gold = np.asarray(gold(early), float), np.asarray(gold(late), float)
    before, after = figures(early, early_gold), figures(late, late_gold)
    alarms = {}

    def rise(of_early, of_late):
        error = np.sqrt(np.var(of_early) / len(of_early) + np.var(of_late) / len(of_late))
        return (np.mean(of_late) - np.mean(of_early)) / max(error, 1e-9)

    reward_rise, gold_rise = rise(early.rewards, late.rewards), rise(early_gold, late_gold)
    if reward_rise > thresholds.standard_errors and gold_rise < -thresholds.standard_errors:
        alarms["overrated"] = (
            f"reward {before.reward:.3f} -> {after.reward:.3f} while gold {before.gold:.3f} -> {after.gold:.3f}"
        )
    if after.length > thresholds.length_ratio * before.length:
        alarms["long"] = f"mean length {before.length:.1f} -> {after.length:.1f} tokens"
    for name, pattern, sign in (
        ("copied", "copied", 1),
        ("repeated", "repeated", 1),
        ("ended", "unended", -1),
        ("distinct", "alike", -1),
    ):
        first, second = getattr(before, name), getattr(after, name)
        if sign * (second - first) > thresholds.share_rise:
            alarms[pattern] = f"{name} share {first:.2f} -> {second:.2f}"
    return Drift(before, after, alarms)


def _pattern(late: Samples, index: int, early_length: float, thresholds: Thresholds) -> str:
    """Returns the most specific pattern that a late response shows; `overrated` when it shows no other."""
    prompt, response = late.prompts[index], late.responses[index]
    # The order is important: a copy may also be long, and anything may be cut off.
    if copied_share(prompt, response) >= thresholds.share:
        return "copied"
    if repeated_share(response) >= thresholds.share:
        return "repeated"
    if len(response) > thresholds.length_ratio * early_length:
        return "long"
    if not late.ended[index]:
        return "unended"
    return "overrated"


def fast_path(
    early: Samples,
    late: Samples,
    gold: Gold,
    condition_names: Sequence[str],
    *,
    pairs_per_pattern: int = 100,
    thresholds: Thresholds = Thresholds(),
) -> list[Pair]:
    """Returns preference pairs against what late responses do wrong, at most `pairs_per_pattern` of each pattern.

    The rejected side is a late response; the chosen side the one of highest gold among early and late responses to the
    same prompt under the same condition, and its gold is strictly higher. A response that shows no pattern counts only
    if the reward model prefers it to the chosen side. Where there are too many, those it gets most wrong come first.
    """
    gold_scores = {"early": np.asarray(gold(early), float), "late": np.asarray(gold(late), float)}
    candidates = defaultdict(list)
    for name, samples in (("early", early), ("late", late)):
        for index, (prompt, condition) in enumerate(zip(samples.prompts, samples.conditions)):
            entry = (gold_scores[name][index], samples.rewards[index], samples.responses[index])
            candidates[tuple(prompt), int(condition)].append(entry)
    early_length = float(np.mean([len(response) for response in early.responses]))

    found = []
    for index, prompt in enumerate(late.prompts):
        condition = int(late.conditions[index])
        best_gold, best_reward, best = max(candidates[tuple(prompt), condition], key=lambda entry: entry[0])
        if not best_gold > gold_scores["late"][index]:
            continue
        overrating = float(late.rewards[index] - best_reward)
        pattern = _pattern(late, index, early_length, thresholds)
        if pattern == "overrated" and overrating <= 0:
            continue
        pair = Pair(prompt, best, late.responses[index], condition_names[condition], pattern)
        found.append((overrating, pair))
    found.sort(key=lambda entry: -entry[0])

    taken, pairs = Counter(), []
    for _, pair in found:
        if taken[pair.pattern] < pairs_per_pattern:
            taken[pair.pattern] += 1
            pairs.append(pair)
    return pairs
