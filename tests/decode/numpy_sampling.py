"""How a row's logits are processed, once more: NumPy over one row, from the definitions, by sorting."""

import numpy as np

from internjax.decode.sample import SamplingParams


def adjusted(logits_V, params: SamplingParams, *, prompt=(), answer=(), stop_ids=()) -> np.ndarray:
    """Returns the logits after penalties, biases and bans."""
    logits_V = np.asarray(logits_V, np.float64).copy()
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        logits_V[token] = logits_V[token] / factor if logits_V[token] > 0 else logits_V[token] * factor
    for token in set(answer):
        logits_V[token] -= params.presence_penalty + answer.count(token) * params.frequency_penalty
    for token, bias in params.logit_bias:
        logits_V[token] += bias
    row = [*prompt, *answer]
    for word in params.bad_words:
        begins = list(word[:-1])
        if row[len(row) - len(begins) :] == begins:
            logits_V[word[-1]] = -np.inf
    if len(answer) < params.min_new_tokens:
        logits_V[list(stop_ids)] = -np.inf
    return logits_V


def kept(logits_V, params: SamplingParams) -> set[int]:
    """Returns the tokens that can be drawn; logits without ties, already divided by the temperature."""
    order = list(np.argsort(-np.asarray(logits_V, np.float64), kind="stable"))
    order = order[: params.top_k or None]
    order = order[: _reaching(logits_V, order, params.top_p)]
    order = [token for token in order if np.exp(logits_V[token] - np.max(logits_V)) >= params.min_p]
    probs = _softmax(logits_V, order)
    surprise = np.abs(-np.log(probs) + (probs * np.log(probs)).sum())
    order = [order[i] for i in np.argsort(surprise, kind="stable")]
    return set(map(int, order[: _reaching(logits_V, order, params.typical_p)]))


def _softmax(logits_V, tokens) -> np.ndarray:
    weights = np.exp(np.asarray(logits_V, np.float64)[tokens] - np.max(logits_V))
    return weights / weights.sum()


def _reaching(logits_V, order, share) -> int:
    """Returns how many tokens of `order` reach the share of all of them; all when the share is 1."""
    if share == 1:
        return len(order)
    return int(np.searchsorted(np.cumsum(_softmax(logits_V, order)), share)) + 1
