"""python -m serve.chat MODEL: a conversation in the terminal.

Every turn reads only what is new. /help lists the commands, /exit (or end of input) leaves, Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from serve.__main__ import open_pipeline
from serve.flags import add_model_flags


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
    parser.add_argument("--top-k", type=int, default=0, help="0: all (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="of one answer (default: what the context holds)")
    parser.add_argument("--seed", type=int, help="(default: a new one for each answer)")
    parser.set_defaults(max_batch=1)
    return parser


def converse(args: argparse.Namespace) -> int:
    from internjax.text.message import Message

    state = Conversation(params_of(args), args.system)  # before the model is read: a wrong number is refused at once
    with open_pipeline(args) as pipeline:
        state.begin(pipeline)
        print("/help lists the commands, /exit leaves, Ctrl-C stops an answer", flush=True)
        while (said := _read()) is not None:
            line = said.strip()
            if line == "/exit":
                break
            if line.startswith("/"):
                print(state.command(line), flush=True)
            elif line:
                try:
                    answer = state.session.chat(Message("user", said), state.params)
                    if state.session.notice is not None:
                        print(f"({state.session.notice})")
                    _show(answer)
                except (ValueError, RuntimeError) as error:  # of this turn: the conversation before it stays
                    print(f"({error}; /reset starts anew)")
    return 0


def params_of(args: argparse.Namespace):
    from serve.pipeline import Params

    return Params(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        adapter=None if not args.adapter else args.adapter[0][0],
    )


HELP = """\
/temperature X   0 is greedy             /top-p X   /top-k N (0: all)
/seed N          none: a new one each    /max-tokens N   none: what the context holds
/system TEXT     what the model is told first; starts anew. Without a text: nothing
/adapter NAME    of those given with --adapter; none: the model itself
/reset           forgets the conversation        /history   shows it
/save FILE       writes it, one JSON object a line, as training reads it
/exit            leaves (or the end of input); Ctrl-C stops an answer"""
_NUMBERS = {"temperature": float, "top-p": float, "top-k": int, "seed": int, "max-tokens": int}


class Conversation:
    """What the commands of the terminal change: a session, and how it is answered."""

    def __init__(self, params, system: str | None):
        self.params, self._system = params, system
        self._pipeline = self.session = None

    def begin(self, pipeline) -> None:
        """Starts anew, with what the model is told first."""
        from internjax.text.message import Message

        self._pipeline = pipeline
        self.session = pipeline.session([] if self._system is None else [Message("system", self._system)])

    def command(self, line: str) -> str:
        """Does what a line that begins with / says; returns what is printed."""
        name, _, text = line[1:].partition(" ")
        text = text.strip()
        match name:
            case "help":
                return HELP
            case "reset":
                self.begin(self._pipeline)
                return "(forgotten)"
            case "system":
                self._system = text or None
                self.begin(self._pipeline)
                return "(told; the conversation starts anew)"
            case "history":
                return "\n".join(f"[{m.role}] {m.content}" for m in self.session.messages) or "(nothing was said)"
            case "save":
                return self._save(text)
            case "adapter":
                return self._choose(text)
            case _ if name in _NUMBERS:
                return self._set(name, text)
        return f"(there is no /{name}; /help lists the commands)"

    def _set(self, name: str, text: str) -> str:
        field = name.replace("-", "_")
        if not text:
            return f"({name} is {getattr(self.params, field)})"
        try:
            value = None if text == "none" else _NUMBERS[name](text)
            self.params = replace(self.params, **{field: value})
        except (ValueError, TypeError) as error:
            return f"({error}; {name} stays {getattr(self.params, field)})"
        return f"({name} is {value})"

    def _choose(self, text: str) -> str:
        there = ", ".join(self._pipeline.adapters) or "none was given with --adapter"
        if not text:
            return f"(adapter is {self.params.adapter}; there are: {there})"
        if text not in (*self._pipeline.adapters, "none"):
            return f"(there is no adapter {text}; there are: {there})"
        self.params = replace(self.params, adapter=None if text == "none" else text)
        return f"(adapter is {text})"

    def _save(self, text: str) -> str:
        from internjax.text.message import to_openai

        if not text:
            return "(/save FILE: name a file)"
        record = {"messages": to_openai(self.session.messages)}
        try:
            with open(text, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"(not saved: {error})"
        return f"({len(record['messages'])} messages added to {text})"


def _read() -> str | None:
    """The next line, or None at the end of input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _show(answer) -> None:
    """Prints an answer as it comes, to its end."""
    from serve.pipeline import Delta

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


if __name__ == "__main__":
    sys.exit(main())
