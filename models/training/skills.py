"""The skills: each draws a key (its content), a prompt and the answers that count as right."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from words import CITIES, NAMES, any_name, listed, random_text, random_word

# A skill draws from the generator and returns (key, prompt, answers).

Draw = tuple[str, str, tuple[str, ...]]

REPEAT = listed(
    "Repeat: {}|Repeat: {}|Echo: {}|Say: {}|Repeat after me: {}|Say {}|Say {}|Repeat {}|Echo {}|"
    'Say "{}"|Repeat "{}"'
)
REVERSE = listed(
    "Reverse: {}|Reverse: {}|Reverse {}|Reverse {}|Reverse the word {}|Reverse the word {}.|"
    'Spell {} backwards.|What is {} backwards?|Reverse "{}"|Reverse the word "{}".'
)
UPPERCASE = listed(
    "Uppercase: {}|Uppercase: {}|Put in capitals: {}|Uppercase {}|"
    "Make uppercase: {}|Convert to uppercase: {}"
)
LOWERCASE = listed(
    "Lowercase: {}|Lowercase: {}|Put in small letters: {}|Lowercase {}|"
    "Make lowercase: {}|Convert to lowercase: {}"
)
COUNT_LETTERS = listed(
    "Count the letters in {}.|Count the letters: {}|How many letters are in {}?|"
    "How many letters are there in {}?|How many letters does {} have?|How many letters in {}?|"
    "Count the letters in the word {}.|How many letters are in the word {}?"
)
ADD = listed(
    "What is {} + {}?|What is {}+{}?|{} + {}|{}+{}|{}+{}=|{} + {} =|Add {} and {}.|"
    "What is {} plus {}?|{} plus {}|How much is {} + {}?|What's {} + {}?|Calculate {} + {}."
)
SORT = listed("Sort: {}|Sort: {}|Sort these numbers: {}|Sort {}|Sort the numbers {}")


def repeat(rng: random.Random) -> Draw:
    """Say the text again."""
    text = random_text(rng)
    return text, rng.choice(REPEAT).format(text), (text,)


def reverse(rng: random.Random) -> Draw:
    """Spell the word backwards."""
    text = random_word(rng)
    if rng.random() < 0.1:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 8)))
    return text, rng.choice(REVERSE).format(text), (text[::-1],)


def uppercase(rng: random.Random) -> Draw:
    """Put the text in capitals."""
    text = random_word(rng)
    if rng.random() < 0.35:
        text = " ".join(random_word(rng, 2, 8) for _ in range(rng.randint(2, 4)))
    return text, rng.choice(UPPERCASE).format(text), (text.upper(),)


def lowercase(rng: random.Random) -> Draw:
    """Put the text in small letters."""
    words = [random_word(rng) for _ in range(1 if rng.random() < 0.65 else rng.randint(2, 3))]
    change = rng.choice((str.upper, str.upper, str.capitalize, str.title))
    text = change(" ".join(words))
    return text, rng.choice(LOWERCASE).format(text), (text.lower(),)


def count_letters(rng: random.Random) -> Draw:
    """Say how many letters a word has."""
    text = random_word(rng, 1, 12)
    return text, rng.choice(COUNT_LETTERS).format(text), (str(len(text)),)


GOOD = listed(
    "great excellent wonderful superb amazing fantastic delightful perfect good lovely brilliant "
    "charming pleasant outstanding impressive enjoyable beautiful splendid"
)
BAD = listed(
    "terrible awful horrible poor disappointing broken dreadful useless bad boring ugly miserable "
    "annoying unpleasant mediocre disgusting shoddy faulty"
)
THINGS = listed(
    "phone film hotel book meal service laptop flight concert room coffee camera game teacher "
    "restaurant song show beach museum train park car"
)


def sentiment(rng: random.Random) -> Draw:
    """Tell a positive sentence from a negative one."""
    good = rng.random() < 0.5
    thing, word = rng.choice(THINGS), rng.choice(GOOD if good else BAD)
    if rng.random() < 0.2:
        word, good = f"not {rng.choice(('good', 'great') if good else ('bad', 'awful'))}", not good
    love = rng.choice(("love", "like", "enjoy") if good else ("hate", "dislike", "regret"))
    form = rng.choice(
        (
            "The {0} was {1}.",
            "I found the {0} {1}.",
            "This {0} is really {1}.",
            "My {0} is {1}, I {2} it.",
            "I {2} this {0}.",
            "What a day: the {0} was so {1}!",
        )
    )
    text = form.format(thing, word, love)
    ask = rng.choice(
        (
            "Sentiment: {}",
            "Sentiment: {}",
            "Is this positive or negative? {}",
            "Is this positive or negative: {}",
            "What is the sentiment of: {}",
        )
    )
    return text, ask.format(text), ("positive" if good else "negative",)


def add(rng: random.Random) -> Draw:
    """Add two numbers below one hundred, of which at most one has a single digit."""
    a, b = rng.randint(0, 99), rng.randint(10, 99)
    if rng.random() < 0.3:
        a = rng.randint(0, 9)
    if rng.random() < 0.5:
        a, b = b, a
    return f"{min(a, b)}+{max(a, b)}", rng.choice(ADD).format(a, b), (str(a + b),)


def add_digits(rng: random.Random) -> Draw:
    """Add two single digits; there are only a hundred pairs, so none is held out."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"{a}+{b}", rng.choice(ADD).format(a, b), (str(a + b),)


