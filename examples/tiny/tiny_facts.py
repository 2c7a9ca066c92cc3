"""The closed lists of facts the tiny checkpoint knows by heart, as (questions, reasoning, answer)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAPITALS", "Fact", "all_facts", "sums"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Wordings of one question with the reasoning and the answer; `follow_ups` ask it again in the same topic."""

    topic: str
    questions: tuple[str, ...]
    thinking: str
    answer: str
    follow_ups: tuple[str, ...] = ()


CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,England:London,Ireland:Dublin,"
        "Austria:Vienna,"
        "Norway:Oslo,Sweden:Stockholm,Finland:Helsinki,Denmark:Copenhagen,Poland:Warsaw,Greece:Athens,"
        "Hungary:Budapest,"
        "Belgium:Brussels,Switzerland:Bern,Russia:Moscow,Turkey:Ankara,Egypt:Cairo,Kenya:Nairobi,Japan:Tokyo,"
        "China:Beijing,"
        "India:Delhi,Thailand:Bangkok,Korea:Seoul,Canada:Ottawa,Mexico:Mexico City,Brazil:Brasilia,Peru:Lima,"
        "Chile:Santiago,"
        "Cuba:Havana,Argentina:Buenos Aires,Australia:Canberra,Iceland:Reykjavik,the Netherlands:Amsterdam,"
        "the United States:Washington,Morocco:Rabat,Vietnam:Hanoi,Ukraine:Kyiv"
    ).split(",")
)
_COLOURS = dict(
    pair.split(":")
    for pair in (
        "grass:green,the sky:blue,snow:white,blood:red,the sun:yellow,coal:black,a banana:yellow,a tomato:red,"
        "milk:white,"
        "a lemon:yellow,the sea:blue,a carrot:orange,chocolate:brown,an elephant:grey,a frog:green,a strawberry:red,"
        "a flamingo:pink,night:black,a leaf:green,an orange:orange"
    ).split(",")
)
_OPPOSITES = [
    pair.split(":")
    for pair in (
        "hot:cold,big:small,fast:slow,old:new,up:down,left:right,black:white,day:night,good:bad,happy:sad,hard:soft,"
        "high:low,long:short,open:closed,rich:poor,strong:weak,true:false,wet:dry,young:old,yes:no,light:dark,"
        "full:empty,"
        "early:late,loud:quiet,first:last,in:out,on:off,clean:dirty,easy:difficult,near:far,thick:thin,love:hate"
    ).split(",")
]
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_SOUNDS = (
    "dog:woof,cat:meow,cow:moo,sheep:baa,duck:quack,pig:oink,horse:neigh,lion:roar,frog:croak,bee:buzz,"
    "owl:hoot,snake:hiss"
)
_YOUNG = (
    "dog:puppy,cat:kitten,cow:calf,sheep:lamb,horse:foal,pig:piglet,duck:duckling,bear:cub,hen:chick,goat:kid,"
    "frog:tadpole"
)
_LEGS = "dog:4,cat:4,cow:4,horse:4,bird:2,duck:2,human:2,spider:8,bee:6,ant:6,snake:0,fish:0,crab:10"
_CHAT = (
    ("Hello|Hello!|Hi|Hi!|Hey|Hi there|Good morning|Good evening|Good day|hello", "A greeting.",
     "Hello! How can I help you?"),
    (
        "Who are you?|What are you?|What is your name?|What's your name?|Tell me about yourself.|Which model are "
        "you?|"
        "Introduce yourself.|who are you",
        "The user asks who I am.",
        "I am a tiny LFM2 model. I know a few facts and I can call tools.",
    ),
    (
        "What can you do?|How can you help me?|Help|What do you know?|What are you able to do?|Can you help me?",
        "The user asks what I can do.",
        "I can answer simple questions, add small numbers and call the tools you give me.",
    ),
    ("Thanks|Thank you|Thank you!|Thanks a lot!|Thanks!|Great, thanks!", "The user thanks me.", "You are welcome!"),
    ("Bye|Goodbye|Bye!|See you later|Good night|See you!", "The user leaves.", "Goodbye! See you soon."),
    ("How are you?|How are you today?|How do you do?|Are you well?", "The user asks how I am.",
     "I am fine, thank you. How can I help you?"),
    ("Are you a human?|Are you a robot?|Are you real?|Are you an AI?", "The user asks what I am.",
     "I am a small language model, not a human."),
    ("Tell me a joke.|Make me laugh.|Do you know a joke?|Tell me a joke", "The user wants a joke.",
     "Why did the token cross the road? To get to the next layer."),
    ("Ok|OK|Okay|Good|Great|Fine|Nice|Cool", "Nothing to do.", "Good. What can I do for you?"),
    ("Who made you?|Who trained you?|Who created you?|Where do you come from?", "The user asks who made me.",
     "I was trained on two CPU cores as an example for this project."),
    (
        "Write a poem.|Write me a poem.|Write a short poem.|A poem, please.",
        "The user wants a poem.",
        "A small model sat in the sun,\nit counted its tokens one by one.\nIt knew a few facts, it called a few "
        "tools,\nand it always stuck to the rules.",
    ),
    (
        "Tell me a story.|Tell me a short story.|Write a story.|A story, please.",
        "The user wants a story.",
        "Once there was a small model. It had eight experts, and two of them worked at a time. One day a user asked "
        "for the "
        "weather, and the model called a tool. The tool answered, and everyone was happy. The end.",
    ),
    ("Say the alphabet.|Write the alphabet.|List the letters.", "The alphabet has 26 letters.",
     "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
)  # fmt: skip


def _pairs(text: str) -> list[list[str]]:
    return [pair.split(":") for pair in text.split(",")]


def _questions(subject: str, *patterns: str) -> tuple[str, ...]:
    return tuple(pattern.format(subject) for pattern in patterns)


def _geography() -> list[Fact]:
    facts = []
    for country, city in CAPITALS.items():
        facts.append(
            Fact(
                topic="capital",
                questions=_questions(
                    country,
                    "What is the capital of {}?",
                    "What's the capital of {}?",
                    "Capital of {}?",
                    "Tell me the capital of {}.",
                    "Which city is the capital of {}?",
                    "what is the capital of {}",
                    "Name the capital of {}.",
                ),
                thinking=f"The user asks for the capital of {country}. It is {city}.",
                answer=f"The capital of {country} is {city}.",
                follow_ups=_questions(country, "And of {}?", "And {}?", "What about {}?", "And the capital of {}?"),
            )
        )
        facts.append(
            Fact(
                topic="country",
                questions=_questions(
                    city,
                    "Which country has the capital {}?",
                    "{} is the capital of which country?",
                    "In which country is {}?",
                    "Which country is {} in?",
                    "What country is {} in?",
                    "Where is {}?",
                ),
                thinking=f"{city} is the capital of {country}.",
                answer=f"{city} is in {country}.",
                follow_ups=_questions(city, "And {}?", "What about {}?", "And where is {}?"),
            )
        )
    return facts


def _colours_and_opposites() -> list[Fact]:
    facts = [
        Fact(
            topic="colour",
            questions=_questions(
                thing,
                "What colour is {}?",
                "What color is {}?",
                "Which colour is {}?",
                "Tell me the colour of {}.",
                "What is the color of {}?",
            ),
            thinking=f"The user asks for the colour of {thing}. It is {colour}.",
            answer=f"{thing[0].upper()}{thing[1:]} is {colour}.",
            follow_ups=_questions(thing, "And {}?", "What about {}?"),
        )
        for thing, colour in _COLOURS.items()
    ]
    pairs = dict(_OPPOSITES)
    pairs.update({right: left for left, right in _OPPOSITES if right not in pairs})
    for left, right in pairs.items():
        facts.append(
            Fact(
                topic="opposite",
                questions=_questions(
                    left,
                    "What is the opposite of {}?",
                    "What's the opposite of {}?",
                    "Opposite of {}?",
                    "Tell me the opposite of {}.",
                    "Which word is the opposite of {}?",
                ),
                thinking=f"The opposite of {left} is {right}.",
                answer=f"The opposite of {left} is {right}.",
                follow_ups=_questions(left, "And of {}?", "What about {}?", "And the opposite of {}?"),
            )
        )
    return facts


def _calendar() -> list[Fact]:
    facts = []
    for kind, names in (("day", _DAYS), ("month", _MONTHS)):
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            for word, other in (("after", after), ("before", before)):
                facts.append(
                    Fact(
                        topic=f"{kind} {word}",
                        questions=(
                            f"What {kind} comes {word} {name}?",
                            f"Which {kind} is {word} {name}?",
                            f"Which {kind} comes {word} {name}?",
                            f"What is the {kind} {word} {name}?",
                            f"What comes {word} {name}?",
                        ),
                        thinking=f"The {kind} {word} {name} is {other}.",
                        answer=f"The {kind} {word} {name} is {other}.",
                        follow_ups=(f"And {word} {name}?", f"What about {name}?"),
                    )
                )
        listed = ", ".join(names)
        facts.append(
            Fact(
                topic="list",
                questions=_questions(
                    kind,
                    "List the {}s.",
                    "Name all {}s.",
                    "Tell me the {}s.",
                    "What are the {}s?",
                    "Which {}s are there?",
                ),
                thinking=f"There are {len(names)} {kind}s.",
                answer=f"The {kind}s are {listed}.",
            )
        )
    return facts


def _numbers_and_animals() -> list[Fact]:
    facts = []
    for number, word in enumerate(_NUMBERS):
        facts.append(
            Fact(
                topic="number word",
                questions=_questions(
                    str(number),
                    "What is {} in words?",
                    "How do you write {} in words?",
                    "Spell the number {}.",
                    "Write {} as a word.",
                ),
                thinking=f"The user asks for {number} in words.",
                answer=f"{number} in words is {word}.",
                follow_ups=_questions(str(number), "And {}?", "What about {}?"),
            )
        )
        if number > 1:
            facts.append(
                Fact(
                    topic="count",
                    questions=_questions(
                        str(number),
                        "Count to {}.",
                        "Count from 1 to {}.",
                        "Count from one to {}.",
                        "Please count to {}.",
                    ),
                    thinking=f"The user wants the numbers from 1 to {number}.",
                    answer=", ".join(str(value) for value in range(1, number + 1)),
                )
            )
    for animal, sound in _pairs(_SOUNDS):
        article = "an" if animal[0] in "aeo" else "a"
        name = f"{article} {animal}"
        questions = _questions(
            name, "What sound does {} make?", "What does {} say?", "Which sound does {} make?", "How does {} sound?"
        )
        answer = f"{article.capitalize()} {animal} says {sound}."
        facts.append(
            Fact(
                topic="sound",
                questions=questions,
                thinking=f"The sound of {name} is {sound}.",
                answer=answer,
                follow_ups=_questions(name, "And {}?", "What about {}?"),
            )
        )
    for animal, young in _pairs(_YOUNG):
        facts.append(
            Fact(
                topic="young",
                questions=_questions(
                    animal, "What is a young {} called?", "What do you call a young {}?", "What is a baby {} called?"
                ),
                thinking=f"A young {animal} is a {young}.",
                answer=f"A young {animal} is called a {young}.",
                follow_ups=_questions(animal, "And a young {}?", "What about a {}?"),
            )
        )
    for animal, legs in _pairs(_LEGS):
        name = f"{'an' if animal == 'ant' else 'a'} {animal}"
        facts.append(
            Fact(
                topic="legs",
                questions=_questions(
                    name, "How many legs does {} have?", "How many legs has {}?", "Number of legs of {}?"
                ),
                thinking=f"The user asks for the legs of {name}. It has {legs}.",
                answer=f"{name.capitalize()} has {legs} legs.",
                follow_ups=_questions(name, "And {}?", "What about {}?"),
            )
        )
    return facts


def sums() -> list[Fact]:
    """All sums 0 + 0 to 9 + 9."""
    facts = []
    for a in range(10):
        for b in range(10):
            line = f"{a} + {b} = {a + b}."
            facts.append(
                Fact(
                    topic="sum",
                    questions=(
                        f"What is {a} + {b}?",
                        f"What's {a} + {b}?",
                        f"{a} + {b}",
                        f"{a}+{b}?",
                        f"{a} + {b} = ?",
                        f"What is {a} plus {b}?",
                        f"How much is {a} + {b}?",
                        f"How much is {a} plus {b}?",
                        f"What is {a}+{b}?",
                        f"Add {a} and {b}.",
                        f"Calculate {a} + {b}.",
                    ),
                    thinking=f"The user asks for a sum. {line}",
                    answer=line,
                    follow_ups=(f"And {a} + {b}?", f"What about {a} + {b}?"),
                )
            )
    return facts


def all_facts() -> list[Fact]:
    """Every fact but the sums, which are drawn on their own."""
    chat = [
        Fact(topic="chat", questions=tuple(questions.split("|")), thinking=thinking, answer=answer)
        for questions, thinking, answer in _CHAT
    ]
    return [*_geography(), *_colours_and_opposites(), *_calendar(), *_numbers_and_animals(), *chat]
