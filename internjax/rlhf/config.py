"""Settings of PPO. "Report" is the InternLM2 technical report, arXiv:2403.17297, section 4.2.3."""

import dataclasses
from typing import Literal

from internjax.train.optimizer import AdamW

# Learning rates: report. The rest of the optimizers is our choice: it does not state betas, epsilon or decay.
ACTOR_OPTIMIZER = AdamW(peak_lr=1e-6, b2=0.95, eps=1e-5, weight_decay=0.0)
CRITIC_OPTIMIZER = AdamW(peak_lr=5e-6, b2=0.95, eps=1e-5, weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class KLInReward:
    """-coefficient * (log pi_old - log pi_ref) is part of every action's reward (k1, not differentiated).

    The optimum is pi_ref exp(R / coefficient), normalised.
    """

    coefficient: float = 0.01

    def __post_init__(self):
        _check_coefficient(self.coefficient)


@dataclasses.dataclass(frozen=True)
class KLInLoss:
    """coefficient * mean of an estimator of d = log pi - log pi_ref is part of the loss and differentiated.

    k2 = d^2 / 2 has the gradient of KL(pi || pi_ref) on fresh samples, and so the optimum of KLInReward. k3 =
    exp(-d) - 1 + d has the gradient of the forward KL(pi_ref || pi), which is another objective with another optimum.
    """

    coefficient: float = 0.01
    estimator: Literal["k2", "k3"] = "k2"

    def __post_init__(self):
        _check_coefficient(self.coefficient)
        if self.estimator == "k1":
            raise ValueError(
                "k1 in the loss does nothing: its gradient is E[grad log pi], which is zero, so the policy would drift "
                "from its reference unchecked. Use KLInReward (k1 in the reward) or KLInLoss(estimator='k2')."
            )
        if self.estimator not in ("k2", "k3"):
            raise ValueError(f"KL estimator in the loss must be k2 or k3, given {self.estimator!r}")


def _check_coefficient(coefficient: float) -> None:
    if coefficient < 0:
        raise ValueError(f"the KL coefficient must not be negative, given {coefficient}")


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """A response cut off at the longest length is unfinished: it gets no score, and the value of its last state
    stands for the rest."""


@dataclasses.dataclass(frozen=True)
class End:
    """Reaching the longest length ends the response: it gets its score (or this one) and nothing follows."""

    score: float | None = None
    """Score of every response that did not end by itself; None takes the reward's."""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """How responses are drawn, judged and learned from. "Report" marks arXiv:2403.17297; the rest it does not state."""

    kl: KLInReward | KLInLoss = KLInReward()
    """Pull towards the reference. Report: coefficient 0.01; where it sits is our choice."""
    gae_lambda: float = 0.99
    """Decay of the advantage estimate. Report."""
    discount: float = 1.0
    """Own choice: text is finite, and with 1 a token's return is the objective itself."""
    clip: float = 0.2
    """Probability ratios beyond 1 +- clip get no further push. Own choice (PPO's published default)."""
    top_p: float = 0.9
    """Nucleus of the draws. Report. Log-probabilities are those of the whole distribution, so with top_p < 1 the draws
    are slightly off-policy: a token's weight would be the mass of its nucleus, in [top_p, 1], and is left out."""
    temperature: float = 1.0
    """Divides the logits in draws and in all log-probabilities, the reference's included. Own choice."""
    max_new_tokens: int = 512
    """Longest response. Own choice."""
    num_epochs: int = 1
    """Passes over the responses of an iteration. Own choice: fresh samples are cheap against four models' memory."""
    minibatch_size: int = 64
    """Responses per update. Own choice."""
    accumulate: int = 1
    """Micro-batches per update; log-probabilities are taken in blocks of minibatch_size / accumulate rows as well."""
    pretrain_coefficient: float = 0.5
    """Weight of the next-token loss on pre-training text in the policy's loss (PTX). Report; with about half as much
    pre-training text as responses."""
    truncation: Bootstrap | End = Bootstrap()
    """What the length limit means. Own choice."""

    def __post_init__(self):
        ranges = {
            "gae_lambda": 0 <= self.gae_lambda <= 1,
            "discount": 0 < self.discount <= 1,
            "clip": 0 < self.clip < 1,
            "top_p": 0 < self.top_p <= 1,
            "temperature": self.temperature > 0,
            "max_new_tokens": self.max_new_tokens >= 1,
            "num_epochs": self.num_epochs >= 1,
            "minibatch_size": self.minibatch_size >= 1,
            "accumulate": self.accumulate >= 1 and self.minibatch_size % self.accumulate == 0,
            "pretrain_coefficient": self.pretrain_coefficient >= 0,
        }
        wrong = [f"{name}={getattr(self, name)}" for name, good in ranges.items() if not good]
        if wrong:
            raise ValueError(
                f"PPOConfig is out of range: {', '.join(wrong)}. gae_lambda is in [0, 1], discount and top_p in "
                "(0, 1], clip in (0, 1), temperature positive, counts at least 1, pretrain_coefficient not negative, "
                "and accumulate divides minibatch_size"
            )
