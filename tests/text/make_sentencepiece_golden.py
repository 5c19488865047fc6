"""Makes sentencepiece_mixed.json with the sentencepiece library (0.2.3): python -m tests.text.make_sentencepiece_golden

A model of InternLM2's kind (BPE, identity, byte fallback, no dummy prefix, user-defined pieces) that knows Chinese,
English and code, and the library's own ids and texts for mixed strings.
"""

import base64
import io
import json
import random
from pathlib import Path

FILE = Path(__file__).with_name("sentencepiece_mixed.json")
CORPUS = [
    "模型在训练数据上训练，然后在测试数据上评估。我们用中文和英文写代码，并且回答用户的问题。",
    "今天天气很好，我们去公园散步。大模型支持工具调用，请你帮我写一个函数，计算两个数的最大公约数。",
    "The model is trained on the training data, then it is evaluated on the test data and answers questions.",
    "def gcd(left, right):\n    while right:\n        left, right = right, left % right\n    return left\n",
    "for index in range(12):\n    print(f'{index}: {values[index]}')\n\n\nclass Model:\n    def __init__(self):\n",
] * 8
SPARE = [f"[UNUSED_TOKEN_{index}]" for index in (0, 131, 140, 145)]
TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "模型 trains 模型，print('训练')  # 计算 the data",
    "def 函数(数据):\n\treturn 数据 ** 2  # 平方 🙂\r\n",
    "👩‍👩‍👧 🇨🇳 é ñ ü 𠮷野家 𝔘 　全角　空格",
    "no piece: ♞ Ω ж ب \x00 \x7f �",
    "<s>user</s> <unk> <0x41> ▁ ▁▁ <|im_start|>",
    "".join(SPARE) + " " + "在".join(SPARE) + "[UNUSED_TOKEN_1] [UNUSED_TOKEN_14",
    "    " * 3 + "x" + " " * 7 + "y\n\n\n  z",
    "aaaaaaa ababab 训训练练训练训练 0123456789",
]


def main() -> None:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=760,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.999,
        # The piece of rewards is the one that this project never takes from a text.
        user_defined_symbols=["▁▁", "▁▁▁▁", *SPARE, "[UNUSED_TOKEN_130]"],
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    chance, texts = random.Random(0), list(TEXTS)
    for _ in range(60):
        parts = [chance.choice([*TEXTS, *CORPUS]) for _ in range(3)]
        texts.append("".join(part[(cut := chance.randrange(len(part) + 1)) : cut + 14] for part in parts))
    rows = {text: {"ids": processor.encode(text), "text": processor.decode(processor.encode(text))} for text in texts}
    golden = {"model": base64.b64encode(out.getvalue()).decode(), "rows": rows}
    FILE.write_text(json.dumps(golden, ensure_ascii=True, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
