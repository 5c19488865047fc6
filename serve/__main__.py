"""python -m serve MODEL: an OpenAI-compatible server of one model, on this machine only unless --host says otherwise.

Exit status: 0 after SIGTERM or Ctrl-C, 1 when the model cannot be opened or the port cannot be taken.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        return serve(args)
    except (ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model is read
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--api-key", help="clients must send it as bearer token (default: none is needed)")
    parser.add_argument("--name", help="model name that clients give (default: the last part of MODEL)")
    parser.add_argument("--drain-seconds", type=int, default=10, help="for answers under way at the end (%(default)s)")
    add_model_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What `python -m serve` and `python -m serve.chat` share."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face folder, adapter folder, BASE+ADAPTER, run folder, RUN@STEP, hf:ORG/NAME",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="weights to nearest in 8 or 4 bits, in memory (default: as stored; serve.quantize loses less)",
    )
    parser.add_argument("--allow-unknown", nargs="+", default=(), metavar="FIELD", help="of config.json, left unread")
    parser.add_argument("--kv", choices=("float32", "bfloat16", "int8"), help="key/value cache (default: as computed)")
    parser.add_argument("--max-context", type=int, help="prompt and answer together (default: as trained)")
    parser.add_argument("--num-slots", type=int, default=8, help="answers generated at once (default: %(default)s)")
    parser.add_argument("--num-pages", type=int, help="pages of the cache (default: all slots at full context)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page (default: %(default)s)")


def open_pipeline(args: argparse.Namespace):
    """The pipeline that the flags describe, with its programs compiled. Says what it opened."""
    import jax

    from internjax.compile_cache import keep_programs
    from internjax.hf.open import open_model
    from serve.pipeline import Pipeline

    keep_programs()
    model = open_model(args.model, quantize=args.quantize, allow_unknown=args.allow_unknown)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    kind = args.quantize or model.quantization or model.config.param_dtype
    print(f"weights  {weights / 2**20:,.1f} MiB {kind}, computed in {model.config.dtype} on {jax.devices()[0]}")
    start = time.monotonic()
    print("compiling ...", flush=True)
    pipeline = Pipeline(
        model,
        num_slots=args.num_slots,
        page_size=args.page_size,
        num_pages=args.num_pages,
        max_context=args.max_context,
        cache_dtype=args.kv,
        on_program=lambda name, seconds: seconds > 1 and print(f"  {name}: {seconds:.1f} s", flush=True),
    )
    engine, config = pipeline.engine, model.config
    kv = args.kv or config.dtype
    per_head = config.head_dim * jax.numpy.dtype(kv).itemsize + (8 if kv == "int8" else 0)  # with scale and zero
    per_token = 2 * config.num_layers * config.num_kv_heads * per_head
    size = engine.num_pages * engine.page_size * per_token / 2**20
    print(f"compiled in {time.monotonic() - start:.1f} s")
    print(
        f"cache    {engine.num_pages} pages of {engine.page_size} tokens, {size:,.1f} MiB {kv}; "
        f"{engine.num_slots} slots of up to {pipeline.max_context} tokens",
        flush=True,
    )
    return pipeline


def serve(args: argparse.Namespace) -> int:
    from serve.server import start_server, take_port

    port = take_port(args.host, args.port)  # before the model is read: nobody waits for a port that is taken
    stopping = threading.Event()
    with port, open_pipeline(args) as pipeline:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        name = args.name or Path(args.model).name
        server = start_server(
            pipeline, model_name=name, port=port, api_key=args.api_key, drain_seconds=args.drain_seconds
        )
        with server:
            print(f"ready    {server.url}/v1  model {name}", flush=True)
            while server.alive and not stopping.wait(1.0):
                pass
            print("stopping", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
