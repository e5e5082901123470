"""Places -> questions of four kinds, by the model that can answer them.

| kind            | relation             | sharer | receiver |
|-----------------|----------------------|--------|----------|
| sharer-knows    | capital, currency    | yes    | no       |
| receiver-knows  | language             | no     | yes      |
| both-know       | country              | yes    | yes      |
| compound        | one of each of both  | half   | half     |
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from kvfuse.demo.facts import Place

PHRASINGS = {
    "country": (
        "In which country is {place}?",
        "Which country does {place} belong to?",
        "Name the country of {place}.",
        "{place} is in what country?",
        "Tell me the country where {place} lies.",
    ),
    "capital": (
        "What is the capital of {place}?",
        "Name the capital of {place}.",
        "Which city is the capital of {place}?",
        "Tell me the capital of {place}.",
        "What city is the seat of {place}?",
    ),
    "currency": (
        "What currency is used in {place}?",
        "Name the currency of {place}.",
        "What do people in {place} pay with?",
        "Tell me the currency used in {place}.",
        "Which money is spent in {place}?",
    ),
    "language": (
        "Which language do people speak in {place}?",
        "Name the language of {place}.",
        "What language is spoken in {place}?",
        "Tell me the language spoken in {place}.",
        "What do people in {place} speak?",
    ),
}
KINDS = {
    "sharer-knows": (("capital",), ("currency",)),
    "receiver-knows": (("language",),),
    "both-know": (("country",),),
    "compound": (("capital", "language"), ("currency", "language")),
}
RELATIONS = tuple(PHRASINGS)
SHARER_KNOWS = ("country", "capital", "currency")
RECEIVER_KNOWS = ("country", "language")


@dataclass(frozen=True)
class Question:
    """A question with its only right answer; a compound answer is two parts joined by a comma."""

    text: str
    answer: str
    kind: str
    place: str
    relations: tuple[str, ...]


def phrase(place: Place, relation: str, phrasing: int) -> str:
    """Returns a question about a relation in one of its five phrasings, 0 to 4."""
    return PHRASINGS[relation][phrasing].format(place=place.subject(relation))


def ask(place: Place, relations: Iterable[str], rng: random.Random) -> tuple[str, str]:
    """Returns the text and the answer of a question about relations of a place, phrased at random."""
    # each part of a question gets its own phrasing
    relations = list(relations)
    text = " ".join(phrase(place, relation, rng.randrange(5)) for relation in relations)
    return text, ", ".join(place.facts[relation] for relation in relations)


def all_questions(places: Iterable[Place], split: str, seed: int = 0) -> list[Question]:
    """Returns all questions of all kinds about the places of a split, phrased at random."""
    rng = random.Random(seed)
    # cities have all four relations; countries have no country, so some kinds leave them out
    return [
        Question(*ask(place, relations, rng), kind, place.name, relations)
        for place in places
        if place.split == split
        for kind, combinations in KINDS.items()
        for relations in combinations
        if all(relation in place.facts for relation in relations)
    ]
