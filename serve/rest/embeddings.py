"""/v1/embeddings: the mean of the model's final hidden states over a text, of length 1.

A program is compiled for each width of rows (powers of two) when it is first needed, and stays. The pipeline leaves the
memory of the widest free (`Pipeline.longest_embedding`). A request whose client leaves ends behind the batch that is
read then.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import jax
import numpy as np
from fastapi import FastAPI, Request
from pydantic import Field

from internjax import sharding
from internjax.decode.embed import mean_embeddings, row_widths
from internjax.hf.open import Model
from serve.operation.refusal import Refusal
from serve.operation.request_log import note
from serve.pipeline import ContextTooLong, Pipeline
from serve.rest.batches import Batch, Workers, batches_of, in_order, padded, read_each
from serve.rest.requests import Fields, Prompts, ShortText

MAX_INPUTS = 2048  # of one request, as OpenAI has it


class EmbeddingRequest(Fields):
    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: ShortText | None = None


class Embedder:
    """Vectors of token ids by one model. Safe for several threads, one of which computes at a time."""

    def __init__(self, model: Model, *, longest: int):
        self.num_dimensions, self.longest = model.config.d_model, longest
        self._model, self._mesh = model, sharding.mesh_of(model.params)
        self._widths = row_widths(model.config, longest)
        self._compute = jax.jit(partial(mean_embeddings, config=model.config))
        self._lock = threading.Lock()

    @property
    def num_compiled(self) -> int:
        return self._compute._cache_size()

    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns float32 `[len(texts), D]`, read batch by batch."""
        batches = self.batches(texts)
        return in_order(batches, [read() for read in read_each(texts, batches, self.read)])

    def batches(self, texts: Sequence[Sequence[int]]) -> list[Batch]:
        """Which texts are read at once."""
        return batches_of([*map(len, texts)], self._widths)

    def read(self, texts: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Returns float32 `[len(texts), D]` of a batch. The token before every text counts only where it is alone."""
        tokens, lengths = padded(texts, width)
        starts = (lengths > 1) & (tokens[:, 0] == self._model.tokenizer.bos_id)
        with self._lock, sharding.use(self._mesh):
            vectors = self._compute(self._model.params, tokens, starts.astype(np.int32), lengths, lora=self._model.lora)
            return np.asarray(vectors)[: len(texts)]


def add_embedding_route(
    app: FastAPI, pipeline: Pipeline, *, adapter_of: Callable[[str], str | None]
) -> Embedder | None:
    """Adds the route; returns what makes its vectors, if this server gives any.

    adapter_of: raises Refusal for a model that is not served.
    """

    model = pipeline.model
    longest = min(pipeline.max_context, pipeline.longest_embedding)
    embedder = Embedder(model, longest=longest) if model is not None and longest else None
    workers = Workers("embeddings")

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        if adapter_of(body.model) is not None:
            raise Refusal("vectors are of the model without adapters; give its own name", param="model")
        if embedder is None:
            without = "is over an engine and has no model to embed with" if model is None else "was started without"
            raise Refusal(f"this server gives no vectors: it {without}", param="model")
        if body.dimensions not in (None, embedder.num_dimensions):
            raise Refusal(
                f"dimensions is {body.dimensions}; vectors have {embedder.num_dimensions}, and a part of one is no "
                "vector of this model",
                param="dimensions",
            )
        if len(body.input) > MAX_INPUTS:
            raise Refusal(f"{len(body.input)} inputs are more than {MAX_INPUTS}; send several requests", param="input")
        try:
            for text in body.input:  # all of them before the first is tokenised
                if isinstance(text, str):
                    pipeline.refuse_long([text])
            texts = await workers.map(pipeline.prompt_ids, body.input, request, size_of=len)
        except ContextTooLong as error:
            raise Refusal(str(error), param="input", code="context_length_exceeded") from error
        except ValueError as error:
            raise Refusal(str(error), param="input") from error
        longest = max(map(len, texts))
        if longest > embedder.longest:
            raise Refusal(
                f"an input has {longest} tokens, of up to {embedder.longest} there are vectors; cut it in parts",
                param="input",
                code="context_length_exceeded",
            )
        vectors = await workers.read(texts, embedder.batches(texts), embedder.read, request)
        num_tokens = sum(map(len, texts))
        note(user=body.user, n=len(texts), prompt=num_tokens, outcome="embedded")
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    return embedder


def _encoded(vector: np.ndarray, how: str | None) -> list[float] | str:
    if how == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
