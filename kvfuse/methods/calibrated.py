"""Contextual calibration: removes the receiver's letter prior, so that a gain over it is not letter bias."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from kvfuse.methods.base import Method, OptionScore, Reply, by_choice
from kvfuse.methods.single import Single
from kvfuse.prompts.messages import Prompt
from kvfuse.prompts.multiple_choice import ANSWER_STEM
from kvfuse.stages.phases import phase

OPTION_LINE = re.compile(r"^(\(?([A-Z])[.):] *)\S.*$", re.MULTILINE)
VOID_OPTION = "N/A"
ANSWER = f"{ANSWER_STEM} {{letter}}"


def letters(prompt: Prompt) -> list[str]:
    """The letters of a prompt's options, one per line, from A on without a gap."""
    found = {letter for _, letter in OPTION_LINE.findall(_last_text(prompt))}
    return list(takewhile(found.__contains__, ascii_uppercase))


def void_options(prompt: Prompt) -> Prompt:
    """The prompt with ``N/A`` as the text of every lettered option; unchanged where it has fewer than two.

    Example:
        ``"Which?\\nA. Oslo\\nB. Bern"`` becomes ``"Which?\\nA. N/A\\nB. N/A"``.
    """
    known = letters(prompt)
    if len(known) < 2:
        return prompt
    text = OPTION_LINE.sub(lambda line: line[1] + VOID_OPTION if line[2] in known else line[0], _last_text(prompt))
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


@dataclass(eq=False)
class Calibrated(Method):
    """Scores options by the log-probability that a prompt adds over a content-free one.

    Contextual calibration (Zhao et al. 2021, https://arxiv.org/abs/2102.09690): the log-probability of each option,
    minus its log-probability after a content-free prompt. By default that is the same prompt with its options voided,
    so that only the letters are left to choose by. A prompt without lettered options has no letter prior and keeps its
    scores.

    Attributes:
        reader: The receiver.
        content_free: Makes the content-free prompt; returns the prompt itself where there is nothing to remove.
        answer: The generated answer, with ``{letter}`` for the best option.
    """

    name = "calibrated"
    reader: Single
    content_free: Callable[[Prompt], Prompt] = void_options
    answer: str = ANSWER

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`; ``greedy`` is the uncalibrated reader's."""
        # 1) log-probabilities after the prompts
        scores = self.reader.score(prompts, options)
        # 2) minus those after the content-free prompts, where these differ
        content_free = [self.content_free(prompt) for prompt in prompts]
        rows = [row for row, prompt in enumerate(prompts) if content_free[row] != prompt]
        if rows:
            priors = self.reader.score([content_free[row] for row in rows], [options[row] for row in rows])
            for row, prior in zip(rows, priors, strict=True):
                scores[row] = _subtract(scores[row], prior)
        return scores

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """Name the letter with the best score; without lettered options, answer as the reader does."""
        lettered = [len(letters(prompt)) > 1 for prompt in prompts]
        return by_choice(lettered, prompts, if_false=partial(self.reader.reply, **options), if_true=self._best_letters)

    def _best_letters(self, prompts: Sequence[Prompt]) -> list[Reply]:
        # each letter is scored as the answer that names it
        texts = [[self._answer(prompt, letter) for letter in letters(prompt)] for prompt in prompts]
        with phase("receiver_prefill"):
            scored = self.score(prompts, texts)
        best = [
            max(zip(scores, options, strict=True), key=lambda option: option[0].log_likelihood)[1]
            for scores, options in zip(scored, texts, strict=True)
        ]
        return [Reply(text.strip(), 0, self._tokens_in(prompt)) for text, prompt in zip(best, prompts, strict=True)]

    def _tokens_in(self, prompt: Prompt) -> int:
        return sum(len(row.ids) for row in self.reader.tokenize([prompt, self.content_free(prompt)]))

    def _answer(self, prompt: Prompt, letter: str) -> str:
        """Plain text needs a space before the answer; a chat template ends where the answer begins."""
        space = " " if isinstance(prompt, str) and not prompt[-1:].isspace() else ""
        return space + self.answer.format(letter=letter)


def _last_text(prompt: Prompt) -> str:
    """The text of the last message; empty for content in parts, whose options are not recognised."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else ""


def _subtract(scores: Sequence[OptionScore], priors: Sequence[OptionScore]) -> list[OptionScore]:
    return [
        replace(score, log_likelihood=score.log_likelihood - prior.log_likelihood)
        for score, prior in zip(scores, priors, strict=True)
    ]
