"""What an evaluation asks of a model: two functions, `loglikelihood` and `generate`; `local` makes them of a Model.

    model = local(open_model("runs/tiny/pretrain"), max_length=256)
    model.loglikelihood([("from", " math import gcd")])       # [Score(logprob=-9.1, num_tokens=4, ...)]
    model.generate(["import"], max_new_tokens=8, stop=("\\n",))  # [Completion(text=" os", ...)]

Scores do not depend on what else is asked: a row's padded length is a function of the row alone and every batch has the
same number of rows (the last one is filled with repetitions). So few programs are compiled, too.

B batch, T time, D embed, C chunk of T, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from internjax import sharding
from internjax.decode.generate import ERROR, LENGTH
from internjax.decode.generate import generate as decode
from internjax.decode.sample import make_sampling
from internjax.model import decoder, rope
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora
from internjax.text import chat
from internjax.text.tokenizer import Tokenizer

SHORTEST = 32
"""Tokens that a shorter row is padded to, unless `local` is told otherwise."""
SCORE_CHUNK = 256


class Score(NamedTuple):
    """Natural-log probability of a continuation after its context."""

    logprob: float
    num_tokens: int
    is_greedy: bool
    """Every token of the continuation was the model's most likely one."""
    is_cut: bool = False
    """The context did not fit and lost its beginning."""


class Completion(NamedTuple):
    """A greedy continuation of a prompt, up to the stop string or stop token, neither included."""

    text: str
    is_capped: bool = False
    """It ended at the token limit."""
    is_cut: bool = False
    """The prompt did not fit and lost its beginning."""


class Generate(Protocol):
    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Completion]: ...


class EvalModel(NamedTuple):
    """All that a task may ask, of a local or a remote model.

    `loglikelihood` maps (context, continuation) pairs to scores. A continuation longer than the model's length is
    scored in rolling windows, so `("", text)` is the log-probability of a whole document.
    """

    loglikelihood: Callable[[Sequence[tuple[str, str]]], list[Score]]
    generate: Generate


class Ids(NamedTuple):
    context: list[int]
    continuation: list[int]
    stop: tuple[int, ...]


def as_text(context: str, continuation: str, tokenizer: Tokenizer) -> Ids:
    """Returns ids for a base model: the first token of texts, then context and continuation encoded as one text.

    A token that spans the join belongs to the continuation; so does white space at the end of the context, which most
    vocabularies join with the word after it.
    """
    context_chars = len(context.rstrip()) if continuation else len(context)
    encoded = tokenizer.encode_with_offsets(context + continuation)
    join = next((n for n, (_, end) in enumerate(encoded.offsets) if end > context_chars), len(encoded.ids))
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return Ids([first, *encoded.ids[:join]], list(encoded.ids[join:]), (tokenizer.eos_id,))


def as_chat(context: str, continuation: str, tokenizer: Tokenizer) -> Ids:
    """Returns ids for a chat model: the context is the user's turn, the continuation begins the assistant's."""
    prompt = chat.render([chat.Message("user", context)], tokenizer, add_generation_prompt=True).ids
    answer = tokenizer.encode(continuation.lstrip()) if continuation else []
    return Ids(list(prompt), answer, chat.stop_ids(tokenizer))


class Window(NamedTuple):
    """One row to score: its ids, and how many of the last ones count."""

    ids: list[int]
    num_scored: int


