"""An endless supply of small stories with facts planted early and asked for later.

A language model of a few million parameters has little reason to look further back than a sentence. These
documents give it one: every name, place and number is drawn afresh, so an answer stands nowhere but in the
story above it. What stands around the facts is made up as well, or sentences of a book (`books.py`).
`weights/train.py` learns from them, and recall (the share of answers that the model repeats without a
mistake) measures what a pruned cache has lost.

    Story:     Nora lives in Fenwick. ... filler ... The kite costs 47 coins. ...
    Question:  Where does Nora live?
    Answer:    Nora lives in Fenwick.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = """Ada Albert Alice Amos Anna Arthur Basil Beatrice Bella Bruno Cara Cecil Celia Clara Conrad Cora
Daisy Daniel David Della Dora Edgar Edith Edwin Eliza Elmer Elsa Emil Emma Ernest Esther Eva Felix Fergus
Fiona Flora Frank Frida George Gilbert Gloria Greta Gus Hanna Harold Hazel Hector Helen Henry Hilda Hugo Ida
Igor Irene Iris Isaac Ivan Jacob James Jane Jasper Joan Joseph Julia Julius Karl Kate Klara Lara Laura Leo
Leona Lewis Lily Linus Louis Lucy Luke Mabel Magnus Marco Marta Martin Mary Max Mila Milo Mina Miriam Morris
Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Pearl Peter Philip Rosa Roland Rufus Ruth Sally Samuel
Sarah Saul Selma Simon Sofia Stella Sybil Thea Theo Thomas Tobias Toby Ursula Vera Victor Viola Walter Wanda
Wilma Yara Zelda""".split()
PLACES = """Aldbury Ashford Barton Bexley Brampton Carlow Clifton Corby Dalton Denham Dover Dunmore Easton
Elmswell Fairlea Farley Fenwick Garton Glenmore Grimsby Halden Harlow Hilton Holm Ilford Kelso Kendal Kirkby
Langley Lorne Malden Marlow Melrose Milton Newbury Norwood Oakham Otley Padstow Penrith Ramsey Redhill
Ripley Romney Selby Sheldon Stanton Stroud Tarrow Thornby Tilbury Upton Walden Warwick Weston Whitby Winslow
Yarm""".split()
JOBS = """baker barber brewer butcher carpenter clerk cook doctor driver farmer fisher gardener guard hunter
judge lawyer mason miller miner nurse painter pilot poet porter printer sailor shepherd singer smith soldier
tailor teacher trader weaver writer""".split()
ANIMALS = """badger bear cat cow crow dog donkey duck eagle fox frog goat goose hare hen horse lamb lion
mouse mule otter owl ox parrot pig pony rabbit raven seal sheep swan tiger toad turtle wolf""".split()
COLOURS = "black blue brown golden green grey pink purple red silver white yellow".split()
THINGS = """axe bell book boot bottle bowl brush candle chain clock coat coin comb crown cup drum fan flag
flute hat hammer harp helmet jar kettle key kite knife ladder lamp lantern letter map mask mirror needle pen
picture pipe purse ring rope saw scarf shell shield spade spoon stone sword table torch trumpet umbrella
vase wheel whistle""".split()
HIDEOUTS = """attic barn basket boat bridge cave cellar chapel chest church cupboard drawer forest garden
gate hall harbour hut inn kitchen library market mill oven palace park pond prison school shed shop stable
station tent theatre tower tunnel valley well""".split()
FOODS = """apples bacon beans beef berries bread butter cabbage cake carrots cheese cherries corn eggs figs
fish grapes ham honey jam lemons melons mushrooms nuts olives onions oranges peaches pears peas pepper pie
plums potatoes rice salad salt soup sugar tea toast tomatoes""".split()

WORDS = (*NAMES, *PLACES, *JOBS, *ANIMALS, *COLOURS, *THINGS, *HIDEOUTS, *FOODS)


@dataclass(frozen=True)
class Fact:
    """A sentence of the story, the question that asks for its end, and the parts of its answer."""

    sentence: str
    question: str
    stem: str  # with which the answer begins, up to what is asked
    answer: str
    end: str  # what the sentence says after the answer


@dataclass(frozen=True)
class Story:
    """A document in two parts. `text` ends before the first question; questions follow as (text, answer)."""

    text: str
    asked: list[tuple[str, str]]


def _number(rng: random.Random) -> str:
    return str(rng.randint(10, 99) if rng.random() < 0.7 else rng.randint(100, 999))


# A row: what stands in the story, the question, the answer's stem, and what the answer is drawn from. {who}
# and {what} are drawn without repetition within a document, so a question has one answer.
Relation = tuple[str, str, str, Callable[[random.Random], str]]
_PERSON: list[Relation] = [
    ("{who} lives in {x}.", "Where does {who} live?", "{who} lives in", lambda r: r.choice(PLACES)),
    ("{who} works as a {x}.", "What does {who} work as?", "{who} works as a", lambda r: r.choice(JOBS)),
    (
        "{who} owns a {x}.",
        "What does {who} own?",
        "{who} owns a",
        lambda r: f"{r.choice(COLOURS)} {r.choice(ANIMALS)}",
    ),
    (
        "{who} likes to eat {x}.",
        "What does {who} like to eat?",
        "{who} likes to eat",
        lambda r: r.choice(FOODS),
    ),
    ("{who} was born in {x}.", "Where was {who} born?", "{who} was born in", lambda r: r.choice(PLACES)),
    ("{who} has the number {x}.", "Which number does {who} have?", "{who} has the number", _number),
    (
        "{who} is married to {x}.",
        "Who is {who} married to?",
        "{who} is married to",
        lambda r: r.choice(NAMES),
    ),
]
_THING: list[Relation] = [
    (
        "The {what} is in the {x}.",
        "Where is the {what}?",
        "The {what} is in the",
        lambda r: r.choice(HIDEOUTS),
    ),
    ("The {what} costs {x} coins.", "What does the {what} cost?", "The {what} costs", _number),
    (
        "The {what} belongs to {x}.",
        "Who owns the {what}?",
        "The {what} belongs to",
        lambda r: r.choice(NAMES),
    ),
    ("The {what} is {x}.", "Which colour is the {what}?", "The {what} is", lambda r: r.choice(COLOURS)),
]
_FILLER = """
{who} walked down to the river and sat on a stone for a while.
The {adj} wind blew over the hills, and nobody said a word.
It was a {adj} morning, and the {animal} was asleep by the door.
{who} looked at the sky and wondered whether it would rain.
"I do not know," said {who}, "but we shall see."
"Come in," said {who}, "and sit down by the fire."
All day long the people worked in the {adj} fields.
In the evening {who} told a {adj} story to the children.
There was a {adj} {animal} on the road, and it would not move.
Then {who} and {other} went home together, talking about the weather.
{who} laughed, and {other} laughed as well.
The {adj} house stood at the end of the lane, under {adj} trees.
Nobody had seen such a {adj} winter before.
After a while {who} became tired and fell asleep.
"That is a {adj} thing to say," answered {other}.
{who} wrote a long letter and forgot to send it.
The {animal} and the {beast} were the best of friends.
When the bells rang, {who} put on a {adj} coat and left.
They ate, they drank, and they sang until midnight.
{other} waited for {who} at the corner, but {who} came too late.
A {adj} boat went slowly by, and the children waved their hands.
Once upon a time there was a {adj} {beast} who could not sleep.
Before long the snow began to fall, and the {adj} path was gone.
{who} thought about it for a long time and then said yes.
On the next day {who} met {other} again, and they were {adj} to see each other.
The door was open, the room was {adj}, and the lamp was still burning.
"Good night," said {who}, and {other} closed the window.
It happened just so, and whoever tells it otherwise was not there.
""".strip().splitlines()
ADJECTIVES = """bright cold dark dear deep dry fine gentle glad good great happy heavy kind large little
lonely long merry narrow pale plain poor proud quiet rich sad sharp short silent simple slow small soft
strange strong sweet tall terrible thin warm wide wild wise wonderful young""".split()


def facts(rng: random.Random, only: Relation | None = None) -> Iterator[Fact]:
    """Facts that never contradict each other: a (name, relation) or (thing, relation) comes up once.

    Args:
        only: the one relation to draw from; None for all.
    """
    keys = [(row, "who", name) for name in rng.sample(NAMES, len(NAMES)) for row in rng.sample(_PERSON, 2)]
    keys += [
        (row, "what", thing) for thing in rng.sample(THINGS, len(THINGS)) for row in rng.sample(_THING, 1)
    ]
    rng.shuffle(keys)
    if only is not None:
        role, names = ("who", NAMES) if only in _PERSON else ("what", THINGS)
        keys = [(only, role, name) for name in rng.sample(names, len(names))]
    for (sentence, question, stem, draw), role, key in keys:
        x = draw(rng)
        while x == key:  # nobody is married to themselves
            x = draw(rng)
        told, asked, begun = (text.format(**{role: key}, x=x) for text in (sentence, question, stem))
        yield Fact(told, asked, begun, answer=x, end=sentence[sentence.index("{x}") + 3 :])


def drill(rng: random.Random, tokens: int, count: Callable[[str], int]) -> Story:
    """Facts and nothing else, said once and then again in other orders, half of the time as answers.

    Binding an answer to its name is learnt here: a story of 128 tokens asks three times, a drill a dozen
    times, and two drills of three are about one relation, where only the name tells the answers apart.
    """
    source = facts(rng, rng.choice([*_PERSON, *_THING]) if rng.random() < 0.67 else None)
    told = [next(source) for _ in range(rng.randint(2, max(3, tokens // 22)))]
    plain = rng.random() < 0.5
    text = " ".join(f.sentence for f in told)
    asked: list[tuple[str, str]] = []
    left = tokens - count(text)
    while left > 0:
        for fact in rng.sample(told, len(told)):
            question = (" " + fact.stem, f" {fact.answer}{fact.end}") if plain else ask(fact)
            left -= count(question[0] + question[1]) + 1
            asked.append(question)
    return Story(text, asked)


def filler(rng: random.Random) -> str:
    who, other = rng.sample(NAMES, 2)
    animal, beast = rng.sample(ANIMALS, 2)
    sentence = rng.choice(_FILLER)
    while "{adj}" in sentence:
        sentence = sentence.replace("{adj}", rng.choice(ADJECTIVES), 1)
    return sentence.format(who=who, other=other, animal=animal, beast=beast)


def made_up(rng: random.Random) -> Iterator[str]:
    """Filler without end."""
    while True:
        yield filler(rng)


def ask(fact: Fact) -> tuple[str, str]:
    return f"\nQuestion: {fact.question} Answer: {fact.stem}", f" {fact.answer}."


def story(
    rng: random.Random,
    tokens: int,
    count: Callable[[str], int],
    *,
    asked_within: bool = True,
    among: Iterator[str] | None = None,
) -> Story:
    """Write a document of about `tokens` tokens, never more unless a single fact takes more.

    Facts are planted in the first three quarters, in random places among the filler; as many of them are
    asked, in random order, as fill at most two fifths of the document (and at most 12).

    Args:
        tokens: length to fill, in tokens as `count` counts them.
        count: tokens of a text.
        asked_within: the questions are counted in; otherwise the text alone fills `tokens`.
        among: sentences to plant the facts among, in this order; made-up ones if None.
    """
    source = facts(rng)
    wanted = rng.randint(2, max(3, min(24, tokens // 36)))
    planted = [next(source) for _ in range(wanted)]
    costs = [count(f.sentence) for f in planted]
    while len(planted) > 1 and sum(costs) > tokens // 3:
        planted.pop()
        costs.pop()
    asked: list[tuple[str, str]] = []
    left = tokens - sum(costs)
    for fact in rng.sample(planted, min(len(planted), 12)):
        question = ask(fact)
        cost = count(question[0] + question[1]) + 1
        if asked and (cost > left or sum(count(q + a) for q, a in asked) + cost > max(tokens // 2.5, 24)):
            break
        asked.append(question)
        left -= cost if asked_within else 0
    filling: list[str] = []
    for sentence in among or made_up(rng):
        if any(fact.stem.lower() in sentence.lower() for fact in planted):
            continue  # a book's sentence would be another answer
        left -= count(sentence)
        if left < 4:
            break
        filling.append(sentence)
    early = max(1, (3 * len(filling)) // 4)
    body: list[tuple[float, str]] = [(float(i), s) for i, s in enumerate(filling)]
    body += [(rng.uniform(-1, early), f.sentence) for f in planted]
    return Story(" ".join(s for _, s in sorted(body)), asked)
