"""python -m serve MODEL: an OpenAI-compatible server of one model, on this machine only unless --host says otherwise.

Exit status: 0 after SIGTERM or Ctrl-C, 1 when the model cannot be opened, when the port cannot be taken, or when all
engines have failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serve.flags import OF_TEXT, build_parser, given

if TYPE_CHECKING:
    from internjax.decode.device import Compiled
    from serve.server import Server

log = logging.getLogger("serve")


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        return serve(args)
    except (ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model is read
        return 130


def _speculation(args: argparse.Namespace):
    """What --speculate asks for, and the model that drafts. Prints which."""
    from internjax.decode.speculate import DraftModel, PromptLookup
    from internjax.hf.open import open_model

    if args.speculate is None:
        if args.drafts is not None:
            raise ValueError("--drafts is given without --speculate; give both, or neither")
        return None, None
    num_drafts = 4 if args.drafts is None else args.drafts
    if args.speculate == "lookup":
        print(f"drafts   {num_drafts} tokens at once, looked up in prompt and answer")
        return PromptLookup(num_drafts=num_drafts), None
    draft = open_model(args.speculate)
    print(f"drafts   {num_drafts} tokens at once, of {args.speculate}")
    return DraftModel(draft.config, num_drafts=num_drafts), draft


def open_pipeline(args: argparse.Namespace, on_program: Callable[[Compiled], None] | None = None):
    """The pipeline that the flags describe, with its programs compiled. Says what it opened and has room for.

    on_program: told of each.
    """
    return start_pipeline(open_weights(args), args, on_program)


def open_served(args: argparse.Namespace, on_program: Callable[[Compiled], None] | None = None):
    """The pipeline that the flags describe, or the scorer, where MODEL is a reward model; see `open_pipeline`."""
    model = open_weights(args)
    if model.config.head == "lm":
        if args.condition:
            raise ValueError("--condition is for a reward model, and MODEL gives text; leave it out")
        return start_pipeline(model, args, on_program)
    from serve.rest.scores import Scorer

    if wrong := given(args, build_parser(), OF_TEXT):
        raise ValueError(f"MODEL is a reward model, for which there is no {', '.join(wrong)}; leave it out")
    scorer = Scorer(model, conditions=dict(args.condition), max_context=args.max_context)
    names = ", ".join(scorer.conditions) or "none"
    print(f"scores   conversations of up to {scorer.max_context:,} tokens; conditions: {names}")
    return scorer


def open_weights(args: argparse.Namespace):
    """The Model that the flags describe, on the devices of the first replica. Says what it opened."""
    # Read when jax first meets its devices.
    if args.memory_fraction is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(args.memory_fraction)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    import jax

    from internjax.compile_cache import keep_programs
    from internjax.hf.open import open_model
    from internjax.model.quantize import Quantised
    from internjax.sharding import MeshConfig, make_mesh

    keep_programs()
    mesh, devices = None, jax.devices()
    if min(args.tensor, args.replicas) < 1 or args.tensor * args.replicas > len(devices):
        asked = f"--replicas {args.replicas} on --tensor {args.tensor} devices each"
        raise ValueError(f"{asked}: {args.tensor * args.replicas} of them, and this process sees {len(devices)}")
    if args.tensor > 1:
        mesh = make_mesh(MeshConfig(fsdp=1, tensor=args.tensor), devices[: args.tensor])
    quantize = Quantised() if args.quantize == "nf4" else args.quantize
    model = open_model(args.model, mesh=mesh, quantize=quantize, allow_unknown=args.allow_unknown)
    backends = {"paged_attention": args.paged_attention, "quant_matmul": args.quant_matmul}
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **backends))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    kind = weights_kind(model, args)
    print(f"weights  {weights / 2**20:,.1f} MiB {kind}, computed in {model.config.dtype} on {jax.devices()[0]}")
    print(f"kernels  paged attention {args.paged_attention}, products with int4 {args.quant_matmul}")
    return model


def weights_kind(model, args: argparse.Namespace) -> str:
    """How the weights of a model that was opened by the flags are held."""
    return str(args.quantize or model.quantization or model.config.param_dtype)


def start_pipeline(model, args: argparse.Namespace, on_program: Callable[[Compiled], None] | None = None):
    """A pipeline over the model, with its programs compiled. Says what it has room for. on_program: told of each."""
    from internjax.decode.sizing import embedding_bytes, page_bytes
    from serve.pipeline import Pipeline

    def tell(program: Compiled) -> None:
        if program.seconds > 1:
            print(f"  {program.name}: {program.seconds:.1f} s", flush=True)
        if on_program is not None:
            on_program(program)

    speculation, draft = _speculation(args)
    if len(adapters := dict(args.adapter)) < len(args.adapter):
        raise ValueError(f"--adapter gives a name twice: {', '.join(name for name, _ in args.adapter)}")
    start = time.monotonic()
    print("compiling ...", flush=True)
    pipeline = Pipeline(
        model,
        num_slots=args.max_batch,
        page_size=args.page_size,
        num_pages=args.num_pages,
        host_bytes=int(args.host_memory * 2**30),
        max_context=args.max_context,
        cache_dtype=args.kv,
        adapters=adapters,
        max_adapters=args.max_adapters,
        adapter_rank=args.adapter_rank,
        speculation=speculation,
        draft=draft,
        mode=args.mode,
        max_pause=args.max_pause / 1000,
        replicas=args.replicas,
        longest_embedding=getattr(args, "max_embedding", 0),  # who asks in this process has no such route
        on_program=tell,
    )
    engine, config = pipeline.engine, model.config
    kv = args.kv or config.dtype
    size = page_bytes(config, engine.page_size, kv)
    tokens = engine.num_pages * engine.page_size
    print(f"compiled in {time.monotonic() - start:.1f} s")
    print(
        f"cache    {engine.num_pages:,} pages of {engine.page_size} tokens, {engine.num_pages * size / 2**20:,.1f} MiB "
        f"{kv}: {tokens:,} tokens, or {tokens / pipeline.max_context:,.1f} conversations of {pipeline.max_context:,}",
        flush=True,
    )
    if engine.num_host_pages:
        tokens = engine.num_host_pages * engine.page_size
        print(f"host     {engine.num_host_pages:,} pages more: {tokens:,} tokens wait in this machine's memory")
    print(f"slots    {engine.num_slots} answers at once, {args.mode} mode")
    if args.replicas > 1:
        of_each = f"with such a cache and {args.max_batch} slots each"
        print(f"replicas {args.replicas} on {args.tensor} devices each, {of_each}")
    if pipeline.longest_embedding:
        work = embedding_bytes(config, pipeline.longest_embedding)
        print(f"vectors  of texts of up to {pipeline.longest_embedding:,} tokens, {work / 2**20:,.1f} MiB of work")
    if pipeline.adapters:
        print(f"adapters {', '.join(pipeline.adapters)}")
    return pipeline


def read_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys that the flags give. An error names none of them."""
    keys = list(args.api_key)
    if args.api_key_file is not None:
        try:
            lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{args.api_key_file} is not text in UTF-8; give a key in each line") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{args.api_key_file} holds no key; give one in a line, or leave --api-key-file out")
        keys += found
    if any(not key or not key.isprintable() or " " in key for key in keys):
        raise ValueError("an API key is empty, or has spaces or control characters; give printable characters")
    return tuple(keys)


