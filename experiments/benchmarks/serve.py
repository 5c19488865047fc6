"""Our server beside `transformers serve`: same weights, same requests, equal answers, one interleaved run.

    python -m experiments.benchmarks.serve --peer-python PYTHON         # the tiny model on a CPU, 1, 8 and 16 clients
    python -m experiments.benchmarks.serve --setting 24m                # a wider model; --list shows all settings
    python -m experiments.benchmarks.serve --sessions                   # conversations of eight turns as well

Hardware: 2 CPU cores that nobody else uses, or one GPU
Needs: the extra `serve`, and torch, transformers, fastapi and uvicorn in this Python or in that of --peer-python
Time: 10 minutes for all contenders on a CPU

Every contender is a server, a process of its own over the same folder, and is asked over HTTP: /v1/chat/completions,
streamed, greedy. All are up at once and take turns, a block of requests each; those whose turn it is not are stopped.
A client sends its next request when the answer to the last one is there; its first one in a turn is not counted, for it
finds a process that stood still. No two prompts are alike. Every token that the model can draw is a word with the space
before it, so tokens are counted in what arrives, and no answer ends early: all other logits are zero, and the largest
is above. Answers to the first requests, and how many tokens their prompts have, must be equal for all contenders before
anything is timed.

internjax              python -m serve, with as many slots as the most clients
transformers           transformers serve as it comes: one request after the other
transformers-batching  transformers serve --continuous-batching

tokens per second   of a block, from its first request to its last token; the median over all blocks
first token         seconds from a request to the first text of its answer; percentiles over all requests of all blocks
per token           seconds since the arrival before, divided by the tokens that arrived together; percentiles over all
                    tokens behind a request's first arrival. What comes within a millisecond is one arrival: a server
                    that sends four tokens at once is not credited with three that took no time
pause               seconds between two arrivals, however many tokens came: what a reader sees
CPU seconds         of the server's process, for 1000 tokens; the median over all blocks

--sessions: the first-token seconds of every turn of a conversation whose turns have equally many new tokens, over those
of its first turn. Ours is asked both ways, by session and with the whole conversation each time.
"""

import argparse
import dataclasses
import functools
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import contest, record
from experiments.benchmarks.serve_clients import (
    Block,
    Contest,
    Failed,
    Server,
    Service,
    Turns,
    ask,
    ask_together,
    chat_body,
    post,
)
from experiments.benchmarks.serve_page import sections
from experiments.benchmarks.train_step import random_model
from internjax.model.config import TINY, ModelConfig
from internjax.report import write
from internjax.text.tokenizer import Tokenizer, train_tokenizer
from serve.bench.runs import Latency, first_token_latency, per_token_latency


class Setting(NamedTuple):
    """What answers, and how much: words of a prompt, and tokens of an answer."""

    model: ModelConfig
    prompt: int = 32
    new_tokens: int = 64


SETTINGS = {
    "tiny": Setting(TINY),
    "24m": Setting(
        dataclasses.replace(TINY, vocab_size=8192, d_model=384, num_layers=8, num_heads=6, num_kv_heads=6, ffn_dim=1024)
    ),
}
OURS, PEERS = "internjax", ("transformers", "transformers-batching")
BY_SESSION = f"{OURS} by session"
NUM_TURNS, TURN_ANSWER = 8, 16
SESSION_GOAL = 1.2
NUM_CHECKED = 3
"""Requests whose answers all contenders must agree on."""


# --- the folder ------------------------------------------------------------------------------------------------------


