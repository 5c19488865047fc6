"""The conditional reward model of COOL RLHF: a decoder with a scalar head, trained on preference pairs.

InternLM2 technical report (arXiv:2403.17297), section 4.2.1: one model serves all preferences; a conditional system
prompt in front of its input says which one counts. The score stands at a reward token at the end of the sequence.

B batch, T time, D embed.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from internjax.model import decoder, rope
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora, LoraConfig, apply_config
from internjax.rlhf.pairs import Conditions, PreferenceBatch, with_condition
from internjax.rlhf.rows import Rows, segments
from internjax.train.losses import Loss, LossOutput


@dataclasses.dataclass(frozen=True)
class RankingConfig:
    """The numbers of the ranking loss; the defaults are the report's, but for the limit."""

    focal_gamma: float = 2.0
    """Exponent of the factor that fades out pairs which are ranked well already; 0 is the plain Bradley-Terry loss."""
    barrier_coefficient: float = 0.02
    """Weight of the penalty that keeps scores inside the bound."""
    barrier_bound: float = 5.0
    """Scores are kept in (-bound, bound)."""
    barrier_limit: float = 4.9
    """Beyond it the barrier goes on as its tangent. The report's is infinite at the bound and undefined outside."""

    def __post_init__(self):
        if self.focal_gamma < 0 or self.barrier_coefficient < 0:
            raise ValueError(
                f"focal_gamma and barrier_coefficient must not be negative; given {self.focal_gamma} and "
                f"{self.barrier_coefficient}"
            )
        if not 0 < self.barrier_limit < self.barrier_bound:
            raise ValueError(
                f"barrier_limit must lie between 0 and barrier_bound {self.barrier_bound}; given {self.barrier_limit}"
            )


def focal_ranking_loss(margin: jax.Array, *, gamma: float) -> jax.Array:
    """Returns L = -(1 - 2 max(0, P - 1/2))^gamma log P of score margins r_chosen - r_rejected, elementwise, float32.

    P = sigmoid(margin). arXiv:2403.17297, section 4.2.1. The factor equals min(1, 2 sigmoid(-margin)) and is
    differentiated like the rest.
    """
    margin = margin.astype(jnp.float32)
    # In logarithms, so that a wide margin underflows to 0 and not to 0 * inf in the gradient.
    log_factor = jnp.minimum(0.0, jnp.log(2.0) + jax.nn.log_sigmoid(-margin))
    return -jnp.exp(gamma * log_factor) * jax.nn.log_sigmoid(margin)


def log_barrier(scores: jax.Array, *, bound: float, limit: float) -> jax.Array:
    """Returns b(x) = -(log(x + bound) + log(bound - x)) for |x| <= limit, and its tangent beyond, elementwise, float32.

    arXiv:2403.17297, section 4.2.1 gives the inside. Outside, b(limit) + b'(limit) (|x| - limit) with
    b'(x) = 2 x / (bound^2 - x^2): continuous with its slope, so a score that has escaped is pulled back. (Clamping
    scores instead leaves it outside with no gradient at all.)
    """
    size = jnp.abs(scores.astype(jnp.float32))
    inside = jnp.minimum(size, limit)
    slope = 2.0 * limit / (bound**2 - limit**2)
    return -(jnp.log(inside + bound) + jnp.log(bound - inside)) + slope * jnp.maximum(size - limit, 0.0)


def from_lm(params: dict, config: ModelConfig, rng: jax.Array | None = None) -> tuple[dict, ModelConfig]:
    """Returns (params, config) of a model with a scalar head on the body of a language model (or of a scalar model).

    The head is a linear map to one number without bias, normal with the config's initializer_range, or zero without
    `rng`: every score is 0 then. The body's arrays are shared, not copied.
    """
    config = dataclasses.replace(config, head="scalar", tie_embeddings=False, norm_head=False)
    shape, dtype = (config.d_model, 1), jnp.dtype(config.param_dtype)
    if rng is None:
        kernel = jnp.zeros(shape, dtype)
    else:
        kernel = (config.initializer_range * jax.random.normal(rng, shape)).astype(dtype)
    return params | {"head": {"kernel": kernel}}, config


def check_scalar(config: ModelConfig) -> None:
    """Raises ValueError unless the model has a scalar head."""
    if config.head != "scalar":
        raise ValueError(f"a model with head='scalar' is wanted, given head={config.head!r}; reward.from_lm makes one")


def score(
    params: dict, tokens_BT: jax.Array, lengths_B: jax.Array, *, config: ModelConfig, lora: Lora | None = None
) -> jax.Array:
    """Returns the float32 score `[B]` at each row's last real token, which should be the reward token."""
    check_scalar(config)
    T = tokens_BT.shape[1]
    hidden_BTD = decoder.forward(
        params,
        tokens_BT,
        config=config,
        segments_BT=segments(lengths_B, T),
        inv_freq_BF=rope.inv_freq(config, length=T)[None],
        lora=lora,
    ).hidden_BTD
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
    return decoder.unembed(params, hidden_B1D, config=config, lora=lora)[:, 0, 0]


@functools.partial(jax.jit, static_argnames=("config", "reward_token_id"))
def score_responses(
    params: dict,
    conditions: Conditions,
    condition_B: jax.Array,
    rows: Rows,
    *,
    config: ModelConfig,
    reward_token_id: int,
    lora: Lora | None = None,
) -> jax.Array:
    """Returns the score `[B]` of rows (prompt ++ response), each read under its own condition."""
    full = with_condition(conditions, condition_B, rows, reward_token_id=reward_token_id)
    return score(params, full.tokens_BT, full.lengths_B, config=config, lora=lora)


