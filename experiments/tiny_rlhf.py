"""The alignment part of the tiny chain: a conditional reward model, and two rounds of PPO against it.

Preferences are made by a program (`library.preference`), so the reward model can be checked; between the rounds it also
judges what the policy has learned to write, as people do in the report. The gold that is reported (`library.gold`) is
another program: neither the reward model nor the policy is trained on it, and no pair is chosen by it.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.loading import batches, open_rows
from eval.metrics import bootstrap_mean, wilson
from experiments import library, measure, tiny_models
from experiments.library import CONDITIONS, BodyTask, Completion, condition_of
from experiments.tiny_config import Skip, Tiny, opened
from internjax.hf.open import Model, open_model
from internjax.hf.save import save_model
from internjax.model.config import ModelConfig
from internjax.rlhf import cool, monitor, ppo
from internjax.rlhf.config import End, KLInReward, PPOConfig
from internjax.rlhf.pairs import Conditions, Pair, make_conditions, preference_batch, preference_batches
from internjax.rlhf.reward import from_lm, ranking, score_pairs
from internjax.rlhf.rollout import Prompts, Reward, Weights, evaluate, model_reward, response_mask
from internjax.text import chat
from internjax.text.chat import Message
from internjax.text.tokenizer import IM_END, REWARD, Tokenizer
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.loop import train
from internjax.train.optimizer import AdamW, Constant, Cosine, make_optimizer
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig, open_run, read_rows

NUM_TASKS, NUM_DRAWS, PAIRS_PER_TASK = 192, 2, 4
"""Tasks that pairs are made for, answers that the fine-tuned model draws for each, and pairs of each."""


class Answer(NamedTuple):
    """A candidate answer as the models see it: its ids, with the end marker where it ended."""

    ids: tuple[int, ...]
    completion: Completion


def conditions_of(tokenizer: Tokenizer) -> Conditions:
    """Returns the conditional system prompts, rendered; only the reward model reads them."""
    prompts = {name: chat.render([Message("system", text)], tokenizer).ids for name, text in CONDITIONS.items()}
    return make_conditions(prompts, bos_id=tokenizer.bos_id)


def pair_length(conditions: Conditions, config: Tiny) -> int:
    """Returns how many tokens the longest answer has with its prompt, its condition and the reward token."""
    return conditions.tokens_CM.shape[1] + config.max_prompt_tokens + config.max_new_tokens + 1


def prompt_ids(task: BodyTask, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the conversation that asks for a body, up to the assistant's turn."""
    return list(chat.render(library.body_prompt(task), tokenizer, add_generation_prompt=True).ids)


def _check_feeds(config: Tiny) -> None:
    if config.data is not None:
        raise Skip(f"preferences are made for functions of the standard library; {config.data} has none")


def tasks_of(config: Tiny, root: Path, tokenizer: Tokenizer, *, held_out: bool) -> list[BodyTask]:
    """Returns the tasks whose prompt fits, in an order that the seed shuffles; held-out ones are of held-out files.

    Each prompt is there once, and a held-out one is none of a training file too. Raises ValueError where there is none.
    """
    found = library.body_tasks(tiny_models.facts(root, config, held_out=held_out))
    learned = library.body_tasks(tiny_models.facts(root, config, held_out=False)) if held_out else []
    known = {task.prompt for task in learned}
    tasks = {task.prompt: task for task in found if task.prompt not in known}.values()
    tasks = [task for task in tasks if len(prompt_ids(task, tokenizer)) <= config.max_prompt_tokens]
    if not tasks:
        part = "held-out" if held_out else "training"
        raise ValueError(
            f"no function of a {part} file has a prompt of at most {config.max_prompt_tokens} tokens; raise "
            "max_prompt_tokens, or the vocabulary, which makes prompts shorter"
        )
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
    task: BodyTask, drawn: Sequence[Answer], written: Sequence[Answer], tokenizer: Tokenizer, *, rng: random.Random
) -> list[Pair]:
    """Returns pairs of answers that the task's condition does not like equally well, a drawn one in each."""
    condition = condition_of(task)
    liked = [(library.preference(condition, answer.completion, task), answer) for answer in (*drawn, *written)]
    pairs = [(a, b) for i, a in enumerate(liked[: len(drawn)]) for b in liked[i + 1 :] if a[0] != b[0]]
    rng.shuffle(pairs)
    prompt = prompt_ids(task, tokenizer)
    made = []
    for first, second in pairs[:PAIRS_PER_TASK]:
        chosen, rejected = (first, second) if first[0] > second[0] else (second, first)
        made.append(Pair(prompt, list(chosen[1].ids), list(rejected[1].ids), condition))
    return made


