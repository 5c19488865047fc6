"""generate: text from an open model, for notebooks and scripts. Servers and evaluations drive internjax.decode."""

from collections.abc import Sequence

import jax
import numpy as np

from internjax import sharding
from internjax.decode import generate as decoding
from internjax.decode.request import ANY_NUMBER, Request, check_options
from internjax.decode.sample import SamplingParams, stack
from internjax.hf.open import Model
from internjax.model import rope
from internjax.text.chat import render
from internjax.text.message import Message


def generate(
    model: Model,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
) -> str:
    """Returns what the model writes behind a text, or its answer to a conversation, up to a stop token.

    sampling: by default what the model's generation config says (greedy where it says nothing). max_new_tokens: by
    default that config's, else 256. Compiles once per power of two of the prompt's length, max_new_tokens and set of
    settings in use. Raises ValueError for settings that cannot be kept.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; put its tokenizer.json beside the weights and open it again")
    if isinstance(prompt, str):
        first = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
        ids = first + model.tokenizer.encode(prompt)
    else:
        ids = render(list(prompt), model.tokenizer, add_generation_prompt=True).ids
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer has no first token; give a text to continue")
    count = max_new_tokens or model.generation.max_new_tokens or 256
    settings = default_sampling(model) if sampling is None else sampling
    request = Request(tuple(ids), count, settings, stop_ids=tuple(model.generation.eos_ids))
    check_options(request, ANY_NUMBER, vocab_size=model.config.vocab_size)
    width = max(32, 1 << (len(ids) - 1).bit_length())
    prompts_BT = np.zeros((1, width), np.int32)
    prompts_BT[0, : len(ids)] = ids
    with sharding.use(sharding.mesh_of(model.params)):
        generation = decoding.generate(
            model.params,
            prompts_BT,
            np.array([len(ids)], np.int32),
            config=model.config,
            sampling=stack([settings]),
            max_new_tokens=count,
            stop_ids=model.generation.eos_ids,
            lora=model.lora,
            inv_freq_BF=rope.inv_freq(model.config, length=len(ids) + count)[None],
        )
    tokens_BN, lengths_B = jax.device_get((generation.tokens_BN, generation.lengths_B))
    return model.tokenizer.decode(tokens_BN[0, : lengths_B[0]].tolist())


def default_sampling(model: Model) -> SamplingParams:
    """Returns how the model's folder wants it to be sampled; temperature 0 (greedy) where it does not say do_sample."""
    wanted = model.generation
    if not wanted.do_sample:
        return SamplingParams(temperature=0.0, repetition_penalty=wanted.repetition_penalty)
    return SamplingParams(
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
    )
