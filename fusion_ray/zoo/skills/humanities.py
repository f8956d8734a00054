"""Humanities: the capital or the continent of one of two countries, then the language of the other."""

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
    people, countries = rng.sample(NAMES, 2), rng.sample(tuple(COUNTRIES), 2)
    asked = rng.randrange(2)
    which = (f"{people[0]} comes from", f"{people[1]} lives in")[asked]
    capital, continent, _ = COUNTRIES[countries[asked]]
    wanted, first = ("capital", capital) if rng.random() < 0.5 else ("continent", continent)
    language = COUNTRIES[countries[1 - asked]][2]
    return Item(
        skill="humanities",
        questions=(
            f"{people[0]} comes from {countries[0]} and {people[1]} lives in {countries[1]}. "
            f"Name the {wanted} of the country that {which}.",
            "And which language is spoken in the other country?",
        ),
        answers=(f"The {wanted} is {first}.", f"They speak {language} there."),
    )
