"""The first half of the tiny chain: from documents to a model that was pre-trained and fine-tuned."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import ahead, embedded, formats, sources, tokens, wanjuan
from data_pipelines.conversations import Reading
from data_pipelines.document import Document, fingerprint, make_document, split_by_file
from data_pipelines.embedded import Fact
from data_pipelines.ledger import Ledger, save, summary
from data_pipelines.loading import open_rows
from eval.tasks.library import problems
from experiments import finetuning, library, pretraining
from experiments.tiny_config import Skip, Tiny
from internjax.text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.optimizer import Cosine
from internjax.train.tracking import TrackingConfig

NUM_PROBLEMS, NUM_BODIES, NUM_DESCRIPTIONS = 800, 800, 400
"""Conversations to learn from, of each kind."""
NUM_HELD_OUT_PROBLEMS = 100
PIECE_CHARS = 4000


def data(config: Tiny, root: Path) -> dict[str, Any]:
    """Documents -> rules -> exact and near duplicates -> ordered code -> ledger -> train and held-out files."""
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    bad: list[str] = []
    on_bad_row = bad.append if config.bad_rows == "skip" else None
    with ahead.compiling("mixed"):
        documents = embedded.stdlib_corpus() if config.data is None else _own_documents(config.data, on_bad_row)
        for message in bad[:5]:
            print(f"left out: {message}")
        ledger = Ledger()
        kept = wanjuan.run_chain(documents, wanjuan.CHAINS["mixed"](), ledger)
    save(ledger, folder)
    split = split_by_file(kept, fraction=config.held_out)
    if not split.train or not split.held_out:
        raise ValueError(
            f"{len(kept)} documents are left of {len(documents)}, {len(split.held_out)} of them held out; both parts "
            "need at least one. Give more files or documents, or another --held-out share"
        )
    _write_documents(folder / "train.jsonl", split.train)
    _write_documents(folder / "held_out.jsonl", split.held_out)
    facts = embedded.library_facts(kept)
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact._asdict()) + "\n" for fact in facts))
    print(f"{len(documents)} documents, {len(kept)} kept, {len(split.held_out)} of them held out, {len(facts)} facts")
    return {
        "source": config.data or "the standard library of this Python",
        "fingerprint": fingerprint(documents),
        "num_documents": len(documents),
        "num_kept": len(kept),
        "num_bad_rows": len(bad),
        "num_train": len(split.train),
        "num_held_out": len(split.held_out),
        "train_bytes": sum(len(d.text.encode()) for d in split.train),
        "held_out_bytes": sum(len(d.text.encode()) for d in split.held_out),
        "num_facts": len(facts),
        "ledger": summary(ledger),
        "by_source": sources.by_source(kept),
    }


def _own_documents(path: str, on_bad_row: Callable[[str], None] | None) -> list[Document]:
    """Documents of the user's file; conversations count as the text of their turns."""
    if not _is_chat_file(path):
        return [piece for document in sources.read([path], on_bad_row=on_bad_row) for piece in _pieces(document)]
    found = []
    for sample in formats.conversations(path, on_bad_row=on_bad_row):
        text = "\n".join(message.content for message in sample.messages if message.content)
        found.append(make_document(text, source=Path(path).stem, path=sample.place))
    if not found:
        raise ValueError(f"{path} holds no conversation that can be read; run without --bad-rows skip to see why")
    return found


def _pieces(document: Document) -> list[Document]:
    """Returns a long text (one big file) as several documents cut at empty lines, so that some can be held out."""
    if document.domain == "code" or len(document.text) <= 2 * PIECE_CHARS:
        return [document]
    pieces, size = [[]], 0
    for paragraph in document.text.split("\n\n"):
        if size > PIECE_CHARS:
            pieces.append([])
            size = 0
        pieces[-1].append(paragraph)
        size += len(paragraph)
    return [
        make_document("\n\n".join(parts), source=document.source, path=f"{document.path}#{number}")
        for number, parts in enumerate(pieces)
    ]


def _is_chat_file(path: str) -> bool:
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        return False
    return formats.detect_file(path) not in ("text", "preference")


def _write_documents(path: Path, documents: Iterable[Document]) -> None:
    path.write_text("".join(json.dumps({"id": d.id, "path": d.path, "text": d.text}) + "\n" for d in documents))


def texts(root: Path, part: str) -> list[tuple[str, str]]:
    """Returns (id, text) of the documents of "train" or "held_out"."""
    rows = map(json.loads, (root / "data" / f"{part}.jsonl").read_text().splitlines())
    return [(row["id"], row["text"]) for row in rows]


def facts(root: Path, config: Tiny, *, held_out: bool) -> list[Fact]:
    """Returns the library's facts from held-out files, or from the others."""
    from data_pipelines.document import in_held_out

    rows = [Fact(**json.loads(line)) for line in (root / "data" / "facts.jsonl").read_text().splitlines()]
    return [fact for fact in rows if in_held_out(fact.path, fraction=config.held_out) == held_out]


