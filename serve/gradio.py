"""python -m serve.gradio URL: a gradio page that chats with a server, ours or any that speaks OpenAI's interface.

The page is this process's, the model the server's: what is typed goes there as one request with the whole conversation,
and an answer that is stopped ends the request. The server's key, where it wants one, is OPENAI_API_KEY, and stays here.
Exit status: 0 after SIGTERM or Ctrl-C, 1 when nothing answers at URL, the port is taken or gradio is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from internjax.text.message import Message, from_openai, to_openai
from serve.client import api_address

if TYPE_CHECKING:
    import gradio
    import openai

# Gradio's page has its script and its settings in the HTML. Beyond that it is held as our own page is: what a model
# says loads nothing from elsewhere and sends nothing there.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# $$ alone is what gradio takes for a formula; models write the others.
FORMULAS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
_MODELS_SECONDS = 10.0
_ANSWER_SECONDS = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        return serve_page(args)
    except (ValueError, OSError) as error:
        print(f"serve.gradio: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the page is there
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.gradio",
        description=__doc__.partition("\n")[0],
        epilog="OPENAI_API_KEY is the server's key, where it wants one. Who reaches this page asks with it.",
    )
    parser.add_argument("url", metavar="URL", help="of a server (python -m serve MODEL prints it), with or without /v1")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="of the page; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="chosen at first (default: the first that the server offers)")
    parser.add_argument("--system", default="", help="system prompt at first (default: none)")
    of_server = "at first (default: what the server has, where the field is empty)"
    parser.add_argument("--temperature", type=float, metavar="X", help=of_server)
    parser.add_argument("--top-p", type=float, metavar="P", help=of_server)
    parser.add_argument("--max-tokens", type=int, metavar="N", help=of_server)
    return parser


def serve_page(args: argparse.Namespace) -> int:
    from serve.server import take_port

    key = os.environ.get("OPENAI_API_KEY") or "none"
    with take_port(args.host, args.port) as port:
        names = offered_models(args.url, key)
        if args.model is not None and args.model not in names:
            raise ValueError(f"--model {args.model} is not offered at {args.url}; there are: {', '.join(names)}")
        page = build_page(args, names, key)
        host, number = port.getsockname()[:2]
        print(f"ready    http://{f'[{host}]' if ':' in host else host}:{number}/  asks {args.url}", flush=True)
        return 0 if _answer_until_told(page, port) else 1


def offered_models(url: str, key: str) -> list[str]:
    """Names of the models that a server offers. Raises ValueError with what to do where it does not say."""
    import openai

    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"URL is {url}; give the address of a server, such as http://127.0.0.1:8000: `python -m serve MODEL` "
            "starts one and prints it"
        )
    try:
        with openai.OpenAI(base_url=api_address(url), api_key=key, max_retries=0, timeout=_MODELS_SECONDS) as client:
            names = [each.id for each in client.models.list().data]
    except openai.OpenAIError as error:
        raise ValueError(what_to_do(error, url)) from error
    except (ValueError, AttributeError, TypeError) as error:  # an answer, but not of such a server
        raise ValueError(f"what answers at {api_address(url)}/models is no list of models; check URL") from error
    if not names:
        raise ValueError(f"the server at {url} offers no model; load one there")
    return names


def what_to_do(error: openai.OpenAIError, url: str) -> str:
    """A failure of a request to the server, and its remedy."""
    import openai

    match error:
        case openai.APITimeoutError():
            return f"the server at {url} took too long to answer; see its /health, and ask again"
        case openai.APIConnectionError():
            return f"nothing answers at {url}, or no longer; start a server there (python -m serve MODEL), or check URL"
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return f"the server at {url} wants another key; set OPENAI_API_KEY to one of its keys, and start this anew"
        case openai.APIStatusError() if error.body is None:
            return f"the server at {url} answers {error.status_code} to {error.request.url.path}; check URL"
    told = error.body.get("message") if isinstance(getattr(error, "body", None), Mapping) else None
    return f"the server at {url} says: {told or error}"


# --- what is asked ---------------------------------------------------------------------------------------------------


def turns(history: Sequence[Mapping], said: str, system: str = "") -> list[dict]:
    """OpenAI's messages: the system prompt where there is one, gradio's history but for notes, and what is said now.

    Content of a turn is text or gradio's list of parts. Raises ValueError where one is no text.
    """
    first = [Message("system", system)] if system.strip() else []
    spoken = [each for each in history if not (each.get("metadata") or {}).get("title")]
    return to_openai([*first, *from_openai(spoken), Message("user", said)])


def note(title: str, text: str) -> dict:
    """A turn in the conversation that people read and `turns` leaves out. Text is read as HTML there."""
    return {"role": "assistant", "content": html.escape(text), "metadata": {"title": title}}


def sampling(temperature: str, top_p: str, max_tokens: str) -> dict[str, float]:
    """Fields of the request, of texts as they stand on the page. An empty one is not sent: the server has its own.

    Raises ValueError where one is no number; whether it is one that makes sense is for the server to say.
    """
    fields = {"temperature": (temperature, float), "top_p": (top_p, float), "max_tokens": (max_tokens, int)}
    found = {}
    for name, (text, kind) in fields.items():
        if text.strip():
            try:
                found[name] = kind(text)
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} is {text!r}; give {wanted}, or nothing for the server's own") from None
    return found


def answer_callable(client: openai.AsyncOpenAI, url: str) -> Callable[..., AsyncIterator[str | list]]:
    """answer(said, history, model, system, temperature, top_p, max_tokens): the answer so far, when more of it comes.

    Who leaves it early closes the connection, and with it ends the server's work. A failure is a note behind what came
    before it: an error that is raised leaves gradio's page with nothing to type into.
    """
    import openai

    async def answer(said, history, model, system, temperature, top_p, max_tokens) -> AsyncIterator[str | list]:
        text, finish = "", None
        try:
            asked = turns(history, said, system)
            fields = sampling(temperature, top_p, max_tokens)
            async with await client.chat.completions.create(
                model=model, messages=asked, stream=True, **fields
            ) as parts:
                async for part in parts:
                    for choice in part.choices:
                        finish = choice.finish_reason or finish
                        if choice.delta.content:
                            text += choice.delta.content
                            yield text
        except openai.OpenAIError as error:
            yield _failed(text, what_to_do(error, url))
        except ValueError as error:  # of a field of the page, or of what came
            yield _failed(text, str(error))
        else:
            if finish == "length":
                yield [text, note("Cut", "The answer has as many tokens as it may have.")]
            elif not text:
                yield [note("Empty", "The model ended its answer at once.")]

    return answer


def _failed(text: str, why: str) -> list:
    """Turns of an answer of which no more comes than this text."""
    return [text, note("Broken off", why)] if text else [note("No answer", why)]


# --- the page --------------------------------------------------------------------------------------------------------


def build_page(args: argparse.Namespace, names: Sequence[str], key: str) -> gradio.Blocks:
    """Gradio's page. Raises ValueError where gradio is not installed."""
    # Read when gradio is imported: it would tell of its use, and ask for a newer version of itself.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            f"gradio cannot be imported ({error}); install it in the checkout: `pip install -e '.[gradio]'`, or use "
            f"the server's own page at {args.url.removesuffix('/').removesuffix('/v1')}/"
        ) from error
    import openai

    client = openai.AsyncOpenAI(base_url=api_address(args.url), api_key=key, max_retries=0, timeout=_ANSWER_SECONDS)

    async def offered(current: str):
        """The models that there are now: adapters come and go."""
        try:
            now = [each.id for each in (await client.models.list(timeout=_MODELS_SECONDS)).data]
        except openai.OpenAIError as error:
            gradio.Warning(html.escape(what_to_do(error, args.url)))
            return gradio.skip()
        return gradio.Dropdown(choices=now, value=current if current in now else next(iter(now), None))

    def number(label: str, value: float | None) -> gradio.Textbox:
        # Not gradio's field for numbers: it shows and sends 0 where there is none.
        return gradio.Textbox("" if value is None else str(value), label=label, placeholder="the server's own")

    with gradio.Blocks(title="InternJAX", analytics_enabled=False, fill_height=True) as page:
        with gradio.Sidebar(label="How it answers"):
            model = gradio.Dropdown(list(names), value=args.model or names[0], label="Model")
            system = gradio.Textbox(args.system, label="System prompt", lines=3, placeholder="none")
            numbers = [
                number("Temperature", args.temperature),
                number("Top-p", args.top_p),
                number("Most tokens of an answer", args.max_tokens),
            ]
        gradio.ChatInterface(
            answer_callable(client, args.url),
            chatbot=gradio.Chatbot(
                show_label=False,
                scale=1,
                placeholder=f"What you write goes to {html.escape(args.url)}",
                buttons=["copy", "copy_all"],
                feedback_options=None,
                latex_delimiters=[
                    {"left": left, "right": right, "display": display} for left, right, display in FORMULAS
                ],
            ),
            additional_inputs=[model, system, *numbers],
            editable=True,
            concurrency_limit=None,
            analytics_enabled=False,
            api_name="chat",
        )
        page.load(offered, model, model, show_progress="hidden", api_visibility="private")
    return page


