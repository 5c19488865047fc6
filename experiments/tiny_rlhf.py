"""The alignment part of the tiny chain: a conditional reward model, and two rounds of PPO against it.

Preferences are made by a program (`library.preference`), so the reward model can be checked; the gold that is reported
(`library.gold`) is another program that neither the reward model nor the policy is trained on.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.loading import batches, open_rows
from experiments import library, measure, tiny_models
from experiments.library import CONDITIONS, BodyTask, Completion, condition_of
from experiments.tiny_config import Skip, Tiny
from internjax.hf.open import Model, open_model
from internjax.hf.save import save_model
from internjax.rlhf import ppo as ppo_module
from internjax.rlhf.config import End, PPOConfig
from internjax.rlhf.pairs import Conditions, Pair, make_conditions, preference_batch, preference_batches
from internjax.rlhf.reward import from_lm, ranking, score_pairs
from internjax.rlhf.rollout import Prompts, Weights, model_reward
from internjax.text import chat
from internjax.text.chat import Message
from internjax.text.tokenizer import IM_END, REWARD, Tokenizer
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.loop import train
from internjax.train.optimizer import AdamW, Constant, Cosine, make_optimizer
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig, open_run, read_rows

MAX_PROMPT_TOKENS = 80
PAIR_LENGTH = 192
NUM_SAMPLED = 128
"""Tasks whose answers the fine-tuned model writes for the preference pairs."""


class Answer(NamedTuple):
    """A candidate answer as the models see it: its ids, with the end marker where it ended."""

    ids: tuple[int, ...]
    completion: Completion


def conditions_of(tokenizer: Tokenizer) -> Conditions:
    """Returns the conditional system prompts, rendered; only the reward model reads them."""
    prompts = {name: chat.render([Message("system", text)], tokenizer).ids for name, text in CONDITIONS.items()}
    return make_conditions(prompts, bos_id=tokenizer.bos_id)


def prompt_ids(task: BodyTask, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the conversation that asks for a body, up to the assistant's turn."""
    return list(chat.render(library.body_prompt(task), tokenizer, add_generation_prompt=True).ids)


def tasks_of(config: Tiny, root: Path, tokenizer: Tokenizer, *, held_out: bool) -> list[BodyTask]:
    """Returns the tasks whose prompt fits, in an order that the seed shuffles; held-out ones are of held-out files."""
    if config.data is not None:
        raise Skip(f"preferences are made for functions of the standard library; {config.data} has none")
    tasks = library.body_tasks(tiny_models.facts(root, config, held_out=held_out))
    tasks = [task for task in tasks if len(prompt_ids(task, tokenizer)) <= MAX_PROMPT_TOKENS]
    random.Random(config.seed).shuffle(tasks)
    return tasks


