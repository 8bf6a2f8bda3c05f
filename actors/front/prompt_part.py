"""What an answer says of its own prompt: the text (`echo`) and how likely each token was.

Made by a generation, one for each prompt of which something is to be told, and shared by all of its
answers: the first of them asks the engine for the scores, the others wait for these.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cortexd.messages.inference import PromptScores
from cortexd.openai import CompletionLogprobs, PromptLogprob

if TYPE_CHECKING:
    from engine.text.text_model import TextModel


class PromptPart:
    """One prompt's text and scores.

    `text` is what the client sent, None when it sent token ids. `num_top` of each kind is -1 where
    it is not wanted: `echo_top` for the legacy lists, `map_top` for `prompt_logprobs`.
    """

    def __init__(
        self,
        text_model: TextModel,
        packed: bytes,
        text: str | None,
        *,
        is_echoed: bool,
        echo_top: int,
        map_top: int,
    ) -> None:
        self._text_model = text_model
        self._token_ids = array("i", packed)
        self._texts: dict[int, str] = {}
        self._echo_top = echo_top
        self._map_top = map_top
        self._scores = PromptScores([], [], [], [])
        self.echo = ""
        if is_echoed:
            self.echo = text_model.decode(list(self._token_ids)) if text is None else text

    def __repr__(self) -> str:
        return f"<PromptPart of {len(self._token_ids)} tokens, {len(self._scores.logprobs)} scored>"

    @property
    def wants_scores(self) -> bool:
        """Tell whether the engine has to score the prompt."""
        return max(self._echo_top, self._map_top) >= 0

    @property
    def is_complete(self) -> bool:
        """Tell whether all that is to be told is known; the first token has no score."""
        return not self.wants_scores or len(self._scores.logprobs) >= len(self._token_ids) - 1

    def push(self, scores: PromptScores) -> None:
        """Take the scores of the next tokens."""
        for name in PromptScores.__struct_fields__:
            getattr(self._scores, name).extend(getattr(scores, name))

    def echo_logprobs(self) -> CompletionLogprobs | None:
        """Return the legacy lists of an echoed prompt, None when no scores are wanted with it."""
        if self._echo_top < 0:
            return None
        scores = self._scores
        tops: list[dict[str, float] | None] = [None]
        for token_id, logprob, ids, logprobs in zip(
            self._token_ids[1:], scores.logprobs, scores.top_ids, scores.top_logprobs, strict=True
        ):
            pairs = list(zip(ids, logprobs, strict=True))[: self._echo_top]
            tops.append(
                {self._decode(each): value for each, value in [*pairs, (token_id, logprob)]}
            )
        return CompletionLogprobs(
            tokens=[self._decode(token_id) for token_id in self._token_ids],
            token_logprobs=[None, *scores.logprobs],
            top_logprobs=tops,
            text_offset=self._offsets(),
        )

    def logprob_maps(self) -> list[dict[str, PromptLogprob] | None] | None:
        """Return vLLM's `prompt_logprobs`: by token id, the token's own entry first."""
        if self._map_top < 0:
            return None
        scores = self._scores
        maps: list[dict[str, PromptLogprob] | None] = [None]
        for index, token_id in enumerate(self._token_ids[1:]):
            own = PromptLogprob(
                logprob=scores.logprobs[index],
                rank=scores.ranks[index],
                decoded_token=self._decode(token_id),
            )
            tops = zip(scores.top_ids[index], scores.top_logprobs[index], strict=True)
            entries = {str(token_id): own}
            for rank, (top_id, logprob) in enumerate(list(tops)[: self._map_top], start=1):
                entry = PromptLogprob(
                    logprob=logprob, rank=rank, decoded_token=self._decode(top_id)
                )
                entries.setdefault(str(top_id), entry)
            maps.append(entries)
        return maps

    def _offsets(self) -> list[int]:
        """Return where each token's text begins in the echoed one."""
        detokenizer = self._text_model.detokenizer(skip_special_tokens=False)
        shown = ""
        offsets = []
        for token_id in self._token_ids:
            offsets.append(len(shown))
            shown += detokenizer.push([token_id])
        shown += detokenizer.flush()
        # The tokenizer may have put a begin token before the client's text.
        start = max(shown.find(self.echo), 0)
        return [min(max(offset - start, 0), len(self.echo)) for offset in offsets]

    def _decode(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._text_model.decode([token_id])
        return text