def made_pairs(model: Model, tasks: Sequence[BodyTask], config: Tiny, *, seed: int, rng: random.Random) -> list[Pair]:
    """Returns the pairs of some tasks: what the model draws for each, against itself and against written answers."""
    draws = [sampled_answers(model, tasks, config, seed=seed + draw) for draw in range(NUM_DRAWS)]
    return [
        pair
        for task, *drawn in zip(tasks, *draws, strict=True)
        for pair in preference_pairs(
            task,
            drawn,
            written_answers(task, model.tokenizer, max_new_tokens=config.max_new_tokens),
            model.tokenizer,
            rng=rng,
        )
    ]


def reward(config: Tiny, root: Path) -> dict[str, Any]:
    """Trains the conditional reward model on pairs of drawn and written answers."""
    _check_feeds(config)
    model = opened(config, root / "sft")
    tokenizer = model.tokenizer
    tasks = tasks_of(config, root, tokenizer, held_out=False)[:NUM_TASKS]
    held_out = tasks_of(config, root, tokenizer, held_out=True)[: NUM_TASKS // 3]
    rng = random.Random(config.seed)
    pairs = made_pairs(model, tasks, config, seed=1000 * config.seed, rng=rng)
    unseen = made_pairs(model, held_out, config, seed=1000 * config.seed + 500, rng=rng)
    params, reward_config = from_lm(model.params, model.config, jax.random.key(config.seed))
    fitted = fit_reward(
        config, root / "reward", params, reward_config, pairs, tokenizer, steps=config.reward_steps, peak_lr=1e-3
    )
    accuracy = pair_accuracy(config, fitted.params, reward_config, unseen, tokenizer)
    save_model(
        root / "reward" / "model",
        config=reward_config,
        params=fitted.params,
        tokenizer=tokenizer,
        layout="internlm2",
        provenance={"pairs": len(pairs), "conditions": list(CONDITIONS)},
        overwrite=True,
    )
    lines = [json.dumps(pair._asdict()) + "\n" for pair in pairs]
    (root / "reward" / "pairs.jsonl").write_text("".join(lines))
    print(f"{len(pairs)} pairs; held-out accuracy by condition: {accuracy}")
    return {
        "num_pairs": len(pairs),
        "num_held_out_pairs": len(unseen),
        "held_out_accuracy": accuracy,
        "curve": [{"step": row["step"], "loss": row["loss"], "accuracy": row["accuracy"]} for row in fitted.rows],
    }


class FittedReward(NamedTuple):
    """A reward model's parameters, and the logged metrics of its training."""

    params: dict
    rows: list[dict[str, Any]]


def fit_reward(
    config: Tiny,
    folder: Path,
    params: dict,
    reward_config: ModelConfig,
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    steps: int,
    peak_lr: float,
) -> FittedReward:
    """Returns the reward model after `steps` batches of pairs, from `params` on."""
    conditions = conditions_of(tokenizer)
    optimizer = make_optimizer(
        AdamW(peak_lr=peak_lr, weight_decay=0.01), Cosine(warmup_steps=5, final_fraction=0.5), steps
    )
    state = init_state(jax.tree.map(lambda leaf: leaf.copy(), params), optimizer, seed=config.seed)
    step = make_step(ranking(reward_config), optimizer)
    data = preference_batches(
        pairs,
        conditions,
        batch_size=8,
        length=pair_length(conditions, config),
        reward_token_id=tokenizer.special[REWARD],
        seed=config.seed,
    )
    about = {"stage": folder.name, "steps": steps, "num_pairs": len(pairs), "seed": config.seed}
    with open_run(folder, about, tracking=TrackingConfig(log_every=5, wandb="disabled")) as run:
        with open_checkpoints(run.checkpoints, CheckpointConfig(every=steps, max_to_keep=1)) as checkpoints:
            state = train(state, data, step, num_steps=steps, checkpoints=checkpoints, tracker=run)
    return FittedReward(state.trainable, read_rows(folder / "metrics.jsonl"))


def pair_accuracy(
    config: Tiny, params: dict, reward_config: ModelConfig, pairs: Sequence[Pair], tokenizer: Tokenizer
) -> dict[str, float]:
    """Returns the share of pairs that are ranked right, per condition."""
    scored = jax.jit(score_pairs, static_argnames="config")
    conditions, right = conditions_of(tokenizer), {name: [] for name in CONDITIONS}
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        batch = preference_batch(
            part,
            conditions,
            length=pair_length(conditions, config),
            batch_size=32,
            reward_token_id=tokenizer.special[REWARD],
        )
        chosen, rejected = scored(params, batch, config=reward_config)
        for pair, better in zip(part, np.asarray(chosen > rejected), strict=False):
            right[pair.condition].append(bool(better))
    return {name: float(np.mean(values)) for name, values in right.items() if values}


# --- rounds ----------------------------------------------------------------------------------------------------------

NUM_ROUNDS = 2
WARM_UP_ITERATIONS = 1
REFRESH_WEIGHT, REFRESH_PAIRS, REFRESH_STEPS = 3, 120, 15
"""Between rounds: how often each targeted pair counts, how many original pairs beside them, and steps."""
PROBE_BLOCK, PROBE_DRAWS = 777, 4
"""Which prompts are answered before and after a round, and how often each: a prompt whose answers are not all right or
all wrong is what a targeted pair is made of."""


class Setting(NamedTuple):
    """What stays the same over the rounds."""

    config: Tiny
    run: ppo.PPO
    reference: Weights
    tokenizer: Tokenizer
    reward_config: ModelConfig
    train_tasks: list[BodyTask]
    held_out: list[BodyTask]
    prompts: dict[BodyTask, list[int]]


def ppo_config(config: Tiny) -> PPOConfig:
    """Returns the report's settings, but for four that a tiny model needs otherwise.

    The pull towards the fine-tuned model is twenty times the report's: a reward model of some hundred pairs is right
    near that model only, and with 0.01, and in some runs with 0.1, the policy goes on to where it errs. The
    pre-training loss gets a fifth: with the report's 0.5 it outweighs the rewards of a model this small. An answer
    cut off at the longest length is judged as it is, and lengths and batches are small.
    """
    return PPOConfig(
        max_new_tokens=config.max_new_tokens,
        minibatch_size=config.num_prompts // 2,
        truncation=End(),
        kl=KLInReward(0.2),
        pretrain_coefficient=0.1,
    )


def rlhf(config: Tiny, root: Path) -> dict[str, Any]:
    """Runs the rounds: PPO, targeted pairs from early and late answers, a refreshed reward model, PPO again.

    A round that has ended is kept: an interrupted stage goes on with the next one.
    """
    _check_feeds(config)
    model, scorer = opened(config, root / "sft"), opened(config, root / "reward")
    setting = _setting(config, root, model, scorer.config)
    about = {"stage": "rlhf", "ppo": ppo_config(config), "seed": config.seed, "rounds": NUM_ROUNDS}
    with open_run(root / "rlhf", about, tracking=TrackingConfig(wandb="disabled")) as run:
        state, report = _rounds(setting, root, scorer)
        run.cut(0)
        for step, row in enumerate(report["curve"], 1):
            run.log(step, row)
    save_model(
        root / "rlhf" / "model",
        config=model.config,
        params=state.actor.trainable,
        tokenizer=setting.tokenizer,
        generation=model.generation,
        provenance={"rounds": NUM_ROUNDS, "iterations": config.num_iterations},
        overwrite=True,
    )
    return report | {
        "num_rounds": NUM_ROUNDS,
        "num_iterations": config.num_iterations,
        "num_prompts": config.num_prompts,
        "num_evaluated": len(setting.held_out),
        "logprob_difference": max(row["logprob_difference"] for row in report["curve"]),
        "num_compared": round(sum(row["length"] for row in report["curve"]) * config.num_prompts),
        "samples": report["evaluations"][-1]["samples"],
    }


def _rounds(setting: Setting, root: Path, scorer: Model) -> tuple[ppo.PPOState, dict[str, Any]]:
    """Returns the state after the last round and what the report shows of all of them."""
    config = setting.config
    critic, _ = from_lm(scorer.params, scorer.config)
    state, reward_params = ppo.init(setting.run, setting.reference.params, critic), scorer.params
    pairs = _read_pairs(root / "reward" / "pairs.jsonl")
    rows = open_rows(root / "tokenizer" / "train", seq_len=128, packing="concat", seed=config.seed + 1)
    report: dict[str, Any] = {"evaluations": [], "curve": [], "alarms": [], "num_pairs": []}
    first_reward = _reward_fn(setting, scorer.params)
    for index in range(NUM_ROUNDS):
        folder = root / "rlhf" / f"round_{index}"
        done = _restored(folder, state)
        if done is not None:
            state, report, reward_params = done
            continue
        reward_fn = _reward_fn(setting, reward_params)
        if index == 0:
            report["evaluations"].append(_evaluate("fine-tuned", setting, state, first_reward, reward_fn))
        result = cool.run_round(
            setting.run,
            state,
            lambda number, at: _prompts(setting, setting.train_tasks, number * 1000 + at),
            _prompts(setting, setting.train_tasks, PROBE_BLOCK, draws=PROBE_DRAWS),
            reward_fn,
            round_index=index,
            num_iterations=config.num_iterations,
            warm_up_iterations=WARM_UP_ITERATIONS,
            reference=setting.reference,
            pretrain=batches(rows, batch_size=8),
            log=_show,
        )
        state = result.state
        report["curve"] += [row for row in result.metrics if not row["warm_up"]]
        report["evaluations"].append(_evaluate(f"round {index + 1}", setting, state, first_reward, reward_fn))
        report["alarms"].append(_alarms(setting, result))
        new = _targeted_pairs(setting, result, report) if index + 1 < NUM_ROUNDS else []
        if new:
            mixed = REFRESH_WEIGHT * new + random.Random(config.seed).sample(pairs, min(len(pairs), REFRESH_PAIRS))
            reward_params = fit_reward(
                config,
                folder / "reward",
                reward_params,
                scorer.config,
                mixed,
                setting.tokenizer,
                steps=REFRESH_STEPS,
                peak_lr=3e-4,
            ).params
            # The refreshed model scores on another level; the old critic would take that for a change of the policy.
            state = ppo.replace_critic(setting.run, state, from_lm(reward_params, scorer.config)[0])
        _keep(folder, state, report, setting, reward_params)
    return state, report


def _targeted_pairs(setting: Setting, result: cool.Round, report: dict[str, Any]) -> list[Pair]:
    """Returns the fast path's pairs of a round, judged as all pairs are; enters their count into the report."""

    def liking(completion: Completion, task: BodyTask) -> float:
        return library.preference(condition_of(task), completion, task)

    new = monitor.fast_path(result.early, result.late, _scores_of(setting, liking), list(CONDITIONS))
    report["num_pairs"].append(len(new))
    print(f"  {len(new)} targeted pairs")
    return new


def _alarms(setting: Setting, result: cool.Round) -> dict[str, str]:
    """Returns what the gold and the figures of early and late answers of a round warn of."""
    alarms = monitor.drift(result.early, result.late, _scores_of(setting, library.gold)).alarms
    print(f"  alarms: {'; '.join(f'{name}: {reason}' for name, reason in alarms.items()) or 'none'}")
    return alarms


def _setting(config: Tiny, root: Path, model: Model, reward_config: ModelConfig) -> Setting:
    tokenizer = model.tokenizer
    train_tasks = tasks_of(config, root, tokenizer, held_out=False)
    held_out = tasks_of(config, root, tokenizer, held_out=True)[: config.num_evaluated]
    num_updates = 2 * NUM_ROUNDS * (config.num_iterations + WARM_UP_ITERATIONS)
    optimizers = [
        make_optimizer(AdamW(peak_lr=rate, weight_decay=0.0, b2=0.99, eps=1e-5), Constant(2), num_updates)
        for rate in (config.actor_rate, config.critic_rate)
    ]
    run = ppo.make_ppo(
        ppo_config(config),
        model.config,
        reward_config,
        stop_ids=chat.stop_ids(tokenizer),
        actor_optimizer=optimizers[0],
        critic_optimizer=optimizers[1],
        seed=config.seed,
    )
    prompts = {task: prompt_ids(task, tokenizer) for task in {*train_tasks, *held_out}}
    return Setting(config, run, Weights(model.params), tokenizer, reward_config, train_tasks, held_out, prompts)


def _prompts(setting: Setting, tasks: Sequence[BodyTask], block: int, *, draws: int = 1) -> Prompts:
    """Returns the prompts of a block of tasks, round and round, each `draws` times."""
    count, names = setting.config.num_prompts, list(CONDITIONS)
    chosen = [tasks[(block * count + i // draws) % len(tasks)] for i in range(count)]
    tokens, lengths = np.zeros((count, setting.config.max_prompt_tokens), np.int32), np.zeros(count, np.int32)
    for row, task in enumerate(chosen):
        ids = setting.prompts[task]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return Prompts(tokens, lengths, np.array([names.index(condition_of(task)) for task in chosen], np.int32))


def _reward_fn(setting: Setting, params: dict) -> Reward:
    return model_reward(
        Weights(params),
        conditions_of(setting.tokenizer),
        config=setting.reward_config,
        reward_token_id=setting.tokenizer.special[REWARD],
    )


def _completion(setting: Setting, ids: Sequence[int], ended: bool) -> Completion:
    return Completion(chat.parse(ids[: len(ids) - ended], setting.tokenizer).content, ended)


def _scores_of(setting: Setting, judge: Callable[[Completion, BodyTask], float]) -> monitor.Gold:
    """Returns a program's judgement of answers as a function of samples."""
    task_of = {tuple(ids): task for task, ids in setting.prompts.items()}

    def scores(samples: monitor.Samples) -> np.ndarray:
        rows = zip(samples.prompts, samples.responses, samples.ended, strict=True)
        return np.array([judge(_completion(setting, r, bool(e)), task_of[tuple(p)]) for p, r, e in rows], float)

    return scores


def _evaluate(
    name: str, setting: Setting, state: ppo.PPOState, first_reward: Reward, own_reward: Reward
) -> dict[str, Any]:
    """Returns gold, rewards, length, distinct share and KL of the policy on the held-out prompts, one draw each.

    `reward` is by the first reward model, so that policies compare; `own_reward` by the one that the round trained for.
    """
    gold, rewards, own, lengths, kls, texts, samples, ended = [], [], [], [], [], [], [], []
    settings, count = setting.run.config, setting.config.num_prompts
    for block in range(math.ceil(len(setting.held_out) / count)):
        tasks = setting.held_out[block * count : (block + 1) * count]  # the last block is filled up, and cut below
        # The same draws (seeds) for every policy, so that they differ by the policy alone.
        drawn = ppo.draw(setting.run, state, _prompts(setting, setting.held_out, block), place=(2, block))
        found = evaluate(
            Weights(state.actor.trainable),
            setting.reference,
            Weights(state.critic.trainable),
            drawn,
            config=setting.run.model_config,
            critic_config=setting.run.critic_config,
            block_rows=settings.minibatch_size,
            temperature=settings.temperature,
        )
        mask = np.asarray(response_mask(drawn)) > 0
        kl = np.where(mask, np.asarray(found.logprobs_BT - found.ref_logprobs_BT), 0.0).sum(axis=1)
        answers = monitor.make_samples(drawn, np.asarray(first_reward(drawn), np.float32))
        kls += list(kl[: len(tasks)])
        rewards += list(answers.rewards[: len(tasks)])
        own += list(np.asarray(own_reward(drawn), np.float32)[: len(tasks)])
        gold += list(_scores_of(setting, library.gold)(answers)[: len(tasks)])
        lengths += [len(response) for response in answers.responses[: len(tasks)]]
        ended += list(answers.ended[: len(tasks)])
        for task, response, end in zip(tasks, answers.responses, answers.ended):
            text = _completion(setting, response, bool(end)).text
            texts.append(text)
            samples.append({"prompt": task.prompt, "completion": text, "gold": bool(gold[len(samples)])})
    row = {
        "name": name,
        "gold": wilson(int(sum(gold)), len(gold))._asdict(),
        "reward": bootstrap_mean([float(r) for r in rewards])._asdict(),
        "own_reward": bootstrap_mean([float(r) for r in own])._asdict(),
        "length": bootstrap_mean([float(n) for n in lengths])._asdict(),
        "ended": float(np.mean(ended)),
        "distinct": len(set(texts)) / len(texts),
        "kl": float(np.mean(kls)),
        "samples": samples[:8],
    }
    print(f"{name}: gold {row['gold']['value']:.0%}, reward {row['reward']['value']:.2f}, KL {row['kl']:.2f}")
    return row


def _show(row: dict[str, float]) -> None:
    print(
        f"  round {int(row['round']) + 1} iteration {int(row['iteration']) + 1}: reward {row['score']:.2f}, "
        f"ended {row['ended']:.0%}, length {row['length']:.0f}, KL {row['kl']:.2f}",
        flush=True,
    )


def _keep(folder: Path, state: ppo.PPOState, report: dict[str, Any], setting: Setting, reward_params: dict) -> None:
    """Writes the state of policy and critic and all that the next round stands on; report.json is last."""
    for name, part in (("actor", state.actor), ("critic", state.critic)):
        with open_checkpoints(folder / name, CheckpointConfig(max_to_keep=1)) as checkpoints:
            checkpoints.save(part)
            checkpoints.wait()
    save_model(
        folder / "reward_model",
        config=setting.reward_config,
        params=reward_params,
        tokenizer=setting.tokenizer,
        layout="internlm2",
        overwrite=True,
    )
    part = folder / ".report.part"
    part.write_text(json.dumps(report) + "\n")
    part.rename(folder / "report.json")


def _restored(folder: Path, state: ppo.PPOState) -> tuple[ppo.PPOState, dict[str, Any], dict] | None:
    """Returns what a round that has ended left, or None."""
    if not (folder / "report.json").is_file():
        return None
    parts = []
    for name, part in (("actor", state.actor), ("critic", state.critic)):
        with open_checkpoints(folder / name, CheckpointConfig(max_to_keep=1)) as checkpoints:
            parts.append(checkpoints.restore(part))
    report = json.loads((folder / "report.json").read_text())
    return ppo.PPOState(*parts), report, open_model(folder / "reward_model").params


def _read_pairs(path: Path) -> list[Pair]:
    return [Pair(**json.loads(line)) for line in path.read_text().splitlines()]