def windows(context: Sequence[int], continuation: Sequence[int], max_length: int) -> list[Window]:
    """Returns rows of at most `max_length` model inputs in which every id of the continuation is scored once.

    One row, the context cut on its left if need be, where the continuation fits; else rolling windows that overlap by
    half, so that every id but those of the first window has at least half a window before it.
    """
    assert context, "a context holds at least the first token of texts"
    ids, num = [*context, *continuation], len(continuation)
    if num <= max_length:
        return [Window(ids[-(max_length + 1) :], num)] if num else []
    start = max(0, len(context) - max_length)  # the first window scores at least one id
    end = start + max_length + 1
    rows = [Window(ids[start:end], end - len(context))]
    while end < len(ids):
        last, end = end, min(len(ids), end + max(1, max_length // 2))
        rows.append(Window(ids[end - max_length - 1 : end], end - last))
    return rows


def bucket(length: int, max_length: int, *, shortest: int = SHORTEST) -> int:
    """Returns the padded length of a row: the next power of two, at least `shortest` and at most `max_length`."""
    return min(1 << (max(length, shortest) - 1).bit_length(), max_length)


@partial(jax.jit, static_argnames=("config",))
def _score(params, tokens_BT, targets_BT, segments_BT, inv_freq_F, lora, *, config: ModelConfig):
    """Returns log p(target) `[B, T]` and whether the target is the most likely token; logits exist for C steps only."""
    hidden_BTD = decoder.forward(
        params, tokens_BT, config=config, segments_BT=segments_BT, inv_freq_BF=inv_freq_F[None], lora=lora
    ).hidden_BTD
    B, T, D = hidden_BTD.shape
    C = min(T, SCORE_CHUNK)
    padding = -T % C

    def chunk(inputs):
        hidden_BCD, targets_BC = inputs
        logits_BCV = decoder.unembed(params, hidden_BCD, config=config, lora=lora)
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1), chosen_BC >= logits_BCV.max(axis=-1)

    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0))).reshape(B, -1, C, D).swapaxes(0, 1)
    targets = jnp.pad(targets_BT, ((0, 0), (0, padding))).reshape(B, -1, C).swapaxes(0, 1)
    logprobs, greedy = jax.lax.map(chunk, (hidden, targets))
    return tuple(x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in (logprobs, greedy))