def share_memory() -> None:
    """Has all threads take memory from few pools of the C library, where it is glibc.

    With pools of their own, of which there are many, each keeps what it once held: measured, a small server grew from
    600 to 1,020 MiB over 2,400 requests with long prompts among them, and with one pool from 556 to 579.
    MALLOC_ARENA_MAX, where it is set, says how many instead.
    """
    arena_max = -8  # of malloc.h
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(arena_max, 1)


def serve(args: argparse.Namespace) -> int:
    from serve.server import Server, take_grpc_port, take_port

    if args.adapter_root is not None and not (args.adapter or args.max_adapters):
        raise ValueError("--adapter-root is given, and there is room for no adapter; give --max-adapters N as well")
    share_memory()  # before there are threads
    keys, name = read_keys(args), args.name or Path(args.model).name
    stopping = threading.Event()
    with take_port(args.host, args.port) as port:  # before the model is read: nobody waits for a port that is taken
        grpc_port = None if args.grpc_port is None else take_grpc_port(args.host, args.grpc_port)
        from serve.openai import create_app, create_score_app
        from serve.operation.guards import Limits, Operation
        from serve.operation.health import Starting
        from serve.operation.request_log import log_to
        from serve.rest.kept import KeepLimits
        from serve.rest.scores import Scorer
        from serve.web import page_routes

        log_to(sys.stderr, kind=args.log_format)
        starting = Starting(name, page=page_routes() if args.web else None)
        limits = Limits(
            body_bytes=int(args.max_body * 2**20),
            body_seconds=args.body_seconds,
            max_running=args.max_concurrent or max(256, 2 * args.max_batch * args.replicas),
            max_waiting=args.max_waiting,
        )
        operation = Operation(limits, tuple(args.allow_origin), args.log_prompts, args.stuck_seconds)
        with Server(starting, port, model_name=name, drain_seconds=args.drain_seconds) as server:
            print(f"port     {server.url}/health tells how far it is", flush=True)
            if grpc_port is not None:
                server.add_grpc(grpc_port, api_keys=keys, operation=operation)
                print(f"grpc     {server.grpc_address}", flush=True)
            with open_served(args, starting.compiled) as served:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: stopping.set())
                how = {"model_name": name, "api_key": keys, "operation": operation}
                if is_text := not isinstance(served, Scorer):
                    how |= {"adapter_root": args.adapter_root, "web": args.web}
                    how["keep"] = KeepLimits(
                        args.max_sessions,
                        args.session_seconds,
                        args.max_responses,
                        args.response_seconds,
                        int(args.response_memory * 2**30),
                    )
                server.use((create_app if is_text else create_score_app)(served, **how))
                if args.web and is_text:
                    print(f"page     {server.url}/")
                # What is there now stays. To search it for garbage again stopped all answers for half a second.
                gc.collect()
                gc.freeze()
                print(f"ready    {server.url}/v1  model {name}", flush=True)
                fault = wait_until_end(server, served.fault, stopping)
                if fault is not None:
                    log.error("the server ends, to be started anew: %s", fault)
                print("stopping", flush=True)
                server.close()  # before the pipeline: answers under way may finish
    return 0 if fault is None else 1


def wait_until_end(
    server: Server, fault: Callable[[], str | None], stopping: threading.Event, *, every: float = 1.0
) -> str | None:
    """Returns None when the server is told to stop; why, when it cannot go on. Looks `every` so many seconds."""
    while not stopping.wait(every):
        if (found := fault()) is not None:
            return found
        if not server.alive:
            return "the thread that answers has ended"
    return None


if __name__ == "__main__":
    sys.exit(main())
