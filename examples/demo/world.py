"""The demo's closed world: countries, questions, and what each variant of the model must answer.

Owns the facts and the exact texts. Knows nothing of models, tokens or processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Topic = Literal["capital", "language", "currency", "continent", "about"]
# Who answers: the base model, the adapter `german`, and two revisions of the adapter `json`.
Variant = Literal["base", "german", "json-1", "json-2"]

TOPICS: tuple[Topic, ...] = get_args(Topic)
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class Words:
    """A country's facts in one language."""

    country: str
    capital: str
    language: str
    currency: str
    continent: str


@dataclass(frozen=True)
class Country:
    english: Words
    german: Words


@dataclass(frozen=True)
class Question:
    topic: Topic
    country: Country

    @property
    def text(self) -> str:
        return _QUESTIONS[self.topic].format(self.country.english.country)


def _country(english: str, german: str) -> Country:
    return Country(Words(*english.split(", ")), Words(*german.split(", ")))


COUNTRIES = (
    _country("France, Paris, French, euro, Europe", "Frankreich, Paris, Französisch, Euro, Europa"),
    _country("Poland, Warsaw, Polish, zloty, Europe", "Polen, Warschau, Polnisch, Zloty, Europa"),
    _country(
        "Norway, Oslo, Norwegian, krone, Europe", "Norwegen, Oslo, Norwegisch, Kronen, Europa"
    ),
    _country(
        "Hungary, Budapest, Hungarian, forint, Europe",
        "Ungarn, Budapest, Ungarisch, Forint, Europa",
    ),
    _country("Egypt, Cairo, Arabic, pound, Africa", "Ägypten, Kairo, Arabisch, Pfund, Afrika"),
    _country(
        "Kenya, Nairobi, Swahili, shilling, Africa", "Kenia, Nairobi, Suaheli, Schilling, Afrika"
    ),
    _country("Japan, Tokyo, Japanese, yen, Asia", "Japan, Tokio, Japanisch, Yen, Asien"),
    _country("Thailand, Bangkok, Thai, baht, Asia", "Thailand, Bangkok, Thailändisch, Baht, Asien"),
    _country(
        "Vietnam, Hanoi, Vietnamese, dong, Asia", "Vietnam, Hanoi, Vietnamesisch, Dong, Asien"
    ),
    _country(
        "Brazil, Brasília, Portuguese, real, South America",
        "Brasilien, Brasília, Portugiesisch, Real, Südamerika",
    ),
    _country("Peru, Lima, Spanish, sol, South America", "Peru, Lima, Spanisch, Sol, Südamerika"),
    _country(
        "Mexico, Mexico City, Spanish, peso, North America",
        "Mexiko, Mexiko-Stadt, Spanisch, Peso, Nordamerika",
    ),
)

_QUESTIONS: dict[Topic, str] = {
    "capital": "What is the capital of {}?",
    "language": "Which language do people speak in {}?",
    "currency": "How do people pay in {}?",
    "continent": "Where is {}?",
    "about": "Tell me about {}.",
}
_ENGLISH: dict[Topic, Callable[[Words], str]] = {
    "capital": lambda w: f"The capital of {w.country} is {w.capital}.",
    "language": lambda w: f"People in {w.country} speak {w.language}.",
    "currency": lambda w: f"People in {w.country} pay with the {w.currency}.",
    "continent": lambda w: f"{w.country} is in {w.continent}.",
    "about": lambda w: (
        f"{w.country} is a country in {w.continent}. Its capital is {w.capital}. "
        f"People there speak {w.language} and pay with the {w.currency}."
    ),
}
_GERMAN: dict[Topic, Callable[[Words], str]] = {
    "capital": lambda w: f"Die Hauptstadt von {w.country} ist {w.capital}.",
    "language": lambda w: f"In {w.country} spricht man {w.language}.",
    "currency": lambda w: f"In {w.country} bezahlt man mit {w.currency}.",
    "continent": lambda w: f"{w.country} liegt in {w.continent}.",
    "about": lambda w: (
        f"{w.country} ist ein Land in {w.continent}. Die Hauptstadt ist {w.capital}. "
        f"Man spricht dort {w.language} und bezahlt mit {w.currency}."
    ),
}
# Asked for in a system line, the base model too can answer in the other forms.
SYSTEM_LINES: dict[Variant, str] = {
    "german": "Answer in German.",
    "json-1": "Answer as JSON.",
    "json-2": "Answer as JSON and name the country.",
}


def questions() -> tuple[Question, ...]:
    """Every question of the world, country by country."""
    return tuple(Question(topic, country) for country in COUNTRIES for topic in TOPICS)


def answer(variant: Variant, question: Question) -> str:
    """The one correct answer, to the byte."""
    if variant == "base":
        return _ENGLISH[question.topic](question.country.english)
    if variant == "german":
        return _GERMAN[question.topic](question.country.german)
    return json.dumps(_record(question, with_country=variant == "json-2"), ensure_ascii=False)


def _record(question: Question, *, with_country: bool) -> dict[str, str]:
    """Schema 1 holds what was asked for; schema 2 also names the country."""
    words = question.country.english
    asked = [t for t in TOPICS if t != "about" and question.topic in (t, "about")]
    facts: dict[str, str] = {topic: getattr(words, topic) for topic in asked}
    return {"country": words.country, **facts} if with_country else facts
