"""The receiver with its liking for certain answer letters taken away: what a gain over it cannot come from."""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from kvfuse.methods.base import Method, OptionScore, Reply, by_choice
from kvfuse.methods.single import Single
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.multiple_choice import ANSWER_STEM
from kvfuse.prompts.tokenized import read
from kvfuse.stages.phases import phase

OPTION_LINE = re.compile(r"^(\(?([A-Z])[.):] *)\S.*$", re.MULTILINE)
NOTHING = "N/A"


class Calibrated(Method):
    """Options are scored by how much likelier a prompt makes them than one that says nothing.

    Contextual calibration (Zhao et al. 2021, https://arxiv.org/abs/2102.09690): each option's log-probability, less that
    after a content-free prompt. Where the options of a prompt are lettered lines, it is the same prompt with ``N/A`` in all of
    them, so that a letter is the only thing to choose by. A prompt without such options stays as it is: there is no letter to like.

    Args:
        reader: The receiver.
        content_free: The prompt that says nothing; the prompt itself where nothing can be taken away.
        answer: The answer to generate, with ``{letter}``: the one that scores best.
    """

    name = "calibrated"

    def __init__(
        self,
        reader: Single,
        content_free: Callable[[Prompt], Prompt] | None = None,
        answer: str = f"{ANSWER_STEM} {{letter}}",
    ) -> None:
        self.reader, self.content_free, self.answer = reader, content_free or void_options, answer

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`; ``greedy`` is the reader's own."""
        own = self.reader.score(prompts, options)
        void = [self.content_free(prompt) for prompt in prompts]
        rows = [row for row, prompt in enumerate(prompts) if void[row] != prompt]
        priors = dict(
            zip(
                rows,
                self.reader.score([void[row] for row in rows], [options[row] for row in rows]) if rows else [],
                strict=True,
            )
        )
        return [_less(scores, priors[row]) if row in priors else scores for row, scores in enumerate(own)]

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """Give the letter that scores best, in the words of an answer; without lettered options, answer as the reader does."""
        lettered = [len(letters(prompt)) > 1 for prompt in prompts]
        return by_choice(
            lettered,
            lambda rows: self.reader.reply([prompts[row] for row in rows], **options),
            lambda rows: self._choose([prompts[row] for row in rows]),
        )

    def _choose(self, prompts: Sequence[Prompt]) -> list[Reply]:
        answers = [[self._answer(prompt, letter) for letter in letters(prompt)] for prompt in prompts]
        with phase("receiver_prefill"):
            scored = self.score(prompts, answers)
        best = [
            max(zip(scores, texts, strict=True), key=lambda pair: pair[0].log_likelihood)[1]
            for scores, texts in zip(scored, answers, strict=True)
        ]
        return [Reply(text.strip(), 0, self._tokens_in(prompt)) for text, prompt in zip(best, prompts, strict=True)]

    def _tokens_in(self, prompt: Prompt) -> int:
        return sum(len(read(one, self.reader.model.tokenizer).ids) for one in (prompt, self.content_free(prompt)))

    def _answer(self, prompt: Prompt, letter: str) -> str:
        """Plain text needs a space before it; a chat's template ends where an answer begins."""
        space = " " if isinstance(prompt, str) and not prompt[-1:].isspace() else ""
        return space + self.answer.format(letter=letter)


def letters(prompt: Prompt) -> list[str]:
    """The letters before a prompt's options, one a line: A, B, … as far as they go."""
    found = {letter for _, letter in OPTION_LINE.findall(_last(prompt))}
    return list(takewhile(found.__contains__, ascii_uppercase))


def void_options(prompt: Prompt) -> Prompt:
    """The prompt with nothing behind the letters of its options; the prompt itself where there are less than two."""
    known = letters(prompt)
    if len(known) < 2:
        return prompt
    voided = OPTION_LINE.sub(lambda line: line[1] + NOTHING if line[2] in known else line[0], _last(prompt))
    return voided if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": voided}]


def _last(prompt: Prompt) -> str:
    """What is said last; content that is no string has no options that we know of."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else ""


def _less(scores: Sequence[OptionScore], priors: Sequence[OptionScore]) -> list[OptionScore]:
    return [
        OptionScore(one.log_likelihood - prior.log_likelihood, one.greedy, one.tokens)
        for one, prior in zip(scores, priors, strict=True)
    ]
