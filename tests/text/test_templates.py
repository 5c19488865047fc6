"""Other families' chat templates: the rendered text and what is learned of it, token by token, by hand."""

import json
from itertools import groupby

import pytest

from internjax.text import chat
from internjax.text import tokenizer as tok
from internjax.text.chat import Message, ToolCall
from tests.text.chat_templates import FAMILIES

WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
DECLARED = {"type": "function", "function": WEATHER}
SYSTEM = Message("system", "Be short.")
TALK = [
    Message("user", "Hi."),
    Message("assistant", "Hello."),
    Message("user", "Bye."),
    Message("assistant", "So long."),
]
TOOL_TALK = [
    chat.tools_message([WEATHER]),
    Message("user", "Rain?"),
    Message("assistant", "", call=ToolCall("plugin", '{"name": "weather", "parameters": {"city": "Brno"}}')),
    Message("environment", '"dry"', name="plugin"),
    Message("assistant", "No."),
]

# Each sample with what is learned between ⟦ and ⟧.
PLAIN = {
    "llama3.1": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe short.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦So long.<|eot_id|>⟧"
    ],
    "qwen2.5": [
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nBye.<|im_end|>\n"
        "<|im_start|>assistant\n⟦So long.<|im_end|>⟧\n"
    ],
    "qwen3": [
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n",
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSo long.<|im_end|>⟧\n",
    ],
    "internlm2.5": [
        "<s><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nBye.<|im_end|>\n"
        "<|im_start|>assistant\n⟦So long.<|im_end|>⟧\n"
    ],
    # These close no turn: what the model is to say at its end is the next turn's marker, or EOS.
    "baichuan2": [
        "Be short.<reserved_106>Hi.<reserved_107>⟦Hello.<reserved_106>⟧Bye.<reserved_107>⟦So long.</s>⟧",
    ],
    "chatglm3": [
        "[gMASK]sop<|system|>\n Be short.<|user|>\n Hi.<|assistant|>⟦\n Hello.<|user|>⟧\n Bye."
        "<|assistant|>⟦\n So long.</s>⟧",
    ],
    "glm4": [
        "[gMASK]<sop><|system|>\nBe short.<|user|>\nHi.<|assistant|>⟦\nHello.<|user|>⟧\nBye."
        "<|assistant|>⟦\nSo long.<|endoftext|>⟧",
    ],
}
_QWEN_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    f"signatures within <tools></tools> XML tags:\n<tools>\n{json.dumps(DECLARED)}\n</tools>\n\nFor each function "
    "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nRain?<|im_end|>\n"
)
_QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Brno"}}\n</tool_call><|im_end|>'
_QWEN_RESULT = '<|im_start|>user\n<tool_response>\n"dry"\n</tool_response><|im_end|>\n'
_QWEN_OWN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
_MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Brno"}, "id": "call00002"}]</s>'
TOOLS = {
    "llama3.1": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{json.dumps(DECLARED, indent=4)}\n\nRain?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "weather", "parameters": {"city": "Brno"}}<|eot_id|>⟧'
        r'<|start_header_id|>ipython<|end_header_id|>' "\n\n" r'"\"dry\""<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧"
    ],
    "qwen2.5": [
        f"{_QWEN_OWN}{_QWEN_HEAD}<|im_start|>assistant\n⟦{_QWEN_CALL}⟧\n{_QWEN_RESULT}"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n"
    ],
    "qwen3": [
        f"<|im_start|>system\n{_QWEN_HEAD}<|im_start|>assistant\n⟦<think>\n\n</think>\n\n{_QWEN_CALL}⟧\n",
        f"<|im_start|>system\n{_QWEN_HEAD}<|im_start|>assistant\n{_QWEN_CALL}\n{_QWEN_RESULT}"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nNo.<|im_end|>⟧\n",
    ],
    "mistral": [
        f"<s>[AVAILABLE_TOOLS] {json.dumps([DECLARED])}[/AVAILABLE_TOOLS][INST] Rain?[/INST]⟦{_MISTRAL_CALL}⟧"
        '[TOOL_RESULTS] {"content": "dry", "call_id": "call00002"}[/TOOL_RESULTS]⟦ No.</s>⟧'
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return tok.train_tokenizer(["user assistant system the weather of a city"] * 3, vocab_size=420)


@pytest.fixture(scope="module")
def family(base):
    """name -> the base tokenizer with the family's markers in its spare ids, and its template."""
    spare = sorted(number for text, number in base.special.items() if text.startswith("[UNUSED") and text != tok.REWARD)
    assert len(spare) > 20

    def make(name):
        found = FAMILIES[name]
        markers = [text for text in dict.fromkeys((*found.specials, found.bos, found.eos)) if text]
        markers = [text for text in markers if text not in base.special]
        if name != "internlm2.5":  # only its tokenizer has these
            markers += ["[NONE_1]", "[NONE_2]"]
            spare_here = [*spare[: len(markers) - 2], base.special["<|action_start|>"], base.special["<|plugin|>"]]
        else:
            spare_here = spare
        added = {str(number): {"content": text, "special": True} for number, text in zip(spare_here, markers)}
        config = dict(base.config) | {"added_tokens_decoder": added, "eos_token": found.eos, "bos_token": found.bos}
        return tok._build(base.source, config | {"pad_token": found.eos}, found.template)

    return make


def marked(samples, tokenizer):
    texts = []
    for sample in samples:
        pieces = []
        for learned, run in groupby(zip(sample.ids, sample.mask, strict=True), key=lambda pair: pair[1]):
            text = tokenizer.decode([token for token, _ in run], skip_special=False)
            pieces.append(f"⟦{text}⟧" if learned else text)
        texts.append("".join(pieces))
    return texts


@pytest.mark.parametrize("name", PLAIN)
def test_a_conversation_of_every_family(name, family):
    tokenizer = family(name)
    assert marked(chat.render_samples([SYSTEM, *TALK], tokenizer), tokenizer) == PLAIN[name]


@pytest.mark.parametrize("name", TOOLS)
def test_tool_turns_where_a_template_has_them(name, family):
    """The call is learned, the tool's declaration and its result are not."""
    tokenizer = family(name)
    assert marked(chat.render_samples(TOOL_TALK, tokenizer), tokenizer) == TOOLS[name]


def test_every_marker_is_one_token_and_prompts_are_prefixes(family):
    """What is generated behind the prompt stands where it was learned, in every family, turn by turn."""
    for name in PLAIN:
        tokenizer = family(name)
        samples = chat.render_samples([SYSTEM, *TALK], tokenizer)
        for turn, stop in enumerate((2, 4)):
            prompt = chat.render([SYSTEM, *TALK][:stop], tokenizer, add_generation_prompt=True)
            sample = samples[turn if len(samples) > 1 else 0]
            assert sample.ids[: len(prompt.ids)] == prompt.ids, name
            # In a sample of its own no other turn is learned.
            assert not any(sample.mask[: len(prompt.ids)]) or (len(samples) == 1 and turn == 1), name
            assert sample.mask[len(prompt.ids)] == 1, name
        ends = {
            sample.ids[at]
            for sample in samples
            for at in range(len(sample.ids))
            if sample.mask[at] and not [*sample.mask, 0][at + 1]
        }
        assert ends <= set(chat.stop_ids(tokenizer)), name


def test_mistral(family):
    tokenizer = family("mistral")
    assert marked(chat.render_samples(TALK, tokenizer), tokenizer) == [
        "<s>[INST] Hi.[/INST]⟦ Hello.</s>⟧[INST] Bye.[/INST]⟦ So long.</s>⟧"
    ]
    # The tools stand before the last question, so each turn is rendered as it was asked for.
    later = [*TOOL_TALK, Message("user", "Sure?"), Message("assistant", "Yes.")]
    samples = marked(chat.render_samples(later, tokenizer), tokenizer)
    assert [text.count("[AVAILABLE_TOOLS]") for text in samples] == [1, 1, 1]
    assert samples[2].startswith(f"<s>[INST] Rain?[/INST]{_MISTRAL_CALL}") and samples[2].endswith(
        "[INST] Sure?[/INST]⟦ Yes.</s>⟧"
    )
    assert [text.count("⟦") for text in samples] == [1, 1, 1]
    # It shows the system's text only while the last turn is the user's: no answer can be told from its prompt.
    with pytest.raises(
        ValueError, match=r"prompt for turn 2 ends 'Be short.*so what the assistant says cannot be told"
    ):
        chat.render_samples([SYSTEM, *TALK], tokenizer)


def test_thoughts_are_learned_where_they_stand_last(family):
    tokenizer = family("qwen3")
    thinking = [TALK[0], Message("assistant", "<think>\nA greeting.\n</think>\n\nHello."), *TALK[2:]]
    first, second = marked(chat.render_samples(thinking, tokenizer), tokenizer)
    assert first.endswith("assistant\n⟦<think>\nA greeting.\n</think>\n\nHello.<|im_end|>⟧\n")
    assert "A greeting" not in second and second.endswith("⟦<think>\n\n</think>\n\nSo long.<|im_end|>⟧\n")
    (only,) = chat.render_samples(thinking, tokenizer, learned=[False, False, False, True])
    assert marked([only], tokenizer) == [second]
    # Serving needs no mask: the prompt of a rewritten conversation is rendered.
    prompt = chat.render(thinking[:3], tokenizer, add_generation_prompt=True)
    assert not any(prompt.mask) and "A greeting" not in marked([prompt], tokenizer)[0]


def test_templates_without_tools_are_refused_for_them(family):
    for name in ("glm4", "baichuan2"):
        with pytest.raises(ValueError, match=r"leaves the tools weather out of the text|refuses this conversation"):
            chat.render_samples(TOOL_TALK, family(name))


def test_generation_blocks_decide_and_are_counted(base):
    def with_template(template):
        return tok._build(base.source, dict(base.config), template)

    turn = (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}"
    )
    tokenizer = with_template("{% for m in messages %}" + turn + "{% endif %}|{% endfor %}")
    samples = chat.render_samples(TALK, tokenizer, learned=[False, False, False, True])
    assert marked(samples, tokenizer) == ["Hi.|Hello.</s>|Bye.|⟦So long.</s>⟧|"]
    once = with_template("{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
                         "{% else %}{{ m.content }}{% endif %}{% endfor %}")  # fmt: skip
    with pytest.raises(ValueError, match=r"has 2 assistant turns, and .* blocks mark 1; put one around"):
        chat.render_samples(TALK, once)
    nothing = with_template("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(ValueError, match=r"the loss mask marks 0 of \d+ tokens"):
        chat.render_samples(TALK[:2], nothing)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_renders_the_same_ids(name, family, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = family(name)
    tok.save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for talk in (TALK, TALK[:3], TOOL_TALK[1:2]):
        asked = talk[-1].role == "user"
        wanted = theirs.apply_chat_template(chat.to_openai(talk), add_generation_prompt=asked, return_dict=False)
        if asked:
            assert chat.render(talk, tokenizer, add_generation_prompt=True).ids == wanted
        else:  # behind the last turn of a template without end markers stands EOS
            ours = chat.render_samples(talk, tokenizer)[-1].ids
            assert ours in (wanted, [*wanted, tokenizer.eos_id])
