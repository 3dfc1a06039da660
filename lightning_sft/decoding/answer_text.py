"""The text of an answer as it grows: what is certain to stay, and where a stop string ends it.

A piece is shown only when nothing that follows can take it back. Held back are half a character,
white space at the end, what may be the beginning of a stop string, and the header or closing mark
that a model writes around its answer. All pieces together are `PromptStyle.extract`'s text.

    >>> text = AnswerText(get_style("alpaca"), stop=["\\n\\n"])
    >>> shown = "".join(text.add(tokenizer.token_bytes(token)) for token in ids) + text.finish()

This module does not import torch.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lightning_sft.data.prompts import PromptStyle


class AnswerText:
    """One answer, fed token by token.

    Args:
        style: Its header and closing mark are taken off, and white space around the answer; None
            shows the text as the model wrote it.
        stop: Texts before which the answer ends. They are looked for in what would be shown, so
            a header that the model writes itself stops nothing.
    """

    def __init__(self, style: PromptStyle | None = None, stop: Sequence[str] = ()) -> None:
        self.style = style
        self.stop = list(stop)
        self.stopped = False  # a stop string has come; nothing is shown any more
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""  # behind the header and the white space in front, once `_begun`
        self._begun = style is None
        self._shown = 0
        self._searched = 0

    def add(self, token: bytes) -> str:
        """The text that this token has made certain; often empty."""
        return self._take(self._decoder.decode(token), last=False)

    def finish(self) -> str:
        """What was held back and turns out to belong to the answer."""
        return self._take(self._decoder.decode(b"", True), last=True)

    def _take(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._text += new
        if not self._begun and not self._begin(last):
            return ""
        end = self._find_stop()
        if self.stopped or last:
            certain = self._text[:end]
            if self.style is not None:
                mark = self.style.end.strip()
                certain = certain.rstrip()
                certain = certain.removesuffix(mark).rstrip() if mark else certain
        else:
            certain = self._text[: self._certain_end()]
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        return piece

    def _begin(self, last: bool) -> bool:
        """Cut white space and the model's own header off the front, when they are complete."""
        assert self.style is not None
        text = self._text.lstrip()
        if not self.style.header_in_prompt:
            header = self.style.header.strip()
            if not last and len(text) < len(header) and header.startswith(text):
                return False
            text = text.removeprefix(header).lstrip()
        self._begun = bool(text) or last
        if self._begun:
            self._text = text
        return self._begun

    def _find_stop(self) -> int:
        """Where the text ends: at the stop string that comes first, if there is one."""
        places = [self._text.find(stop, self._searched) for stop in self.stop]
        found = [place for place in places if place >= 0]
        self.stopped = bool(found)
        longest = max(map(len, self.stop), default=1)
        self._searched = max(0, len(self._text) - longest + 1)
        return min(found, default=len(self._text))

    def _certain_end(self) -> int:
        """Up to where no later token can change what is shown."""
        text = self._text
        end = len(text) - max(
            (
                length
                for stop in self.stop
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
        if self.style is not None:
            # The closing mark may follow, white space before and behind it; both are cut off.
            mark = len(self.style.end.strip())
            end = min(end, len(text.rstrip()) - mark)
            end = len(text[: max(end, 0)].rstrip())
        return max(end, self._shown)
