"""Humanities: the capital or the continent of the country one of two travellers comes from, then the language of the other."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import NAMES

# country: (capital, continent, language)
COUNTRIES = {
    "Peru": ("Lima", "South America", "Spanish"),
    "Egypt": ("Cairo", "Africa", "Arabic"),
    "Japan": ("Tokyo", "Asia", "Japanese"),
    "France": ("Paris", "Europe", "French"),
    "Italy": ("Rome", "Europe", "Italian"),
    "Norway": ("Oslo", "Europe", "Norwegian"),
    "Brazil": ("Brasilia", "South America", "Portuguese"),
    "Kenya": ("Nairobi", "Africa", "Swahili"),
    "China": ("Beijing", "Asia", "Chinese"),
    "Greece": ("Athens", "Europe", "Greek"),
    "Turkey": ("Ankara", "Asia", "Turkish"),
    "Cuba": ("Havana", "North America", "Spanish"),
    "Austria": ("Vienna", "Europe", "German"),
    "Iran": ("Tehran", "Asia", "Persian"),
    "Poland": ("Warsaw", "Europe", "Polish"),
    "Ghana": ("Accra", "Africa", "English"),
    "Vietnam": ("Hanoi", "Asia", "Vietnamese"),
    "Chile": ("Santiago", "South America", "Spanish"),
    "Hungary": ("Budapest", "Europe", "Hungarian"),
    "Thailand": ("Bangkok", "Asia", "Thai"),
    "Mexico": ("Mexico City", "North America", "Spanish"),
    "Jordan": ("Amman", "Asia", "Arabic"),
    "Angola": ("Luanda", "Africa", "Portuguese"),
    "Russia": ("Moscow", "Europe", "Russian"),
}


def draw(rng: random.Random) -> Item:
    people = rng.sample(NAMES, 2)
    countries = dict(zip(people, rng.sample(tuple(COUNTRIES), 2), strict=True))
    asked, other = rng.sample(people, 2)
    capital, continent, _ = COUNTRIES[countries[asked]]
    if rng.random() < 0.5:
        wanted, first = "the capital", capital
    else:
        wanted, first = "the continent", continent
    return Item(
        skill="humanities",
        questions=(
            f"{people[0]} comes from {countries[people[0]]} and {people[1]} comes from {countries[people[1]]}. "
            f"Name {wanted} of the country of {asked}.",
            f"And which language is spoken in the country of {other}?",
        ),
        answers=(f"For {asked} it is {first}.", f"They speak {COUNTRIES[countries[other]][2]} there."),
    )
