"""python -m serve.bench MODEL --output DIR: how fast a model answers, alone, in a batch, under load, in sessions.

The engine runs in this process, or is a server's (--url). What is written: DIR/bench.json, bench.csv, load.csv, and a
page bench.html (bench.md). Functions for a notebook are in serve.bench.runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from serve.__main__ import open_weights, start_pipeline, weights_kind
from serve.flags import add_model_flags, count, given

_CONTEXT = 2048
"""Context that is measured in if the flags ask for nothing else and the model was trained for as much."""
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "openai")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    _check(parser, args)
    try:
        if args.url is None:
            measure_model(args)
        else:
            measure_server(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"serve.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.bench",
        description=__doc__.partition("\n")[0],
        epilog=f"Without --max-context, the context is the largest that is asked for and at least {_CONTEXT} where the "
        "model was trained for it; without --max-batch, as many answers at once in all as the largest --batch.",
    )
    add_model_flags(parser, nargs="?")
    parser.set_defaults(max_batch=None)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--batch", type=count, nargs="*", default=[1, 8, 32], help="requests at once; none: no grid")
    parser.add_argument("--prompt", type=count, nargs="+", default=[128], help="tokens (default: %(default)s)")
    parser.add_argument("--completion", type=count, nargs="+", default=[128], help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="measured, of every cell (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="of mixed lengths; 0: none (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="arrivals of those per second, at random (default: all at once)")
    parser.add_argument("--prefix", type=count, nargs="*", default=[128, 512], help="shared tokens (%(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of a session; 0: none (default: %(default)s)")
    parser.add_argument("--turn-tokens", type=count, default=32, help="new ones of a turn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (default: %(default)s)")
    server = parser.add_argument_group("a server instead of MODEL", "the grid, the load and prefixes over HTTP")
    server.add_argument("--url", help="of an OpenAI-compatible server, with or without /v1")
    server.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"), help="(default: OPENAI_API_KEY)")
    server.add_argument("--model", dest="served", metavar="NAME", help="(default: the first that it offers)")
    server.add_argument("--last-id", type=count, default=255, help="largest token id of prompts (%(default)s)")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where flags make no sense together."""
    if (args.url is None) == (args.model is None):
        parser.error("give MODEL, which is run in this process, or --url of a server")
    if args.requests < 0 or args.turns < 0 or (args.rate is not None and not 0 < args.rate < float("inf")):
        parser.error("--requests and --turns want 0 or more, --rate a positive number")
    if args.url is None:
        if args.served is not None or args.last_id != parser.get_default("last_id"):
            parser.error("--model and --last-id are for a server's model; give its --url")
        if args.max_batch is not None and args.max_batch * args.replicas < max(args.batch, default=1):
            slots = f"--max-batch {args.max_batch} in each of --replicas {args.replicas}"
            parser.error(f"--batch {max(args.batch)} requests at once, but there is room for {slots}")
        return
    model_flags = argparse.ArgumentParser()
    add_model_flags(model_flags, nargs="?")
    names = [name for name in vars(model_flags.parse_args([])) if name != "max_context"]
    if wrong := given(args, parser, names):
        parser.error(f"{', '.join(wrong)}: for a model in this process; the server at --url has its own")


# --- what is measured ------------------------------------------------------------------------------------------------


