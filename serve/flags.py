"""The flags of `python -m serve`, and those that `serve.chat` and `serve.bench` have too, in groups."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from serve.operation.keys import check_origin

DESCRIPTION = "An OpenAI-compatible server of one model, on this machine only unless --host says otherwise."
OF_TEXT = (
    *("grpc_port", "max_embedding", "kv", "paged_attention", "replicas", "max_batch", "host_memory", "num_pages"),
    *("page_size", "mode", "max_pause", "adapter", "adapter_root", "max_adapters", "adapter_rank", "speculate"),
    *("drafts", "max_sessions", "session_seconds", "max_responses", "response_seconds", "response_memory"),
)
"""Flags of what draws text, of which a reward model has nothing."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the server."""
    parser = argparse.ArgumentParser(
        prog="python -m serve", usage="%(prog)s MODEL [flags]; --help lists them", description=DESCRIPTION
    )
    _add_address(parser.add_argument_group("where it answers, and what of"))
    add_model_flags(parser)
    _add_doors(parser.add_argument_group("who may ask, and for what"))
    _add_limits(parser.add_argument_group("how much it takes on"))
    _add_keepers(parser.add_argument_group("what is kept for clients, until the server ends"))
    _add_log(parser.add_argument_group("the log"))
    return parser


def given(args: argparse.Namespace, parser: argparse.ArgumentParser, names: Iterable[str]) -> list[str]:
    """The flags among `names` that ask for something else than they do where they are left out."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]


def _add_address(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument(
        "--grpc-port",
        type=int,
        metavar="PORT",
        help="answer the KServe v2 protocol over gRPC there as well (Triton has 8001); over HTTP it is at /v2 anyway",
    )
    group.add_argument("--name", help="model name that clients give (default: the last part of MODEL)")
    group.add_argument("--no-web", dest="web", action="store_false", help="no chat page at / (default: it is there)")
    group.add_argument(
        "--max-embedding",
        type=count_or_none,
        metavar="TOKENS",
        help="of a text for /v1/embeddings: what they need is left free beside the cache (default: as --max-context; "
        "0: no vectors, and all of it for the cache)",
    )
    group.add_argument(
        "--condition",
        action="append",
        type=_named("TEXT"),
        default=[],
        metavar="NAME=TEXT",
        help="of a reward model: a system prompt that says what counts, chosen by name; may be given several times",
    )


def _add_keepers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-sessions",
        type=count_or_none,
        default=256,
        metavar="N",
        help="conversations held for clients (%(default)s)",
    )
    group.add_argument(
        "--session-seconds",
        type=_seconds,
        default=3600.0,
        metavar="S",
        help="a session goes when it was not used for so long (%(default)g)",
    )
    group.add_argument(
        "--max-responses",
        type=count_or_none,
        default=1024,
        metavar="N",
        help="responses kept for clients (%(default)s)",
    )
    group.add_argument(
        "--response-seconds",
        type=_seconds,
        default=86400.0,
        metavar="S",
        help="a response goes when it was not used for so long (%(default)g)",
    )
    group.add_argument(
        "--response-memory",
        type=_gib,
        default=0.25,
        metavar="GIB",
        help="for all responses with what was said before; of responses and sessions, the API key that holds most "
        "gives way (%(default)g)",
    )


def _add_doors(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="clients must send it, or one of several, as bearer token; other users of this machine can see it here "
        "(default: none is needed)",
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one in a line, that only you can read")
    group.add_argument(
        "--allow-origin",
        action="append",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="pages of this origin (https://chat.example.org) may ask from a browser (default: none)",
    )
    group.add_argument(
        "--adapter-root",
        type=Path,
        metavar="DIR",
        help="clients may load and unload adapters that lie below this folder, while there is room (--max-adapters)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-concurrent",
        type=count,
        metavar="N",
        help="requests worked on at once (default: 256, or twice what the slots hold, if that is more)",
    )
    group.add_argument(
        "--max-waiting", type=count_or_none, default=256, metavar="N", help="behind them; more get 429 (%(default)s)"
    )
    group.add_argument("--max-body", type=_mib, default=16, metavar="MIB", help="of a request (default: %(default)s)")
    group.add_argument(
        "--body-seconds", type=_seconds, default=60, metavar="S", help="for a request to come in (%(default)s)"
    )
    group.add_argument(
        "--drain-seconds", type=_seconds, default=10, metavar="S", help="for answers under way at the end (%(default)s)"
    )
    group.add_argument(
        "--stuck-seconds",
        type=_seconds,
        default=120,
        metavar="S",
        help="without a sign of life of an engine that has work, until /health says so (%(default)s)",
    )


def _add_log(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="of stderr (%(default)s)")
    group.add_argument(
        "--log-prompts", action="store_true", help="the log has the beginning of bodies (default: never)"
    )


def add_model_flags(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """What `python -m serve`, `serve.chat` and `serve.bench` share. nargs: of MODEL; "?" where there is another way."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=nargs,
        help="Hugging Face folder, adapter folder, BASE+ADAPTER, run folder, RUN@STEP, hf:ORG/NAME",
    )
    _add_weights(parser.add_argument_group("the model"))
    _add_answers(parser.add_argument_group("its answers"))
    _add_cache(parser.add_argument_group("the cache"))
    _add_adapters(parser.add_argument_group("adapters"))
    _add_drafts(parser.add_argument_group("speculation"))