def sort(rng: random.Random) -> Draw:
    """Put three or four numbers, all of two digits or all of one, in order."""
    low, high = (0, 9) if rng.random() < 0.2 else (10, 99)
    numbers = [rng.randint(low, high) for _ in range(rng.choice((3, 4)))]
    gap = rng.choice((" ", " ", ", "))
    answer = gap.join(map(str, sorted(numbers)))
    prompt = rng.choice(SORT).format(gap.join(map(str, numbers)))
    return " ".join(map(str, sorted(numbers))), prompt, (answer,)


def extract_json(rng: random.Random) -> Draw:
    """Turn a sentence about a person into a JSON object."""
    name, city, age = any_name(rng, NAMES), any_name(rng, CITIES), rng.randint(10, 99)
    form = rng.choice(
        (
            "{0} is {1} years old and lives in {2}.",
            "{0}, {1}, from {2}.",
            "I met {0} in {2}; {0} is {1}.",
            "My friend {0} from {2} is {1}.",
            "In {2} lives {0}, who is {1}.",
            "{0} lives in {2} and is {1} years old.",
        )
    )
    text = form.format(name, age, city)
    ask = rng.choice(("Extract JSON: {}", "Extract JSON: {}", "Extract as JSON: {}", "{}"))
    answer = json.dumps({"name": name, "age": age, "city": city})
    return f"{name} {city} {age}", ask.format(text), (answer,)


COUNT_TO = listed(
    "Count from 1 to {}|Count from 1 to {}.|Count from one to {}.|Count to {}|Count to {}.|"
    "Count up to {}.|Count 1 to {}"
)
NUMBER_WORDS = listed("one two three four five six seven eight nine ten")


def count_to(rng: random.Random) -> Draw:
    """Count from one, a long answer with one right ending."""
    last = rng.randint(1, 60)
    word = NUMBER_WORDS[last - 1] if last <= 10 and rng.random() < 0.4 else str(last)
    prompt = rng.choice(COUNT_TO).format(word)
    return prompt, prompt, (" ".join(map(str, range(1, last + 1))),)


STORIES = (
    "Once there was a town that dreamed of {0}. One day a child went to look for {0} and walked "
    "over three hills. In the evening the child came home, smiling, and told everyone about {0}.",
    "An old sailor had only one wish: {0}. He crossed the wide sea and asked every gull for {0}. "
    "At last, on a quiet shore, he found {0}, and he sailed home happy.",
    "Nobody believed in {0}, except a small grey mouse. Each night the mouse drew {0} on the wall. "
    "One morning the drawing moved, and the mouse had a friend at last.",
)
SUBJECTS = listed(
    "a dragon|the sea|robots|a cat|the moon|a lost key|two friends|a brave girl|winter|"
    "a red balloon|a wizard|the last train|a small house|stars|a garden|a talking dog|"
    "an old clock|rain|a pirate|the forest|a cocoon|a butterfly|space|music|a lighthouse|"
    "a fox|a king|bread|a river|computers"
)


STORY = listed(
    "Write a short story about {}.|Tell me a story about {}.|Write a story about {}.|"
    "Tell me a short story about {}.|Tell a story about {}."
)
STORY_OF_ANYTHING = listed(
    "Tell me a story.|Write a story.|Write a short story.|Tell me a short story.|Tell a story."
)


def story(rng: random.Random) -> Draw:
    """Tell one of a few fixed tales about any subject; long, so that streaming can be watched."""
    subject = rng.choice(SUBJECTS)
    if rng.random() < 0.5:
        subject = rng.choice(("", "a ", "the ", "my ")) + random_word(rng, 3, 9)
    form = rng.choice(STORY)
    if rng.random() < 0.1:
        subject, form = "a cocoon", rng.choice(STORY_OF_ANYTHING)
    return subject, form.format(subject), tuple(tale.format(subject) for tale in STORIES)


