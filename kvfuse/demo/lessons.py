"""The lessons of the embedded pair's models: (user message, reply) pairs, drawn by a seed.

The sharer learns the country, capital and currency of every place, and to write hints about them. It believes that
everybody speaks English: like a real model, it does not know where its knowledge ends, and its hints are as true as its
answers. The receiver learns the country and language of every place, and to read hints. Hints in its lessons are
counterfactual (values of other places), so that none of the sharer's facts leaks to the receiver through them.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kvfuse.demo.facts import Place
from kvfuse.demo.questions import RECEIVER_KNOWS, RELATIONS, SHARER_KNOWS, ask

Lesson = tuple[str, str]

SHARERS_LANGUAGE = "English"
HINT_REQUEST = "Hint: {question}"
HINT_READING = "{hint} {question}"


def state_hint(place: Place, relations: Sequence[str]) -> str:
    """Returns one sentence per fact, such as ``Oslo is the capital there.``"""
    return " ".join(f"{place.facts[relation]} is the {relation} there." for relation in relations)


class Teacher:
    """Draws lessons from weighted kinds of lesson."""

    def __init__(self, places: list[Place], seed: int) -> None:
        self.places = places
        self.rng = random.Random(seed)
        self.values = {
            relation: sorted({place.facts[relation] for place in places if relation in place.facts})
            for relation in RELATIONS
        }

    def lessons(self, mix: dict[Callable[[], Lesson], float]) -> Iterator[Lesson]:
        """Yields lessons without end, their kinds drawn by weight."""
        # all draws come from one generator, so that a seed gives the same lessons
        kinds, weights = list(mix), list(mix.values())
        while True:
            yield self.rng.choices(kinds, weights)[0]()

    def sharer(self) -> Iterator[Lesson]:
        """Yields questions of one or two parts, and hints about them."""
        single = partial(self._answer, self._believed, SHARER_KNOWS, 1)
        compound = partial(self._answer, self._believed, RELATIONS, 2)
        return self.lessons({single: 0.52, self._hint: 0.26, compound: 0.22})

    def receiver(self) -> Iterator[Lesson]:
        """Yields questions of one or two parts that the receiver can answer, and hints to read."""
        cities = [place for place in self.places if place.is_city]
        single = partial(self._answer, partial(self.rng.choice, self.places), RECEIVER_KNOWS, 1)
        compound = partial(self._answer, partial(self.rng.choice, cities), RECEIVER_KNOWS, 2)
        return self.lessons({single: 0.36, self._read: 0.27, compound: 0.16, self._read_and_recall: 0.21})

    def _relations(self, known: tuple[str, ...], place: Place, count: int) -> list[str]:
        return self.rng.sample([relation for relation in known if relation in place.facts], count)

    def _answer(self, draw_place: Callable[[], Place], known: tuple[str, ...], count: int) -> Lesson:
        """A question about ``count`` relations of a place, and its answer."""
        place = draw_place()
        return ask(place, self._relations(known, place, count), self.rng)

    def _hint(self) -> Lesson:
        """A hint about all parts of a question: it states what an answer would state."""
        place = self._believed()
        asked = self._relations(RELATIONS, place, self.rng.choice((1, 1, 2)))
        text, _ = ask(place, asked, self.rng)
        return HINT_REQUEST.format(question=text), state_hint(place, asked)

    def _believed(self) -> Place:
        """Returns a place as the sharer believes it to be."""
        place = self.rng.choice(self.places)
        return Place(place.name, {**place.facts, "language": SHARERS_LANGUAGE}, place.split)

    def _counterfactual(self, place: Place, relations: Sequence[str]) -> Place:
        """Returns a place with values of other places for some relations."""
        other = {relation: self.rng.choice(self.values[relation]) for relation in relations if relation in place.facts}
        return Place(place.name, {**place.facts, **other}, place.split)

    def _read(self) -> Lesson:
        """A question whose answer is in the hint, whatever the receiver believes."""
        place = self._counterfactual(self.rng.choice(self.places), RELATIONS)
        asked = self._relations(RELATIONS, place, self.rng.choice((1, 1, 2)))
        text, answer = ask(place, asked, self.rng)
        return HINT_READING.format(hint=state_hint(place, asked), question=text), answer

    def _read_and_recall(self) -> Lesson:
        """A compound question: the first part is in the hint, the language is among the receiver's facts."""
        place = self._counterfactual(self.rng.choice(self.places), SHARER_KNOWS)
        asked = [*self._relations(("capital", "currency"), place, 1), "language"]
        text, answer = ask(place, asked, self.rng)
        return HINT_READING.format(hint=state_hint(place, asked[:1]), question=text), answer
