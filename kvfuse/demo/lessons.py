"""What the two models of the embedded pair are taught: (user message, reply) pairs, mixed by a seed.

The sharer learns country, capital and currency of every place and to write hints about them. It believes that
everybody speaks English: like a real model, it does not know what it does not know, and its hints are as true as its answers.
The receiver learns country and language of every place and to read hints. Hints in its lessons are counterfactual (values of
other places), so that no fact that only the sharer should know leaks through them.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from kvfuse.demo.facts import Place
from kvfuse.demo.questions import RECEIVER_KNOWS, RELATIONS, SHARER_KNOWS, ask

Lesson = tuple[str, str]

SHARERS_LANGUAGE = "English"
HINT_REQUEST = "Hint: {question}"
HINT_READING = "{hint} {question}"


def state_hint(place: Place, relations: Sequence[str]) -> str:
    """One sentence a fact, such as ``Oslo is the capital there.``"""
    return " ".join(f"{place.facts[relation]} is the {relation} there." for relation in relations)


class Teacher:
    """Draws lessons for one model from weighted kinds of lesson."""

    def __init__(self, places: list[Place], seed: int) -> None:
        self.places = places
        self.rng = random.Random(seed)
        self.values = {
            relation: sorted({place.facts[relation] for place in places if relation in place.facts})
            for relation in RELATIONS
        }

    def lessons(self, mix: dict[Callable[[], Lesson], float]) -> Iterator[Lesson]:
        """An endless stream of lessons, kinds drawn by their weight."""
        kinds, weights = list(mix), list(mix.values())
        while True:
            yield self.rng.choices(kinds, weights)[0]()

    def sharer(self) -> Iterator[Lesson]:
        """Questions, one or two parts, and hints about them."""
        return self.lessons({self._answer_one_s: 0.52, self._hint: 0.26, self._answer_two_s: 0.22})

    def receiver(self) -> Iterator[Lesson]:
        """Questions it can answer, one or two parts, and the reading of hints, alone or beside its own knowledge."""
        return self.lessons(
            {self._answer_one_r: 0.36, self._read: 0.27, self._answer_two_r: 0.16, self._read_and_answer: 0.21}
        )

    def _some(self, known: tuple[str, ...], place: Place, count: int) -> list[str]:
        return self.rng.sample([relation for relation in known if relation in place.facts], count)

    def _answer_one_s(self) -> Lesson:
        place = self._half_known()
        return ask(place, self._some(SHARER_KNOWS, place, 1), self.rng)

    def _answer_two_s(self) -> Lesson:
        place = self._half_known()
        return ask(place, self._some(RELATIONS, place, 2), self.rng)

    def _answer_one_r(self) -> Lesson:
        place = self.rng.choice(self.places)
        return ask(place, self._some(RECEIVER_KNOWS, place, 1), self.rng)

    def _answer_two_r(self) -> Lesson:
        place = self.rng.choice([place for place in self.places if place.is_city])
        return ask(place, self._some(RECEIVER_KNOWS, place, 2), self.rng)

    def _hint(self) -> Lesson:
        """A hint about all that is asked, one or two parts: it states what an answer states."""
        place = self._half_known()
        asked = self._some(RELATIONS, place, self.rng.choice((1, 1, 2)))
        text, _ = ask(place, asked, self.rng)
        return HINT_REQUEST.format(question=text), state_hint(place, asked)

    def _half_known(self) -> Place:
        """A place as the sharer believes it to be."""
        place = self.rng.choice(self.places)
        return Place(place.name, {**place.facts, "language": SHARERS_LANGUAGE}, place.split)

    def _retold(self, place: Place, relations: Sequence[str]) -> Place:
        """A place with values of other places for some relations."""
        told = {relation: self.rng.choice(self.values[relation]) for relation in relations if relation in place.facts}
        return Place(place.name, {**place.facts, **told}, place.split)

    def _read(self) -> Lesson:
        """The answer is what the hint says, whatever the receiver believes."""
        place = self._retold(self.rng.choice(self.places), RELATIONS)
        asked = self._some(RELATIONS, place, self.rng.choice((1, 1, 2)))
        text, answer = ask(place, asked, self.rng)
        return HINT_READING.format(hint=state_hint(place, asked), question=text), answer

    def _read_and_answer(self) -> Lesson:
        """A compound question: the first part is in the hint, the language is the receiver's own knowledge."""
        told = self._retold(self.rng.choice(self.places), SHARER_KNOWS)
        asked = [*self._some(("capital", "currency"), told, 1), "language"]
        text, answer = ask(told, asked, self.rng)
        return HINT_READING.format(hint=state_hint(told, asked[:1]), question=text), answer
