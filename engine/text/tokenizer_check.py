"""Whether a tokenizer has the tokens that text and the model's own files need.

Called once when a text model is loaded. A tokenizer without a character's token drops it without a
word, and a model whose end token is unknown never ends: both are told, with the file.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Final

from tokenizers import Tokenizer

from cortexd.errors import BadModelFile
from cortexd.models import ModelFiles

# What no text can do without. Control characters and odd bytes are missing in some small models.
_NEEDED: Final = string.ascii_letters + string.digits + string.punctuation + " \n"


def check_tokenizer(
    files: ModelFiles, tokenizer: Tokenizer, special_tokens: Mapping[str, str]
) -> None:
    """Check that characters and the declared end token can be written. Raises: BadModelFile."""
    where = files.tokenizer or f"{files.weights[0]} tokenizer.ggml.tokens"
    end = special_tokens.get("eos_token")
    if end is not None and tokenizer.token_to_id(end) is None:
        raise BadModelFile(
            f'{files.tokenizer_config}: eos_token "{end[:80]}" is no token of {where}'
        )
    lacking = "".join(
        character
        for character in _NEEDED
        if not tokenizer.encode(character, add_special_tokens=False).ids
    )
    if lacking:
        raise BadModelFile(
            f"{where}: the tokenizer has no token for {len(lacking)} ASCII characters, such as "
            f"{lacking[0]!r}; text that holds them would be lost"
        )
