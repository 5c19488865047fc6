"""python -m serve.chat MODEL: a conversation in the terminal.

/reset forgets the conversation, /exit (or end of input) leaves, Ctrl-C stops the answer.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from serve.__main__ import add_model_flags, open_pipeline


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        return converse(args)
    except (ValueError, OSError) as error:
        print(f"serve.chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while the model is read
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.chat", description=__doc__.partition("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.9, help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="of one answer (default: what the context holds)")
    parser.add_argument("--seed", type=int, help="(default: a new one for each answer)")
    parser.set_defaults(max_batch=1)
    return parser


def converse(args: argparse.Namespace) -> int:
    from internjax.text.message import Message
    from serve.pipeline import ContextTooLong, Params

    params = Params(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )  # before the model is read: a wrong number is refused at once
    first = [] if args.system is None else [Message("system", args.system)]
    with open_pipeline(args) as pipeline:
        print("/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer", flush=True)
        messages = list(first)
        while (said := _read()) is not None:
            match said.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/reset":
                    messages = list(first)
                    print("(forgotten)")
                    continue
            try:
                reply = _answer(pipeline, [*messages, Message("user", said)], params)
            except ContextTooLong as error:
                print(f"({error}; /reset starts anew)")
                continue
            messages += [Message("user", said), reply]
    return 0


def _read() -> str | None:
    """The next line, or None at the end of input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(pipeline, messages, params):
    """The assistant's message, printed as it comes."""
    from serve.pipeline import Delta

    answer = pipeline.chat(messages, params)
    # No KeyboardInterrupt here: it would end the iteration, and with it what has been said so far.
    before = signal.signal(signal.SIGINT, lambda *_: answer.abort())
    try:
        for event in answer:
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    stopped = {"aborted": " (stopped)", "length": " (cut: the limit of tokens)"}
    print(stopped.get(answer.last.finish, ""), flush=True)
    return answer.last.message


if __name__ == "__main__":
    sys.exit(main())
