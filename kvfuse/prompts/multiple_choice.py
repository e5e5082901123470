"""The form of multiple-choice questions and answers, which training data, evaluation tasks and controls share."""

from kvfuse.prompts.messages import Prompt, as_chat

ANSWER_STEM = "The correct answer is"
"""Begins the sentence that a prompt asks for; a letter ends it."""


def without_choices(prompt: Prompt) -> Prompt:
    """Returns a multiple-choice prompt without its options; any other prompt stays as it is."""
    *before, last = as_chat(prompt)
    question = str(last["content"]).partition("\n\nChoices:\n")[0]
    return [*before, {**last, "content": question.removeprefix("Question: ")}]