def written_answers(task: BodyTask, tokenizer: Tokenizer, *, max_new_tokens: int) -> list[Answer]:
    """Returns answers to a task that no model wrote: the library's own, and typical bad ones."""
    end = tokenizer.special[IM_END]
    body = tokenizer.encode(task.body)
    first_line = task.body.splitlines()[0]
    texts = [first_line, "pass", '"""' + task.name + '"""', task.prompt.splitlines()[0], ""]
    rows = [(tokenizer.encode(text), True) for text in texts]
    rows += [(body, True)] if len(body) < max_new_tokens else []
    rows += [(body[: max(1, len(body) // 2)], False)]
    return [
        Answer((*ids[: max_new_tokens - 1], *([end] if ended else [])), Completion(tokenizer.decode(ids), ended))
        for ids, ended in rows
    ]


def sampled_answers(model: Model, tasks: Sequence[BodyTask], config: Tiny, *, seed: int) -> list[Answer]:
    """Returns one drawn answer of the model per task."""
    end = model.tokenizer.special[IM_END]
    drawn = measure.replies(
        model,
        [library.body_prompt(task) for task in tasks],
        max_new_tokens=config.max_new_tokens,
        temperature=1.0,
        seed=seed,
    )
    return [
        Answer((*reply.ids, *([end] if reply.ended else [])), Completion(reply.message.content, reply.ended))
        for reply in drawn
    ]


def preference_pairs(
    task: BodyTask, answers: Sequence[Answer], tokenizer: Tokenizer, *, rng: random.Random, count: int
) -> list[Pair]:
    """Returns up to `count` pairs of answers that the task's condition does not like equally well."""
    condition = condition_of(task)
    liked = [(library.preference(condition, answer.completion, task), answer) for answer in answers]
    pairs = [(a, b) for i, a in enumerate(liked) for b in liked[:i] if a[0] != b[0]]
    rng.shuffle(pairs)
    prompt = prompt_ids(task, tokenizer)
    made = []
    for first, second in pairs[:count]:
        chosen, rejected = (first, second) if first[0] > second[0] else (second, first)
        made.append(Pair(prompt, list(chosen[1].ids), list(rejected[1].ids), condition))
    return made


def reward(config: Tiny, root: Path) -> dict[str, Any]:
    """Trains the conditional reward model on pairs of written and sampled answers."""
    model = open_model(root / "sft")
    tokenizer = model.tokenizer
    tasks = tasks_of(config, root, tokenizer, held_out=False)
    held_out = tasks_of(config, root, tokenizer, held_out=True)
    rng = random.Random(config.seed)
    answers = {task: written_answers(task, tokenizer, max_new_tokens=config.max_new_tokens) for task in tasks}
    sampled = tasks[:NUM_SAMPLED]
    for task, answer in zip(sampled, sampled_answers(model, sampled, config, seed=config.seed), strict=True):
        answers[task].append(answer)
    pairs = [p for task in tasks for p in preference_pairs(task, answers[task], tokenizer, rng=rng, count=4)]
    unseen = [
        pair
        for task in held_out
        for pair in preference_pairs(
            task,
            written_answers(task, tokenizer, max_new_tokens=config.max_new_tokens),
            tokenizer,
            rng=rng,
            count=2,
        )
    ]
    params, reward_config = from_lm(model.params, model.config, jax.random.key(config.seed))
    params, rows = fit_reward(
        config, root / "reward", params, reward_config, pairs, tokenizer, steps=config.reward_steps
    )
    accuracy = pair_accuracy(params, reward_config, unseen, tokenizer)
    save_model(
        root / "reward" / "model",
        config=reward_config,
        params=params,
        tokenizer=tokenizer,
        layout="internlm2",
        provenance={"pairs": len(pairs), "conditions": list(CONDITIONS)},
        overwrite=True,
    )
    print(f"{len(pairs)} pairs; held-out accuracy by condition: {accuracy}")
    return {
        "num_pairs": len(pairs),
        "num_held_out_pairs": len(unseen),
        "held_out_accuracy": accuracy,
        "curve": [{"step": row["step"], "loss": row["loss"], "accuracy": row["accuracy"]} for row in rows],
    }


def fit_reward(
    config: Tiny, folder: Path, params: dict, reward_config, pairs: Sequence[Pair], tokenizer: Tokenizer, *, steps: int
) -> tuple[dict, list[dict[str, Any]]]:
    """Returns the reward model's parameters after `steps` batches of pairs, and its logged metrics."""
    conditions = conditions_of(tokenizer)
    optimizer = make_optimizer(
        AdamW(peak_lr=1e-3, weight_decay=0.01), Cosine(warmup_steps=5, final_fraction=0.5), steps
    )
    state = init_state(jax.tree.map(lambda leaf: leaf.copy(), params), optimizer, seed=config.seed)
    step = make_step(ranking(reward_config), optimizer)
    data = preference_batches(
        pairs,
        conditions,
        batch_size=8,
        length=PAIR_LENGTH,
        reward_token_id=tokenizer.special[REWARD],
        seed=config.seed,
    )
    about = {"stage": folder.name, "steps": steps, "num_pairs": len(pairs), "seed": config.seed}
    with open_run(folder, about, tracking=TrackingConfig(log_every=5, wandb="disabled")) as run:
        with open_checkpoints(run.checkpoints, CheckpointConfig(every=steps, max_to_keep=1)) as checkpoints:
            state = train(state, data, step, num_steps=steps, checkpoints=checkpoints, tracker=run)
    return state.trainable, read_rows(folder / "metrics.jsonl")


def pair_accuracy(params: dict, reward_config, pairs: Sequence[Pair], tokenizer: Tokenizer) -> dict[str, float]:
    """Returns the share of pairs that are ranked right, per condition."""
    scored = jax.jit(score_pairs, static_argnames="config")
    conditions, right = conditions_of(tokenizer), {name: [] for name in CONDITIONS}
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        batch = preference_batch(
            part, conditions, length=PAIR_LENGTH, batch_size=32, reward_token_id=tokenizer.special[REWARD]
        )
        chosen, rejected = scored(params, batch, config=reward_config)
        for pair, better in zip(part, np.asarray(chosen > rejected), strict=False):
            right[pair.condition].append(bool(better))
    return {name: float(np.mean(values)) for name, values in right.items() if values}


# --- rounds ----------------------------------------------------------------------------------------------------------


def ppo_config(config: Tiny) -> PPOConfig:
    """Returns the report's settings, but for what a tiny model in a minute needs otherwise."""
    return PPOConfig(
        max_new_tokens=config.max_new_tokens,
        minibatch_size=config.num_prompts // 2,
        num_epochs=1,
        truncation=End(),
        pretrain_coefficient=0.5,
    )


def rlhf(config: Tiny, root: Path) -> dict[str, Any]:
    """Runs the rounds: critic warm-up, PPO, targeted pairs, a refreshed reward model, PPO again."""
    model, scorer = open_model(root / "sft"), open_model(root / "reward")
    tokenizer = model.tokenizer
    train_tasks = tasks_of(config, root, tokenizer, held_out=False)
    held_out = tasks_of(config, root, tokenizer, held_out=True)
    held_out = (held_out * (1 + config.num_evaluated // max(1, len(held_out))))[: config.num_evaluated]
    settings = ppo_config(config)
    num_updates = 2 * config.num_iterations * 2
    run = ppo_module.make_ppo(
        settings,
        model.config,
        scorer.config,
        stop_ids=chat.stop_ids(tokenizer),
        actor_optimizer=make_optimizer(AdamW(peak_lr=3e-4, weight_decay=0.0, eps=1e-5), Constant(2), num_updates),
        critic_optimizer=make_optimizer(AdamW(peak_lr=1e-3, weight_decay=0.0, eps=1e-5), Constant(2), 2 * num_updates),
        seed=config.seed,
    )
    critic, _ = from_lm(scorer.params, scorer.config)
    state = ppo_module.init(run, model.params, critic)
    reward_fn = model_reward(
        Weights(scorer.params),
        conditions_of(tokenizer),
        config=scorer.config,
        reward_token_id=tokenizer.special[REWARD],
    )
    rows = open_rows(root / "tokenizer" / "train", seq_len=128, packing="concat", seed=config.seed + 1)
    text = batches(rows, batch_size=8)
    curve = []
    for index in range(config.num_iterations):
        prompts = make_prompts(train_tasks, tokenizer, count=config.num_prompts, offset=index * config.num_prompts)
        out = ppo_module.iteration(
            run,
            state,
            prompts,
            reward_fn,
            reference=Weights(model.params),
            pretrain=text,
            place=(0, index),
            train_actor=index >= 2,
        )
        state = out.state
        curve.append(out.metrics)
        print(
            index,
            {
                k: round(v, 3)
                for k, v in out.metrics.items()
                if k
                in (
                    "score",
                    "kl",
                    "length",
                    "ended",
                    "logprob_difference",
                    "explained_variance",
                    "entropy",
                    "first_ratio_deviation",
                )
            },
            flush=True,
        )
    after = dataclasses.replace(model, params=state.actor.trainable)
    for name, m in (("before", model), ("after", after)):
        print(name, measure.gold_score(m, held_out, max_new_tokens=config.max_new_tokens, seed=1))
    return {"curve": curve}


def make_prompts(tasks: Sequence[BodyTask], tokenizer: Tokenizer, *, count: int, offset: int) -> Prompts:
    """Returns `count` prompts from `offset` on, round and round."""
    names = list(CONDITIONS)
    chosen = [tasks[(offset + i) % len(tasks)] for i in range(count)]
    tokens = np.zeros((count, MAX_PROMPT_TOKENS), np.int32)
    lengths = np.zeros(count, np.int32)
    for row, task in enumerate(chosen):
        ids = prompt_ids(task, tokenizer)
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return Prompts(tokens, lengths, np.array([names.index(condition_of(task)) for task in chosen], np.int32))