def tokenizer_of_words(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer most of whose pieces are a space and a word or its beginning."""
    pairs = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = [first + second for first in pairs for second in pairs]
    chosen = np.random.default_rng(0).permutation(len(words))[: vocab_size // 2]
    return train_tokenizer(["".join(f" {words[index]}" for index in np.tile(chosen, 3))], vocab_size=vocab_size)


def words_of(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the pieces that are a space and letters, by id."""
    pieces = {token_id: tokenizer.bytes_of(token_id) for token_id in range(tokenizer.vocab_size)}
    special = set(tokenizer.special.values())
    return {
        token_id: piece.decode()
        for token_id, piece in pieces.items()
        if token_id not in special and piece[:1] == b" " and piece[1:].isalpha() and piece.isascii()
    }


class WordModel(NamedTuple):
    """A model that draws words alone."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    words: list[str]


def word_model(model: ModelConfig) -> WordModel:
    """Returns random weights whose logits are zero but for the tokenizer's words."""
    tokenizer = tokenizer_of_words(model.vocab_size)
    words = words_of(tokenizer)
    config, params = random_model(dataclasses.replace(model, tie_embeddings=False))
    drawn = np.isin(np.arange(model.vocab_size), list(words))
    params["head"] = {"kernel": params["head"]["kernel"] * drawn}
    return WordModel(config, params, tokenizer, list(words.values()))


def write_folder(made: WordModel, folder: Path) -> None:
    """Writes the folder that every contender serves."""
    from internjax.hf.save import save_model

    save_model(folder, config=made.config, params=made.params, tokenizer=made.tokenizer)


def services(folder: Path, *, slots: int, peer_python: str) -> dict[str, Service]:
    """Returns how every contender's server is started."""
    ours = [sys.executable, "-m", "serve", str(folder), "--max-batch", str(slots)]
    theirs = [peer_python, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1"]
    return {
        OURS: Service(ours, folder.name),
        "transformers": Service(theirs, str(folder)),
        "transformers-batching": Service([*theirs, "--continuous-batching"], str(folder)),
    }


class Prompts(NamedTuple):
    """Makes prompts; the same ones for every contender."""

    words: Sequence[str]
    length: int

    def turn(self, *place: int) -> dict[str, str]:
        drawn = np.random.default_rng((13, *place)).integers(0, len(self.words), self.length)
        return {"role": "user", "content": "".join(self.words[index] for index in drawn)}

    def of_clients(self, *place: int, num_clients: int, each: int) -> list[list[Turns]]:
        return [[[self.turn(*place, client, index)] for index in range(each)] for client in range(num_clients)]


# --- the run ---------------------------------------------------------------------------------------------------------


class First(NamedTuple):
    """What a contender says to one of the first requests."""

    num_prompt: int
    text: str


def first_answer(server: Server, turns: Turns, num_new: int) -> First:
    """Returns the answer, asked whole and streamed; Failed where the two differ, or their counts of tokens."""
    with server.connection() as connection:
        whole = post(connection, "/v1/chat/completions", chat_body(server.model, turns, num_new))
    answer, usage = ask(server, turns, num_new), whole["usage"]
    given = whole["choices"][0]["message"]["content"], usage["completion_tokens"]
    if given != (answer.text, num_new):
        raise Failed(f"whole it answered {given}, streamed {answer.text!r} of {num_new} tokens")
    return First(usage["prompt_tokens"], answer.text)


def require_equal_answers(found: Mapping[str, Sequence[First]]) -> None:
    """Ends the run when contenders read prompts differently, or answer them differently."""
    reference = next(iter(found), None)
    for who, answers in found.items():
        for index, (answer, wanted) in enumerate(zip(answers, found[reference], strict=True)):
            if answer != wanted:
                raise SystemExit(
                    f"error: {who} and {reference} do not serve the same model: request {index} gave "
                    f"{tuple(answer)} and {tuple(wanted)}"
                )


def measure(
    servers: Contest, prompts: Prompts, new_tokens: int, *, clients: int, num_blocks: int, num_requests: int
) -> dict[str, Any]:
    """Returns the figures of every contender with so many clients at once."""
    each = max(1, num_requests // clients)
    blocks: dict[str, list[Block]] = {}

    def turn(server: Server, asked: Sequence[Sequence[Turns]]) -> Block:
        ask_together(server, [own[:1] for own in asked], new_tokens)  # of a process that stood still
        return ask_together(server, [own[1:] for own in asked], new_tokens)

    for index in range(num_blocks + 1):
        warms_up = index == 0
        asked = prompts.of_clients(1, clients, index, num_clients=clients, each=2 if warms_up else 1 + each)
        for who, block in servers.turns(functools.partial(turn, asked=asked)).items():
            blocks.setdefault(who, []).append(block)
    left = {who: own[1:] for who, own in blocks.items() if who not in servers.failed}
    return {who: figures(own) for who, own in left.items()} | {
        who: {"failed": why} for who, why in servers.failed.items()
    }


def figures(blocks: Sequence[Block]) -> dict[str, Any]:
    """Returns what blocks of requests come to."""
    if not blocks:
        return {"failed": "nothing was measured"}
    timings = [answer.timing for block in blocks for answer in block.answers]
    pauses = [timing._replace(counts=(1,) * len(timing.counts)) for timing in timings]
    speeds = [block.num_new / block.seconds for block in blocks]
    spent = [block.cpu_seconds / block.num_new * 1000 for block in blocks]
    return {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "first_token": _rounded(first_token_latency(timings)),
        "per_token": _rounded(per_token_latency(timings)),
        "pause": _rounded(per_token_latency(pauses)),
        "cpu_seconds_per_1000_tokens": round(statistics.median(spent), 3),
        "tokens_per_arrival": round(sum(t.num_new for t in timings) / sum(len(t.counts) for t in timings), 2),
        "tokens_per_second_of_blocks": [round(speed, 1) for speed in speeds],
    }


def _rounded(latency: Latency | None) -> dict[str, float] | None:
    return None if latency is None else {name: round(value, 6) for name, value in latency._asdict().items()}


def conversation(server: Server, prompts: Prompts, index: int, *, by_session: bool) -> list[float]:
    """Returns the first-token seconds of every turn."""
    session, history, seconds = None, [], []
    if by_session:
        with server.connection() as connection:
            session = post(connection, "/v1/sessions", {"model": server.model})["id"]
    for turn in range(NUM_TURNS):
        said = [*history, prompts.turn(2, index, turn)]
        answer = ask(server, said, TURN_ANSWER, session=session)
        seconds.append(answer.timing.first_token)
        if not by_session:
            history = [*said, {"role": "assistant", "content": answer.text}]
    return seconds


def measure_conversations(servers: Contest, prompts: Prompts, *, num_conversations: int) -> dict[str, Any]:
    """Returns the first-token seconds of every turn, medians over conversations, and their ratios to the first turn's.

    Every contender is sent the whole conversation each time; ours is asked by session besides.
    """
    found: dict[str, list[list[float]]] = {}
    ways = {False: None, True: [OURS]}
    for index in range(num_conversations + 1):
        for by_session, only in ways.items():

            def hold(server: Server, index=2 * index + by_session, by_session=by_session) -> list[float]:
                return conversation(server, prompts, index, by_session=by_session)

            for who, seconds in servers.turns(hold, only=only).items():
                found.setdefault(BY_SESSION if by_session else who, []).append(seconds)
    medians = {
        who: [round(statistics.median(turn), 6) for turn in zip(*conversations[1:])]
        for who, conversations in found.items()
        if len(conversations) > 1
    }
    return {
        who: {"first_token": turns, "ratio": [round(turn / turns[0], 3) for turn in turns]}
        for who, turns in medians.items()
    }


# --- what it comes to ------------------------------------------------------------------------------------------------


def ratios(found: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """Returns how far ours is ahead of each peer at one number of clients; above 1 is ahead. Only of what there is."""
    if "failed" in found.get(OURS, {"failed": ""}):
        return {}
    ours, ahead = _compared(found[OURS]), {}
    for who, each in found.items():
        if who != OURS and "failed" not in each:
            ahead[who] = {name: round(value / ours[name], 3) for name, value in _compared(each).items() if name in ours}
    return ahead


def _compared(each: Mapping[str, Any]) -> dict[str, float]:
    """The figures in which contenders are compared; the smaller, the better."""
    percentiles = {
        "first token": ("first_token", ("p50", "p99")),
        "per token": ("per_token", ("p50", "p95", "p99")),
        "pause": ("pause", ("p50", "p95", "p99")),
    }
    found = {"seconds per token": 1 / each["tokens_per_second"]}
    for name, (field, points) in percentiles.items():
        found |= {f"{name} {point}": each[field][point] for point in points if each[field] and each[field][point] > 0}
    return found


def losses(ahead: Mapping[int, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Returns where ours is behind a peer, in words."""
    return [
        f"{clients} clients, {name}: {ratio} of {who}"
        for clients, by_peer in ahead.items()
        for who, by_name in by_peer.items()
        for name, ratio in by_name.items()
        if ratio < 1
    ]


def goals(ahead: Mapping[int, Mapping], conversations: Mapping[str, Any]) -> Iterable[str]:
    """Yields a line for each goal, and whether it is reached."""
    if any(ahead.values()):
        behind = losses(ahead)
        yield "goal: ahead of transformers serve at every point: " + (f"no; {'; '.join(behind)}" if behind else "yes")
    else:
        yield "goal: ahead of transformers serve at every point: not measured, there is nothing to compare"
    for who in (OURS, BY_SESSION):
        if who in conversations:
            worst = max(conversations[who]["ratio"])
            verdict = "yes" if worst <= SESSION_GOAL else "no"
            yield f"goal: first token of a turn over the first turn's at most {SESSION_GOAL}, {who}: {verdict}, {worst}"


def show(found: Mapping[str, dict], clients: int) -> None:
    """Prints a line for every contender."""
    for who, each in found.items():
        if "failed" in each:
            print(f"{clients:3} clients  {who:21} failed: {each['failed']}", flush=True)
            continue
        first, token = each["first_token"], each["per_token"]
        behind = "" if token is None else f", per token {token['p50'] * 1e3:.2f} / {token['p99'] * 1e3:.2f} ms"
        print(
            f"{clients:3} clients  {who:21} {each['tokens_per_second']:8,.0f} tokens/s, first token "
            f"{first['p50'] * 1e3:.1f} / {first['p99'] * 1e3:.1f} ms{behind} (p50 / p99), "
            f"{each['cpu_seconds_per_1000_tokens']:.2f} CPU s for 1000 tokens",
            flush=True,
        )


def run(
    setting: Setting,
    contenders: Mapping[str, Service],
    words: Sequence[str],
    folder: Path,
    *,
    clients: Sequence[int],
    num_blocks: int,
    num_requests: int,
    num_conversations: int,
) -> dict[str, Any]:
    """Returns what was measured. folder: where the servers' logs go. num_conversations 0: none are held."""
    prompts = Prompts(words, setting.prompt)
    found, conversations = {}, {}
    with Contest(contenders, folder) as servers:
        asked = [[prompts.turn(0, index)] for index in range(NUM_CHECKED)]
        require_equal_answers(
            servers.turns(lambda server: [first_answer(server, turns, setting.new_tokens) for turns in asked])
        )
        for count in clients:
            found[count] = measure(
                servers, prompts, setting.new_tokens, clients=count, num_blocks=num_blocks, num_requests=num_requests
            )
            show(found[count], count)
        if num_conversations:
            conversations = measure_conversations(servers, prompts, num_conversations=num_conversations)
    ahead = {count: ratios(each) for count, each in found.items()}
    return {
        "contenders": found,
        "ratio": ahead,
        "conversations": {"turns": NUM_TURNS, "answer": TURN_ANSWER, "contenders": conversations},
        "goals": list(goals(ahead, conversations)),
        "failed": servers.failed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.serve", description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="tiny")
    parser.add_argument("--list", action="store_true", help="show the settings and end")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16], help="that ask at once")
    parser.add_argument("--contenders", nargs="+", choices=(OURS, *PEERS), default=[OURS, *PEERS])
    parser.add_argument("--blocks", type=int, default=7, help="turns of every contender, 5 at least")
    parser.add_argument("--requests", type=int, default=32, help="of a block, all clients together")
    note = "hold conversations as well: so many, after one that warms up (default of the flag: 5)"
    parser.add_argument("--sessions", type=int, nargs="?", default=0, const=5, metavar="N", help=note)
    contest.add_peer_python(parser)
    parser.add_argument("--output", type=Path, help="default: results/serve_SETTING.json; a page lies beside it")
    args = parser.parse_args(arguments)
    if args.list:
        for name, (model, prompt, new_tokens) in SETTINGS.items():
            print(f"{name:10} {model.num_layers} x {model.d_model}, {prompt} words + {new_tokens} tokens")
        return
    if args.blocks < 5:
        parser.error(f"--blocks {args.blocks}: a median of fewer than 5 turns says little")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers do not outlive this process
    # This process looks at the card as well, and must leave it to the contenders.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    about, setting = record.environment(), SETTINGS[args.setting]
    peer_packages = contest.packages_of(args.peer_python) if set(args.contenders) & set(PEERS) else {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        made = word_model(setting.model)
        write_folder(made, folder)
        everyone = services(folder, slots=max(args.clients), peer_python=args.peer_python)
        measured = run(
            setting,
            {who: everyone[who] for who in args.contenders},
            made.words,
            Path(root),
            clients=args.clients,
            num_blocks=args.blocks,
            num_requests=args.requests,
            num_conversations=args.sessions,
        )
    result = {
        "what": "greedy chat completions, streamed, of servers over the same weights, in interleaved blocks",
        "setting": {"name": args.setting, **setting._asdict(), "model": dataclasses.asdict(setting.model)},
        "formula": "tokens per second of a block = new tokens / seconds from its first request to its last token; "
        "ratio = the peer's seconds (per token, until the first token, ...) / ours",
        **about,
        "load_after": round(os.getloadavg()[0], 2),
        "peer_packages": peer_packages,
        "blocks": args.blocks,
        "requests_per_block": args.requests,
        **measured,
    }
    print("\n".join(result["goals"]))
    output = args.output or record.RESULTS / f"serve_{args.setting}.json"
    record.write(output, result)
    write(output.parent, "Our server beside transformers serve", sections(result), name=output.stem)
    if OURS in result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