def score_pairs(
    params: dict, batch: PreferenceBatch, *, config: ModelConfig, lora: Lora | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores (chosen `[B]`, rejected `[B]`) of a preference batch, from one forward pass of 2 B rows."""
    # Interleaved, so that the rows of a batch that is split over devices stay on theirs.
    tokens = jnp.stack([batch.chosen, batch.rejected], axis=1)
    lengths = jnp.stack([batch.chosen_lengths, batch.rejected_lengths], axis=1)
    scores = score(params, tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1), config=config, lora=lora)
    scores = scores.reshape(lengths.shape)
    return scores[:, 0], scores[:, 1]


def ranking(
    model_config: ModelConfig,
    config: RankingConfig = RankingConfig(),
    *,
    lora_config: LoraConfig | None = None,
) -> Loss:
    """Returns the loss of ranking a `PreferenceBatch`: L = L_rank + coefficient * L_pen, a mean over pairs.

    L_pen is the barrier's mean over the two scores of a pair. Metrics: `accuracy` (share of pairs ranked right; a tie
    is wrong), `margin`, `ranking` (L_rank alone), `score` (mean) and `escaped` (share of scores beyond the limit). With
    `lora_config` the adapters are trained and the parameters frozen; list "head" among its targets.
    """
    check_scalar(model_config)
    if lora_config is not None and "head" not in lora_config.targets:
        raise ValueError(
            f"adapters on {', '.join(lora_config.targets)} leave a reward model's new head untrained; "
            "add 'head' to the targets"
        )

    def loss(trainable, frozen, batch, rng) -> LossOutput:
        del rng
        params, lora = (trainable, None) if lora_config is None else (frozen, apply_config(trainable, lora_config))
        chosen_B, rejected_B = score_pairs(params, batch, config=model_config, lora=lora)
        margin_B = chosen_B - rejected_B
        rank_B = focal_ranking_loss(margin_B, gamma=config.focal_gamma)
        scores_B2 = jnp.stack([chosen_B, rejected_B], axis=-1)
        barrier_B2 = log_barrier(scores_B2, bound=config.barrier_bound, limit=config.barrier_limit)
        per_pair = {
            "total": rank_B + config.barrier_coefficient * barrier_B2.mean(axis=-1),
            "ranking": rank_B,
            "accuracy": (margin_B > 0).astype(jnp.float32),
            "margin": margin_B,
            "score": scores_B2.mean(axis=-1),
            "escaped": (jnp.abs(scores_B2) > config.barrier_limit).mean(axis=-1),
        }
        sums = {name: jnp.sum(value * batch.weight) for name, value in per_pair.items()}
        return LossOutput(sums.pop("total"), jnp.sum(batch.weight), sums)

    return loss


# One compiled program per shape; callers round lengths up so that there are few shapes.
_jit_score = jax.jit(score, static_argnames=("config",))


def get_scores(
    params: dict,
    sequences: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    reward_token_id: int,
    lora: Lora | None = None,
    batch_size: int = 16,
    width: int | None = None,
) -> np.ndarray:
    """Returns one score per sequence of token ids, float32 `[len(sequences)]`.

    A sequence is a rendered chat without generation prompt; a condition, if any, is its first system turn. The reward
    token is appended where it is missing. Rows are padded to `width` (None: a multiple of 64), batches to `batch_size`.
    """
    if not sequences:
        return np.zeros(0, np.float32)
    rows = [
        list(ids) + ([] if ids and ids[-1] == reward_token_id else [reward_token_id]) for ids in map(list, sequences)
    ]
    longest = max(map(len, rows))
    width, count = width or -(-longest // 64) * 64, -(-len(rows) // batch_size) * batch_size
    if longest > width:
        raise ValueError(f"a sequence has {longest} tokens with its reward token, rows are {width} wide; widen them")
    tokens, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)], lengths[index] = ids, len(ids)
    parts = [
        np.asarray(
            _jit_score(params, tokens[i : i + batch_size], lengths[i : i + batch_size], config=config, lora=lora)
        )
        for i in range(0, count, batch_size)
    ]
    return np.concatenate(parts)[: len(rows)]


def get_score(
    params: dict, sequence: Sequence[int], *, config: ModelConfig, reward_token_id: int, lora: Lora | None = None
) -> float:
    """Returns the score of one sequence of token ids; see `get_scores`."""
    scores = get_scores(params, [sequence], config=config, reward_token_id=reward_token_id, lora=lora, batch_size=1)
    return float(scores[0])


def compare(
    params: dict,
    first: Sequence[int],
    second: Sequence[int],
    *,
    config: ModelConfig,
    reward_token_id: int,
    lora: Lora | None = None,
) -> bool:
    """Returns whether the first sequence scores higher than the second."""
    scores = get_scores(
        params, [first, second], config=config, reward_token_id=reward_token_id, lora=lora, batch_size=2
    )
    return bool(scores[0] > scores[1])


def rank(
    params: dict,
    sequences: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    reward_token_id: int,
    lora: Lora | None = None,
) -> list[int]:
    """Returns the rank of every sequence, 0 for the highest score; equal scores keep their order."""
    scores = get_scores(params, sequences, config=config, reward_token_id=reward_token_id, lora=lora)
    ranks = np.empty(len(scores), int)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks.tolist()