def _add_weights(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--quantize",
        choices=("int8", "int4", "nf4"),
        help="weights to nearest in 8 or 4 bits, in memory; nf4: as QLoRA has them (default: as stored; serve.quantize "
        "loses less)",
    )
    group.add_argument("--allow-unknown", nargs="+", default=(), metavar="FIELD", help="of config.json, left unread")
    kernels = "kernels of {}: mosaic is for one NVIDIA GPU of the Hopper generation (default: xla)"
    for flag, what in (("--paged-attention", "attention over the cache"), ("--quant-matmul", "products with int4")):
        group.add_argument(flag, choices=("xla", "mosaic"), default="xla", help=kernels.format(what))
    group.add_argument("--tensor", type=count, default=1, metavar="N", help="devices that share the model (default: 1)")
    group.add_argument(
        "--replicas",
        type=count,
        default=1,
        metavar="N",
        help="copies of the model that share the requests, each on its own --tensor devices (default: 1)",
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-context", type=count, metavar="TOKENS", help="prompt and answer together (default: as trained)"
    )
    group.add_argument(
        "--max-batch", type=count, default=8, metavar="N", help="answers at once, each replica (default: %(default)s)"
    )
    group.add_argument(
        "--mode",
        choices=("fast", "exact"),
        default="fast",
        help="exact: an answer is bit by bit the same in any company (default: %(default)s)",
    )
    group.add_argument(
        "--max-pause",
        type=_milliseconds,
        default=2,
        metavar="MS",
        help="tokens come one by one where several at once would take longer than this after those before "
        "(%(default)g)",
    )


def _add_cache(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kv",
        choices=("float32", "bfloat16", "float16", "int8", "int4"),
        help="key/value cache (default: as computed)",
    )
    group.add_argument(
        "--num-pages",
        type=count,
        metavar="N",
        help="pages of the cache (default: what --memory-fraction leaves; on a CPU, all answers at full context)",
    )
    group.add_argument("--page-size", type=count, default=16, metavar="TOKENS", help="of a page (default: %(default)s)")
    group.add_argument(
        "--memory-fraction",
        type=_fraction,
        help="of a GPU's memory, for weights, cache and work (default: XLA_PYTHON_CLIENT_MEM_FRACTION, or 0.9)",
    )
    group.add_argument(
        "--host-memory",
        type=_gib,
        default=0,
        metavar="GIB",
        help="of this machine, for pages that the cache has no room for: they come back instead of being computed anew",
    )


def _add_adapters(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter",
        action="append",
        type=_named("FOLDER"),
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter of this model, chosen by name; may be given several times",
    )
    group.add_argument(
        "--max-adapters", type=count_or_none, metavar="N", help="room for so many (default: those given)"
    )
    group.add_argument(
        "--adapter-rank", type=count, metavar="R", help="largest rank there is room for (default: of those given)"
    )


def _add_drafts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--speculate",
        metavar="lookup|MODEL",
        help="try several tokens at once: what followed the last ones before, or what a smaller model says",
    )
    group.add_argument("--drafts", type=count, metavar="N", help="tokens tried at once with --speculate (default: 4)")


def _number(text: str, read: Callable[[str], float], wanted: str, is_right: Callable[[float], bool]) -> float:
    try:
        value = read(text)
    except ValueError:
        value = None
    if value is None or not is_right(value):
        raise argparse.ArgumentTypeError(f"{wanted}, given {text}")
    return value


def count(text: str) -> int:
    return _number(text, int, "a whole number of 1 or more", lambda value: value >= 1)


def count_or_none(text: str) -> int:
    return _number(text, int, "a whole number of 0 or more", lambda value: value >= 0)


def _seconds(text: str) -> float:
    return _number(text, float, "seconds over 0", lambda value: 0 < value < float("inf"))


def _milliseconds(text: str) -> float:
    return _number(text, float, "milliseconds over 0", lambda value: 0 < value < float("inf"))


def _mib(text: str) -> float:
    return _number(text, float, "MiB in (0, 1024]", lambda value: 0 < value <= 1024)


def _gib(text: str) -> float:
    return _number(text, float, "GiB, 0 or more", lambda value: 0 <= value < float("inf"))


def _fraction(text: str) -> float:
    return _number(text, float, "a share of the memory in (0, 1]", lambda value: 0 < value <= 1)


def _named(what: str) -> Callable[[str], tuple[str, str]]:
    def read(text: str) -> tuple[str, str]:
        name, _, rest = text.partition("=")
        if not (name and rest):
            raise argparse.ArgumentTypeError(f"NAME={what}, given {text!r}")
        return name, rest

    return read


def _origin(text: str) -> str:
    try:
        return check_origin(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
