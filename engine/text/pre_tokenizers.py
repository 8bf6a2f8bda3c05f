"""How text is cut before BPE merges, by the name a GGUF file gives in `tokenizer.ggml.pre`.

Called by `gguf_tokenizer`. A table without state. A name that is not in it is refused, never
replaced by a default: a wrong cut still yields fluent text, only of lower quality, which nobody
would notice. Source: the `pre_tokenizer` of the models' own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, pre_tokenizers

_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut text.

    `pattern` None is the GPT-2 pattern, which the tokenizers library has built in.
    `adds_bos` is the default for files that do not say `tokenizer.ggml.add_bos_token`.
    """

    pattern: str | None = None
    splits_digits: bool = False
    ignores_merges: bool = False  # a cut that is a token as a whole is taken without merging
    is_nfc: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the tokenizers object; its pieces are in the byte-level alphabet."""
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.splits_digits else []
        if self.pattern is None:
            steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        else:
            steps = [
                *digits,
                pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        return pre_tokenizers.Sequence(steps)


_GPT2_FAMILY: Final = PreTokenizer()
_DIGITS_THEN_GPT2: Final = PreTokenizer(splits_digits=True)
_LLAMA3_FAMILY: Final = PreTokenizer(_LLAMA3, ignores_merges=True, adds_bos=True)

PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    "gpt-2": _GPT2_FAMILY,
    "phi-2": _GPT2_FAMILY,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "qwen2": PreTokenizer(_QWEN2, is_nfc=True),
    "qwen35": PreTokenizer(_QWEN35, is_nfc=True),
    # The Qwen vocabulary under DeepSeek's own tokenizer.json, which has no normaliser.
    "deepseek-r1-qwen": PreTokenizer(_QWEN2, adds_bos=True),
    "llama-bpe": _LLAMA3_FAMILY,
    "llama3": _LLAMA3_FAMILY,
    "llama-v3": _LLAMA3_FAMILY,
    "tekken": PreTokenizer(_TEKKEN, ignores_merges=True, adds_bos=True),
}
