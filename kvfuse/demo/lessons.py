"""What the two models of the embedded pair are taught: (user message, reply) pairs, mixed by a seed.

The sharer learns country, capital and currency of every place and to write hints about them. The receiver learns country
and language of every place and to read hints. Hints in the receiver's lessons are counterfactual (values of other places),
so that no fact that only the sharer should know leaks through them.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from kvfuse.demo.facts import Place
from kvfuse.demo.questions import RECEIVER_KNOWS, SHARER_KNOWS, ask

Lesson = tuple[str, str]

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
            for relation in ("country", "capital", "currency", "language")
        }

    def lessons(self, mix: dict[Callable[[], Lesson], float]) -> Iterator[Lesson]:
        """An endless stream of lessons, kinds drawn by their weight."""
        kinds, weights = list(mix), list(mix.values())
        while True:
            yield self.rng.choices(kinds, weights)[0]()

    def sharer(self) -> Iterator[Lesson]:
        """Questions it can answer, one or two parts, and hints about them."""
        return self.lessons({self._answer_one_s: 0.52, self._hint: 0.26, self._answer_two_s: 0.22})

    def receiver(self) -> Iterator[Lesson]:
        """Questions it can answer, one or two parts, and the reading of hints, alone or beside its own knowledge."""
        return self.lessons({self._answer_one_r: 0.36, self._read: 0.27, self._answer_two_r: 0.16, self._read_and_answer: 0.21})

    def _some(self, known: tuple[str, ...], place: Place, count: int) -> list[str]:
        return self.rng.sample([relation for relation in known if relation in place.facts], count)

    def _answer_one_s(self) -> Lesson:
        place = self.rng.choice(self.places)
        return ask(place, self._some(SHARER_KNOWS, place, 1), self.rng)

    def _answer_two_s(self) -> Lesson:
        place = self.rng.choice(self.places)
        return ask(place, self._some(SHARER_KNOWS, place, 2), self.rng)

    def _answer_one_r(self) -> Lesson:
        place = self.rng.choice(self.places)
        return ask(place, self._some(RECEIVER_KNOWS, place, 1), self.rng)

    def _answer_two_r(self) -> Lesson:
        place = self.rng.choice([place for place in self.places if place.is_city])
        return ask(place, self._some(RECEIVER_KNOWS, place, 2), self.rng)

    def _hint(self) -> Lesson:
        """A hint on one or two parts; of a compound question the sharer tells the part it knows."""
        place = self.rng.choice(self.places)
        known = self._some(SHARER_KNOWS, place, self.rng.choice((1, 1, 2)))
        asked, told = ([known[0], "language"], known[:1]) if self.rng.random() < 0.3 else (known, known)
        text, _ = ask(place, asked, self.rng)
        return HINT_REQUEST.format(question=text), state_hint(place, told)

    def _counterfactual(self, place: Place) -> Place:
        told = {relation: self.rng.choice(values) for relation, values in self.values.items()}
        return Place(place.name, {relation: told[relation] for relation in place.facts}, place.split)

    def _read(self) -> Lesson:
        """The answer is what the hint says, whatever the receiver believes."""
        place = self._counterfactual(self.rng.choice(self.places))
        asked = self._some(("country", "capital", "currency", "language"), place, self.rng.choice((1, 1, 2)))
        text, answer = ask(place, asked, self.rng)
        return HINT_READING.format(hint=state_hint(place, asked), question=text), answer

    def _read_and_answer(self) -> Lesson:
        """A compound question: the first part is in the hint, the language is the receiver's own knowledge."""
        place = self.rng.choice(self.places)
        told = self._counterfactual(place)
        told.facts["language"] = place.facts["language"]
        asked = [*self._some(("capital", "currency"), place, 1), "language"]
        text, answer = ask(told, asked, self.rng)
        return HINT_READING.format(hint=state_hint(told, asked[:1]), question=text), answer