def tokenizer(config: Tiny, root: Path) -> dict[str, Any]:
    """Trains the tokenizer on the training documents and writes both token folders."""
    folder = root / "tokenizer"
    train = texts(root, "train")
    trained = train_tokenizer((text for _, text in train), vocab_size=config.model.vocab_size)
    save_tokenizer(trained, folder / "hf")
    trained = load_tokenizer(folder / "hf")
    counts = {}
    for part, rows in (("train", train), ("held_out", texts(root, "held_out"))):
        manifest = tokens.write_tokens(folder / part, tokens.text_documents(rows, trained), tokenizer=trained)
        counts[part] = manifest["num_tokens"]
    num_bytes = sum(len(text.encode()) for _, text in train)
    print(f"{counts['train']:,} training tokens, {num_bytes / counts['train']:.2f} bytes each")
    return {
        "vocab_size": trained.vocab_size,
        "sha256": trained.fingerprint,
        "train_tokens": counts["train"],
        "held_out_tokens": counts["held_out"],
        "bytes_per_token": num_bytes / counts["train"],
    }


def pretrain_config(config: Tiny, root: Path) -> pretraining.Pretrain:
    """Returns the pre-training of the chain."""
    return pretraining.Pretrain(
        run=str(root / "pretrain"),
        model=config.model,
        data=pretraining.TokenData(
            folder=(str(root / "tokenizer" / "train"),),
            tokenizer=str(root / "tokenizer" / "hf"),
            batch_size=config.batch_size,
            seq_len=config.seq_len,
        ),
        num_steps=config.pretrain_steps,
        optimizer=config.pretrain,
        schedule=config.schedule,
        checkpoint=CheckpointConfig(every=max(200, config.pretrain_steps // 4), max_to_keep=1),
        tracking=TrackingConfig(log_every=10),
        seed=config.seed,
    )


def pretrain(config: Tiny, root: Path) -> dict[str, Any]:
    """Pre-trains from scratch on packed rows."""
    return dict(pretraining.pretrain(pretrain_config(config, root)).summary)


def seen_tokens(config: Tiny, root: Path) -> list[np.ndarray]:
    """Returns the token sequences that pre-training was given, piece by piece: what the n-gram baselines may count."""
    settings = pretrain_config(config, root)
    rows = open_rows(settings.data.folder[0], seq_len=config.seq_len, packing="concat", seed=config.seed)
    pieces, left, epoch = [], config.pretrain_steps * config.batch_size, 0
    while left > 0:
        plan = rows.plan(epoch)
        num_rows = min(left, plan.num_rows)
        for piece in range(int(plan.first_R[num_rows])):
            start, length = int(plan.start_P[piece]), int(plan.length_P[piece])
            pieces.append(np.asarray(rows.folder.document(int(plan.document_P[piece]))[start : start + length + 1]))
        left, epoch = left - num_rows, epoch + 1
    return pieces


def sft(config: Tiny, root: Path) -> dict[str, Any]:
    """Fine-tunes the pre-trained model with adapters on conversations about the library, or on the user's own."""
    if config.data is not None and not _is_chat_file(config.data):
        raise Skip(f"{config.data} holds text, not conversations; a chat file (OpenAI, Alpaca, ...) feeds this stage")
    files = (config.data,) if config.data is not None else (str(_write_chats(config, root)),)
    trained = finetuning.finetune(
        finetuning.Finetune(
            run=str(root / "sft"),
            model=str(root / "pretrain"),
            data=files,
            # Bad rows were named and counted by the first stage.
            reading=Reading(bad_rows="skip", cache=str(root / ".tokens")),
            seq_len=config.seq_len,
            batch_size=config.sft_batch_size,
            num_steps=config.sft_steps,
            lora=config.sft_lora,
            unroll_layers=config.model.unroll_layers,
            optimizer=config.sft,
            schedule=Cosine(warmup_steps=10),
            checkpoint=CheckpointConfig(every=config.sft_steps, max_to_keep=1),
            tracking=TrackingConfig(log_every=10, wandb="disabled"),
            seed=config.seed,
        )
    )
    return dict(trained.summary)


def train_problems(config: Tiny):
    """Returns the arithmetic problems to learn from, and those held out."""
    held_out = problems(num_items=NUM_HELD_OUT_PROBLEMS, seed=config.seed + 1)
    return problems(num_items=NUM_PROBLEMS, seed=config.seed, exclude=held_out), held_out


def _write_chats(config: Tiny, root: Path) -> Path:
    """Writes the conversations made of the library's training facts, as a file that `finetune` reads like any other."""
    known = facts(root, config, held_out=False)
    rng = random.Random(config.seed)
    bodies = library.body_tasks(known)
    rng.shuffle(bodies)
    rng.shuffle(known)
    chats = library.interpreter_chats(train_problems(config)[0])
    chats += library.body_chats(bodies[:NUM_BODIES])
    chats += library.description_chats(known[: NUM_DESCRIPTIONS // 2])
    path = root / "data" / "chats.jsonl"
    path.write_text("".join(json.dumps(formats.to_row(chat)) + "\n" for chat in chats))
    return path