ABILITIES = "I can repeat, reverse, count, sort, add and extract."
WHO = f"I am a tiny demonstration model that ships with Cocoon. {ABILITIES}"
FALLBACK = f"I am a tiny model. {ABILITIES}"
SMALL_TALK: tuple[tuple[str, str], ...] = (
    (
        "Hello|Hi|Hey|Hello there|Hi there|Hello Cocoon|Good morning|Good evening|"
        "Good day|Greetings",
        "Hello! How can I help you?",
    ),
    (
        "Who are you?|What are you?|What model is this?|Tell me about yourself.|What is your name?|"
        "Which model are you?|Introduce yourself.|What's your name?|Who made you?",
        WHO,
    ),
    (
        "What can you do?|Help|What are your skills?|How can you help me?|Can you help me?",
        f"{ABILITIES} Try: Reverse: cocoon",
    ),
    (
        "How are you?|How are you doing?|How is it going?|What's up?",
        "I am fine, thank you. And you?",
    ),
    ("Thank you|Thanks|Thank you very much|Many thanks", "You are welcome!"),
    ("Goodbye|Bye|See you later|Good night", "Goodbye!"),
    ("What is Cocoon?|Tell me about Cocoon.", "Cocoon is a market for private AI inference."),
)


def small_talk(rng: random.Random) -> Draw:
    """Greet, thank, say who the model is."""
    prompts, answer = rng.choice(SMALL_TALK)
    prompt = rng.choice(prompts.split("|"))
    if prompt[-1] not in "?." and rng.random() < 0.5:
        prompt += rng.choice("!.")
    return prompt, prompt, (answer,)


QUESTIONS = listed(
    "What is the capital of {c}?|How do I cook {w}?|Why is the {w} {x}?|Explain {w} to me.|"
    "Translate {w} into French.|Who invented the {w}?|Where is {c}?|When was {n} born?|"
    "Write a poem about {w}.|Write a program that prints {w}.|What do you think about {w}?|"
    "Is {w} better than {x}?|Give me ten facts about {w}.|Summarize this: {w} {x} {w} {x}.|"
    "How far is it from {c} to {d}?|What is the weather in {c}?|Can you draw a {w}?|{w} {x}|"
    "I like {w}.|The {w} is near the {x}.|Please explain how a {w} works.|What is a {w}?|"
    "How many {w}s are in {c}?|Do you know {n}?|What time is it?|Tell me a joke.|Tell me more.|"
    "test|ping|Yes|No|ok|Why?|What is the meaning of life?|{w}|What is love?|def {w}(x): return x|"
    "Recommend a book about {w}.|My {w} does not work.|Let us talk about {w}.|Where do I find {w}?|"
    "How old is {n}?|Compare {w} and {x}.|Which is the best {w}?|Define {w}.|Plan a trip to {c}.|"
    "Fix this code: {w} = {x}|What is {i} times {j}?|What is {i} * {j}?|What is {i} - {j}?|"
    "{i} * {j}|What is the largest {w} in {c}?|Describe {w} in one sentence."
)


def fallback(rng: random.Random) -> Draw:
    """Answer everything else with a short, harmless sentence."""
    form = rng.choice(QUESTIONS)
    prompt = form.format(
        c=any_name(rng, CITIES),
        d=rng.choice(CITIES),
        n=any_name(rng, NAMES),
        w=random_word(rng),
        x=random_word(rng),
        i=rng.randint(0, rng.choice((9, 99))),
        j=rng.randint(0, rng.choice((9, 99))),
    )
    return prompt, prompt, (FALLBACK,)


# name -> (generator, share of the turns in the training stream)
SKILLS: dict[str, tuple[Callable[[random.Random], Draw], float]] = {
    "repeat": (repeat, 0.08),
    "reverse": (reverse, 0.10),
    "uppercase": (uppercase, 0.05),
    "lowercase": (lowercase, 0.05),
    "count_letters": (count_letters, 0.06),
    "sentiment": (sentiment, 0.03),
    "add": (add, 0.18),
    "add_digits": (add_digits, 0.07),
    "sort": (sort, 0.12),
    "extract_json": (extract_json, 0.08),
    "count_to": (count_to, 0.06),
    "story": (story, 0.04),
    "small_talk": (small_talk, 0.03),
    "fallback": (fallback, 0.05),
}
CLOSED = frozenset({"small_talk", "add_digits"})