def application(page: gradio.Blocks, closing: asyncio.Event) -> Callable:
    """The ASGI application of a page, whose answers have `HEADERS`. Nothing is shared, uploaded or recorded.

    closing: once it is set, every reader counts as gone. Each browser holds a stream that has no end by itself.
    """
    import fastapi
    import gradio

    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=1,  # byte: the page sends no file
    )
    added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def answer(scope, receive, send) -> None:
        is_open = False

        async def receive_or_leave() -> dict[str, Any]:
            waits = [asyncio.ensure_future(each) for each in (receive(), closing.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                return waits[0].result() if waits[0].done() else {"type": "http.disconnect"}
            finally:
                for each in waits:
                    each.cancel()

        async def send_with_headers(message: dict[str, Any]) -> None:
            nonlocal is_open
            is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *added]}
            await send(message)

        if scope["type"] == "http":
            await app(scope, receive_or_leave, send_with_headers)
            if is_open and closing.is_set():
                await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    return answer


def _answer_until_told(page: gradio.Blocks, port: socket.socket) -> bool:
    """Answers at a port until SIGTERM or Ctrl-C. Returns whether that was why it ended."""
    import uvicorn

    closing = asyncio.Event()
    server = uvicorn.Server(
        uvicorn.Config(
            application(page, closing),
            ws="none",
            lifespan="on",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )

    def leave(*_) -> None:
        closing.set()
        server.should_exit = True

    server.handle_exit = leave  # what uvicorn calls at these signals, in the thread of its loop
    server.run(sockets=[port])
    print("stopping", flush=True)
    return closing.is_set()


if __name__ == "__main__":
    sys.exit(main())