class LocalModel(Protocol):
    """What `local` wants to see; `internjax.hf.open.Model` is one."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    lora: Lora | None


class _Setting(NamedTuple):
    """How a local model is asked."""

    batch_size: int
    shortest: int
    max_length: int
    encode: Callable[[str, str, Tokenizer], Ids]
    inv_freq_F: jax.Array
    mesh: jax.sharding.Mesh


def local(
    model: LocalModel,
    *,
    batch_size: int = 16,
    shortest: int = SHORTEST,
    max_length: int | None = None,
    encode: Callable[[str, str, Tokenizer], Ids] = as_text,
) -> EvalModel:
    """Returns the two functions over an opened model, on the mesh that its parameters live on.

    `encode` is `as_text` for base models, `as_chat` for chat models. `max_length` is the longest input in tokens, the
    model's own if None; longer prompts lose their beginning, which the results count. Rows are padded to a power of two
    of at least `shortest` tokens: the more, the fewer programs are compiled and the more padding is computed.
    """
    limit = model.config.max_position_embeddings if max_length is None else max_length
    if limit < 2 or batch_size < 1 or shortest < 1:
        raise ValueError(
            f"given max_length={limit}, batch_size={batch_size}, shortest={shortest}; wanted at least 2, 1 and 1"
        )
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; put its tokenizer.json beside the weights and open it again")
    # The declared length of every row is the limit, so that dynamic NTK frequencies do not depend on the bucket.
    inv_freq_F = rope.inv_freq(model.config, length=limit)
    setting = _Setting(batch_size, shortest, limit, encode, inv_freq_F, sharding.mesh_of(model.params))
    return EvalModel(partial(_loglikelihood, model, setting), partial(_generate, model, setting))


def _loglikelihood(model: LocalModel, setting: _Setting, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    limit, scores, rows, owners = setting.max_length, [], [], []
    for index, (context, continuation) in enumerate(pairs):
        ids = setting.encode(context, continuation, model.tokenizer)
        num, num_context = len(ids.continuation), len(ids.context)
        if num == 0:
            raise ValueError(f"pair {index}: given an empty continuation; wanted at least one token to score")
        scores.append(Score(0.0, num, True, num_context > limit or num <= limit < num_context + num - 1))
        new = windows(ids.context, ids.continuation, limit)
        rows += new
        owners += [index] * len(new)
    for owner, (logprob, is_greedy) in zip(owners, _score_rows(model, setting, rows)):
        old = scores[owner]
        scores[owner] = old._replace(logprob=old.logprob + logprob, is_greedy=old.is_greedy and is_greedy)
    return scores


def _score_rows(model: LocalModel, setting: _Setting, rows: Sequence[Window]) -> list[tuple[float, bool]]:
    """Returns for each row the summed log-probability of the ids that count, and whether all are the most likely."""
    found = [(0.0, False)] * len(rows)
    for T, indices in _batches([len(row.ids) - 1 for row in rows], setting.max_length, setting):
        tokens_BT, targets_BT, segments_BT = np.zeros((3, setting.batch_size, T), np.int32)
        for b in range(setting.batch_size):
            ids = rows[indices[b % len(indices)]].ids
            tokens_BT[b, : len(ids) - 1], targets_BT[b, : len(ids) - 1] = ids[:-1], ids[1:]
            segments_BT[b, : len(ids) - 1] = 1
        arrays = (tokens_BT, targets_BT, segments_BT, setting.inv_freq_F)
        with sharding.use(setting.mesh):
            scored = _score(model.params, *arrays, model.lora, config=model.config)
        logprobs_BT, greedy_BT = jax.device_get(scored)
        for b, index in enumerate(indices):
            end = len(rows[index].ids) - 1
            part = slice(end - rows[index].num_scored, end)
            found[index] = float(logprobs_BT[b, part].sum(dtype=np.float64)), bool(greedy_BT[b, part].all())
    return found


def _generate(
    model: LocalModel, setting: _Setting, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = ()
) -> list[Completion]:
    room, tokenizer = setting.max_length - max_new_tokens, model.tokenizer
    if room < 1:
        raise ValueError(f"given max_new_tokens={max_new_tokens}; wanted less than max_length={setting.max_length}")
    encoded = [setting.encode(prompt, "", tokenizer) for prompt in prompts]
    # A token that holds a stop string ends its row, so that rows do not run on to the limit.
    pieces = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size) if stop)
    stopping = {i for i, piece in pieces if any(s in piece for s in stop)}
    stop_ids = sorted(stopping | set(encoded[0].stop)) if encoded else []
    # Filled up with the last: tasks that stop at other strings share their programs.
    stop_ids += stop_ids[-1:] * (bucket(len(stop_ids), tokenizer.vocab_size, shortest=256) - len(stop_ids))
    found = [Completion("")] * len(prompts)
    for T, indices in _batches([len(ids.context) for ids in encoded], room, setting):
        prompts_BT, lengths_B = np.zeros((setting.batch_size, T), np.int32), np.zeros(setting.batch_size, np.int32)
        for b in range(setting.batch_size):
            ids = encoded[indices[b % len(indices)]].context[-room:]
            prompts_BT[b, : len(ids)], lengths_B[b] = ids, len(ids)
        with sharding.use(setting.mesh):
            generation = decode(
                model.params,
                prompts_BT,
                lengths_B,
                config=model.config,
                sampling=make_sampling(setting.batch_size, temperature=0.0),
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                lora=model.lora,
                inv_freq_BF=setting.inv_freq_F[None],
            )
        generation = jax.device_get(generation)
        for b, index in enumerate(indices):
            if generation.finish_B[b] == ERROR:
                raise ValueError(f"prompt {index}: the model's logits are not finite; check its weights and dtype")
            text = tokenizer.decode(generation.tokens_BN[b, : generation.lengths_B[b]].tolist())
            kept = until(text, stop)
            is_capped = generation.finish_B[b] == LENGTH and len(kept) == len(text)
            found[index] = Completion(kept, bool(is_capped), len(encoded[index].context) > room)
    return found


def until(text: str, stop: Sequence[str]) -> str:
    """Returns `text` up to the first occurrence of any stop string."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _batches(lengths: Sequence[int], limit: int, setting: _Setting) -> Iterable[tuple[int, list[int]]]:
    """Yields (padded length, indices of one batch's rows), rows of one bucket together, in their order."""
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        padded = bucket(min(length, limit), limit, shortest=setting.shortest)
        buckets.setdefault(padded, []).append(index)
    for padded, indices in sorted(buckets.items()):
        for start in range(0, len(indices), setting.batch_size):
            yield padded, indices[start : start + setting.batch_size]
