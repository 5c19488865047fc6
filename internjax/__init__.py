"""InternJAX: data, pre-training, fine-tuning, RLHF, evaluation, quantised decoding and serving of InternLM2 in JAX.

For scripts and notebooks (everything else is imported from its room, `from internjax.train.step import make_step`):

    model = internjax.open_model("runs/tiny/sft")
    logits_BTV = internjax.logits(model, tokens_BT)
    text = internjax.generate(model, "def add(a, b):", max_new_tokens=32)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internjax.hf.generate import generate
    from internjax.hf.open import Model, logits, open_model
    from internjax.hf.save import save_model

# Loaded when first asked for, so that `import internjax` costs nothing.
_HOMES = {
    "Model": "internjax.hf.open",
    "generate": "internjax.hf.generate",
    "logits": "internjax.hf.open",
    "open_model": "internjax.hf.open",
    "save_model": "internjax.hf.save",
}

__all__ = ["Model", "generate", "logits", "open_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'internjax' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
