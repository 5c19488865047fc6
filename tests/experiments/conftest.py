"""What stages are tried on: a small model, a tokenizer, a token folder and conversations, all made in a moment."""

import json

import pytest

from data_pipelines.conversations import Reading
from data_pipelines.tokens import text_documents, write_tokens
from experiments.finetuning import Finetune
from experiments.pretraining import Pretrain, TokenData
from internjax.model.config import ModelConfig
from internjax.text.tokenizer import save_tokenizer, train_tokenizer
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.optimizer import AdamW, Cosine

SMALL = ModelConfig(
    vocab_size=320,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=64,
    max_position_embeddings=256,
    rope_theta=10_000.0,
    initializer_range=0.1,
    dtype="float32",
)
TEXTS = [f"def add_{n}(x):\n    return x + {n}\n\n\nassert add_{n}(1) == {n + 1}\n" for n in range(80)]
QUESTIONS = [(f"What is {n} + 1?", f"{n} + 1 is {n + 1}.") for n in range(64)]


@pytest.fixture(scope="session", autouse=True)
def no_wandb():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with tokenizer/, tokens/ and chats.jsonl."""
    root = tmp_path_factory.mktemp("corpus")
    questions = [f"user assistant {asked} {answered}" for asked, answered in QUESTIONS]
    tokenizer = train_tokenizer(TEXTS + questions, vocab_size=SMALL.vocab_size)
    save_tokenizer(tokenizer, root / "tokenizer")
    documents = text_documents([(str(n), text) for n, text in enumerate(TEXTS)], tokenizer)
    write_tokens(root / "tokens", documents, tokenizer=tokenizer)
    write_chats(root / "chats.jsonl")
    return root


def write_chats(path, questions=QUESTIONS):
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        for asked, answered in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pretraining(corpus, run, **fields) -> Pretrain:
    values = dict(
        run=str(run),
        model=SMALL,
        data=TokenData((str(corpus / "tokens"),), tokenizer=str(corpus / "tokenizer"), batch_size=8, seq_len=32),
        num_steps=12,
        optimizer=AdamW(peak_lr=1e-2, weight_decay=0.0),
        schedule=Cosine(warmup_steps=2),
        checkpoint=CheckpointConfig(every=5),
        preflight=False,
    )
    return Pretrain(**values | fields)


def finetuning(corpus, source, run, **fields) -> Finetune:
    values = dict(
        run=str(run),
        model=str(source),
        data=(str(corpus / "chats.jsonl"),),
        seq_len=64,
        batch_size=8,
        num_steps=12,
        optimizer=AdamW(peak_lr=1e-2, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=8),
        preflight=False,
        reading=Reading(cache=str(run.parent / ".tokens")),
    )
    return Finetune(**values | fields)