def measure_model(args: argparse.Namespace) -> None:
    """Measures a model in this process and writes the files."""
    model = open_weights(args)
    args.max_batch = args.max_batch or -(-max(args.batch, default=8) // args.replicas)
    args.max_context = args.max_context or _context(args, model.config.max_position_embeddings)
    from internjax.train.progress import memory_in_use
    from serve.bench import runs
    from serve.bench.targets import engine_target

    with start_pipeline(model, args) as pipeline:
        engine = pipeline.engine
        target = engine_target(engine)
        _require_fitting(target, args)
        weights = runs.weight_bytes(model.params, model.config)
        bandwidth = args.replicas * args.tensor * runs.copy_bandwidth(_copied_bytes())
        kv = args.kv or model.config.dtype

        def read_bytes(batch: int, prompt: int, completion: int) -> int:
            most = -(-batch // args.replicas)  # rows of the fullest replica: the others wait for nothing else
            one = runs.step_bytes(weights, model.config, batch=most, prompt=prompt, completion=completion, kv=kv)
            return args.replicas * one

        about = {
            "what": f"{args.model}: {weights_kind(model, args)} weights, {kv} cache",
            "model": str(args.model),
            "weight_bytes": weights,
            "max_context": target.max_context,
            "memory": f"of the {memory_in_use().where}",
            **_environment(args),
        }
        _measure(args, target, about, engine=engine, slots=engine.num_slots, bandwidth=bandwidth, read_bytes=read_bytes)


def measure_server(args: argparse.Namespace) -> None:
    """Measures a server and writes the files."""
    import openai

    from serve.bench.targets import server_target

    try:
        target = server_target(args.url, model=args.served, api_key=args.api_key, last_id=args.last_id)
        target = target._replace(max_context=args.max_context)
        _require_fitting(target, args)
        about = {"what": f"the server at {args.url}, its hardware unknown to this page", **_environment(args)}
        _measure(args, target, about, engine=None, slots=None, bandwidth=None, read_bytes=None)
    except openai.OpenAIError as error:
        known = "" if args.max_context else ". --max-context N keeps what is asked for within the server's context"
        hint = known if isinstance(error, openai.BadRequestError) else ""
        raise RuntimeError(f"the server at {args.url}: {error}{hint}") from error


def _measure(
    args: argparse.Namespace,
    target: Any,
    about: dict[str, Any],
    *,
    engine: Any,
    slots: int | None,
    bandwidth: float | None,
    read_bytes: Callable[[int, int, int], int] | None,
) -> None:
    from serve.bench import runs
    from serve.bench.page import Results, Setup, write_files

    cells = list(itertools.product(args.prompt, args.completion, args.batch))
    turns = args.turns if engine is not None else 0
    total = sum(batch for *_, batch in cells) * (args.rounds + 1) + args.requests
    total += (len(args.prefix) + bool(turns)) * (args.rounds + 1)
    results = Results()
    try:
        with _progress(total) as (say, done):
            for prompt, completion, batch in cells:
                say(f"batch {batch}, {prompt} + {completion} tokens")
                results.cells.append(
                    runs.measure_cell(
                        target,
                        batch=batch,
                        prompt=prompt,
                        completion=completion,
                        rounds=args.rounds,
                        seed=args.seed,
                        bandwidth=bandwidth,
                        step_bytes=read_bytes and read_bytes(batch, prompt, completion),
                        on_done=done,
                    )
                )
            if args.requests:
                say(f"{args.requests} requests of mixed lengths")
                results.loads.append(
                    runs.measure_load(
                        target,
                        num_requests=args.requests,
                        rate=args.rate,
                        concurrency=max(args.batch, default=None) if engine is None else None,
                        max_context=target.max_context or _CONTEXT,
                        seed=args.seed,
                        on_done=done,
                    )
                )
            for prefix in args.prefix:
                say(f"a shared prefix of {prefix} tokens")
                results.prefixes.append(
                    runs.measure_prefix(target, prefix=prefix, rounds=args.rounds, seed=args.seed, on_done=done)
                )
            if turns:
                say(f"sessions of {turns} turns")
                results.turns += runs.measure_sessions(
                    engine, turns=turns, new_tokens=args.turn_tokens, rounds=args.rounds, seed=args.seed, on_done=done
                )
    finally:  # what was measured before something failed or was interrupted is not lost
        if any(vars(results).values()):
            write_files(args.output, Setup(about, slots, bandwidth), results)
            print(f"written  {args.output / 'bench.html'}, bench.md, bench.json, bench.csv")


def _context(args: argparse.Namespace, trained: int) -> int:
    """The context that everything asked for needs, and at least _CONTEXT, as far as the model was trained for it."""
    return min(trained, max(_CONTEXT, *(prompt + answer for prompt, answer, _ in _sizes(args))))


def _sizes(args: argparse.Namespace) -> list[tuple[int, int, str]]:
    """(prompt, answer, what for) of all that is asked for."""
    from serve.bench.runs import PREFIX_SUFFIX, TURN_ANSWER

    cells = itertools.product(args.prompt, args.completion) if args.batch else ()
    sizes = [(prompt, answer, "--prompt and --completion") for prompt, answer in cells]
    sizes += [(prefix + PREFIX_SUFFIX, 1, "--prefix") for prefix in args.prefix]
    if args.url is None:
        sizes += [(args.turns * (args.turn_tokens + TURN_ANSWER), 0, "--turns and --turn-tokens")]
    return sizes


def _require_fitting(target: Any, args: argparse.Namespace) -> None:
    """Raises ValueError for the first of what is asked for that passes the context, before anything is measured."""
    from serve.bench.runs import require_fitting

    for prompt, answer, what in _sizes(args):
        require_fitting(target, prompt, answer, what=what)


def _copied_bytes() -> int:
    """Far beyond every cache of the processor or the card."""
    import jax

    return 2**28 if jax.default_backend() == "cpu" else 2**30


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the command, without a key that was given."""
    import jax

    from internjax.train.tracking import versions

    told = versions()
    words = [_hidden(word, args.api_key) for word in shlex.split(told["command"])]
    devices = jax.devices()
    return {
        "command": shlex.join(words),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "python": told["python"],
        "platform": told["platform"],
        "git_commit": told["git_commit"],
        "packages": {name: told["packages"][name] for name in _PACKAGES if name in told["packages"]},
        "settings": {name: _json(value) for name, value in vars(args).items() if name != "api_key"},
    }


def _hidden(word: str, key: str) -> str:
    return word.replace(key, "***") if key not in ("", "none") else word


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Gives (say, done): say what is measured now; count one request. A bar on a terminal, lines elsewhere."""
    bar: Any = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, unit="request", dynamic_ncols=True)
    if bar is None:
        yield lambda what: print(f"measuring {what}", file=sys.stderr, flush=True), lambda: None
        return
    with bar:
        yield bar.set_description, bar.update


if __name__ == "__main__":
    sys.exit(main())
