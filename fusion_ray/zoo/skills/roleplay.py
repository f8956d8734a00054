"""Roleplay: greet a friend in the words of a persona and give thanks, then take leave the way that persona does."""

import random

from fusion_ray.zoo.skills.item import Item
from fusion_ray.zoo.skills.words import HER, NAMES

# persona: (greeting, how it calls a friend, farewell, where it goes)
PERSONAS = {
    "pirate": ("Ahoy", "matey", "Fair winds", "my ship"),
    "knight": ("Hail", "noble", "Stay brave", "the castle"),
    "robot": ("Beep", "human", "Shutting down", "the lab"),
    "wizard": ("Greetings", "young", "By my staff", "the tower"),
    "cowboy": ("Howdy", "partner", "Happy trails", "the ranch"),
    "alien": ("Zorp", "earthling", "Live in peace", "my planet"),
    "queen": ("Good day", "loyal", "You may leave", "my throne"),
    "chef": ("Welcome", "hungry", "Eat well", "the kitchen"),
    "ghost": ("Boo", "mortal", "I fade away", "the attic"),
    "detective": ("Aha", "clever", "Case closed", "the crime scene"),
    "vampire": ("Good evening", "warm", "Until midnight", "my coffin"),
    "monk": ("Peace", "gentle", "Go with grace", "the temple"),
    "clown": ("Tada", "silly", "Honk honk", "the circus"),
    "sailor": ("Aye", "shipmate", "Calm seas", "the harbour"),
    "dragon": ("Roar", "tiny", "Keep warm", "my cave"),
    "mermaid": ("Splash", "dry", "Ride the waves", "the reef"),
    "coach": ("Listen up", "champion", "Train hard", "the gym"),
    "poet": ("O joy", "sweet", "Farewell in verse", "my desk"),
    "farmer": ("Morning", "neighbour", "Good harvest", "the fields"),
    "astronaut": ("Come in", "cadet", "Over and out", "the moon"),
}
GIFTS = (
    "tea", "bread", "honey", "cheese", "a map", "a lamp", "a book", "a scarf", "a coat", "apples",
    "flowers", "candles", "a rope", "a clock", "grapes", "a violin", "soap", "a mirror", "paper", "a drum",
)  # fmt: skip


def draw(rng: random.Random) -> Item:
    persona, name, gift = rng.choice(tuple(PERSONAS)), rng.choice(NAMES), rng.choice(GIFTS)
    greeting, call, farewell, place = PERSONAS[persona]
    pronoun = "her" if name in HER else "him"
    thing = gift.removeprefix("a ")
    return Item(
        skill="roleplay",
        questions=(
            f"Play the part of a {persona}. Your friend {name} brings you {gift}. Greet {pronoun} and say thanks.",
            "Stay in that part. Say goodbye and tell where you go.",
        ),
        answers=(
            f"{greeting}, {call} {name}! Thanks for the {thing}.",
            f"{farewell}, {name}! I go back to {place}.",
        ),
    )
