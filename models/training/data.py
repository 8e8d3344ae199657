"""Synthetic conversations for the "skills" model: training stream and held-out set.

Everything is made by rule from a seed; nothing is downloaded.  Each skill draws a *key* (the
content: two numbers, a word, a name with a city and an age) and words it with one of several
templates.  About one key in sixteen, chosen by a checksum, is held out: the training stream never
contains it, and the evaluation set contains nothing else.  Skills with a closed set of contents
(small talk, sums of two digits) cannot be held out this way and are marked in ``CLOSED``.

The chat template puts one role token before each message and ``<|end|>`` after each answer::

    <|system|>text<|user|>text<|assistant|>text<|end|><|user|>text<|assistant|>

Run as a script to print a few examples.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

END, SYSTEM, USER, ASSISTANT = 256, 257, 258, 259
SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Turn:
    """One question with every answer that counts as right."""

    skill: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """An optional system message and one or more turns; the last one is the one asked."""

    system: str | None
    turns: tuple[Turn, ...]


def held_out(skill: str, key: str) -> bool:
    """Say whether the content ``key`` of ``skill`` belongs to the evaluation set."""
    return zlib.crc32(f"{skill}\0{key}".encode()) % HELD_OUT_ONE_IN == 0


# ---------------------------------------------------------------- words


def listed(text: str) -> list[str]:
    """Split a list written as one string, at bars if it has any, else at spaces."""
    return text.split("|" if "|" in text else None)


WORDS = listed(
    "apple banana bridge butter candle castle cherry circle cloud cocoon coffee copper corner "
    "desert dinner doctor dragon engine family farmer father finger flower forest friend garden "
    "guitar hammer harbor hello horse house island jacket jungle kitchen ladder lemon letter "
    "library lion market melon mirror monkey morning mother mountain music needle number ocean "
    "orange paper pencil people pepper piano planet pocket potato queen rabbit river robot rocket "
    "school shadow silver sister spring square station stone street summer sunset teacher thunder "
    "ticket tiger tomato tower train travel turtle valley village violin water whale window winter "
    "wizard world yellow zebra cat dog sun moon tree fish bird star rain snow book door cup hat "
    "map key sea sky the and is my we go to see big red blue green good day one two"
)
FOREIGN = listed(
    "caf\u00e9 na\u00efve ni\u00f1o stra\u00dfe \u00e5ngstr\u00f6m \u043c\u0438\u0440 "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u65e5\u672c \u4f60\u597d \u03b1\u03b2\u03b3 "
    "\u00fcber gar\u00e7on \U0001f600 \U0001f680 \u00bfqu\u00e9?"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
NAMES = listed(
    "Anna Bob Carlos Dmitri Eve Fatima Grace Hugo Ivan Julia Kenji Lena Mei Noah Olga Pedro Qi "
    "Rosa Sam Tara Uma Victor Wendy Xavier Yara Zoe Adam Bella Chloe David Elena Felix Gita Henry "
    "Ines Jack Karim Laura Maria Nadia Oscar Paula Ravi Sofia Tom Ursula Vera Walter Alice Peter "
    "Emma Liam Mia Lucas Nina Omar Priya Simon Leo Marta"
)
CITIES = listed(
    "Paris Berlin Tokyo Cairo Lima Oslo Rome Delhi Madrid Seoul London Vienna Prague Dublin Lisbon "
    "Athens Warsaw Sofia Milan Munich Zurich Geneva Boston Chicago Toronto Sydney Nairobi Lagos "
    "Mumbai Beijing Hanoi Bangkok Manila Jakarta Havana Bogota Quito Santiago Moscow Helsinki "
    "Stockholm Riga Kyiv Baku Dakar Tunis Rabat Denver Dallas Miami"
)


def random_word(rng: random.Random, low: int = 3, high: int = 10) -> str:
    """Draw a lower-case word: a real one, a pronounceable one or plain random letters."""
    kind = rng.random()
    if kind < 0.25:
        word = rng.choice(WORDS)
        if low <= len(word) <= high:
            return word
    length = rng.randint(low, high)
    if kind < 0.5:
        start = rng.randrange(2)
        return "".join(rng.choice(VOWELS if (start + i) % 2 else CONSONANTS) for i in range(length))
    return "".join(rng.choice(LETTERS) for _ in range(length))


def random_text(rng: random.Random) -> str:
    """Draw something to copy: a word, a phrase, digits or a little Unicode."""
    kind = rng.random()
    if kind < 0.45:
        return random_word(rng)
    if kind < 0.55:
        return rng.choice((str.upper, str.capitalize))(random_word(rng))
    if kind < 0.62:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 8)))
    if kind < 0.68:
        alphabet = LETTERS + LETTERS.upper() + "0123456789-_./"
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 12)))
    words = [random_word(rng, 2, 8) for _ in range(rng.randint(2, 8 if kind < 0.72 else 4))]
    if kind > 0.93:
        words.insert(rng.randrange(len(words)), rng.choice(FOREIGN))
    if kind > 0.97:
        words = ["".join(chr(rng.randint(0xA1, 0x7FF)) for _ in range(rng.randint(1, 5)))]
    text = rng.choice((" ", " ", " ", ", ")).join(words)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:] + rng.choice((".", "!", "?", ""))
    return text


def any_name(rng: random.Random, known: list[str]) -> str:
    """Draw a known name, or (so that copying is learned) an invented one."""
    return rng.choice(known) if rng.random() < 0.6 else random_word(rng, 3, 8).capitalize()


# ---------------------------------------------------------------- skills
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
_NAMES = list(SKILLS)
_SHARES = [share for _, share in SKILLS.values()]


REQUESTS = frozenset(
    listed(
        "Repeat Echo Say Reverse Spell Write Uppercase Lowercase Put Make Convert Count Add "
        "Calculate Sort Extract Tell Give Translate Recommend Define Describe Compare Plan"
    )
)


def as_typed(rng: random.Random, skill: str, prompt: str) -> str:
    """Word a prompt as people do: politely, without the last full stop, without capitals."""
    exact = skill in {"repeat", "extract_json"}  # there the last mark belongs to the content
    if not exact and prompt[-1] in ".?" and rng.random() < 0.25:
        prompt = prompt[:-1]
    if prompt.split()[0].rstrip(":") in REQUESTS:
        kind = rng.random()
        if kind < 0.15:
            prompt = f"Please {prompt[0].lower()}{prompt[1:]}"
        elif kind < 0.2 and not exact and ":" not in prompt:
            prompt = f"Can you {prompt[0].lower()}{prompt[1:].rstrip('.')}?"
    if skill != "extract_json" and rng.random() < 0.15:
        prompt = prompt[0].lower() + prompt[1:]
    return prompt


def draw_turn(rng: random.Random, skill: str, evaluation: bool) -> Turn:
    """Draw one turn of ``skill`` from the training keys or from the held-out ones."""
    while True:
        key, prompt, answers = SKILLS[skill][0](rng)
        if skill in CLOSED or held_out(skill, key) == evaluation:
            return Turn(skill, as_typed(rng, skill, prompt), answers)


# ---------------------------------------------------------------- conversations

SYSTEMS = listed(
    "You are a helpful assistant.|You are a helpful assistant. Answer briefly.|Be concise.|"
    "You are Cocoon's demonstration model.|Answer in English.|You are a friendly {w}.|"
    "Always be polite and never mention {w}.|The user's name is {n} and lives in {c}.|"
    "You answer questions about {w} and {x}.|Do what the user asks.|You are {n}.|"
    "Today you work for a {w} in {c}. Keep answers short."
)


def draw_system(rng: random.Random) -> str:
    """Draw a system message; the right answer never depends on it."""
    parts = [rng.choice(SYSTEMS) for _ in range(rng.choice((1, 1, 1, 2)))]
    return " ".join(parts).format(
        w=random_word(rng), x=random_word(rng), n=rng.choice(NAMES), c=rng.choice(CITIES)
    )


def draw_chat(rng: random.Random) -> Chat:
    """Draw one training conversation: one to three turns, a fifth with a system message."""
    count = rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0]
    skills = rng.choices(_NAMES, _SHARES, k=count)
    system = draw_system(rng) if rng.random() < 0.2 else None
    return Chat(system, tuple(draw_turn(rng, skill, evaluation=False) for skill in skills))


def chat_stream(seed: int) -> Iterator[Chat]:
    """Yield training conversations without end; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield draw_chat(rng)


def held_out_set(per_skill: int = 100, seed: int = 2026, context: int = 0) -> list[Chat]:
    """Return the evaluation set: ``per_skill`` conversations for each skill.

    Of each eight, six are a bare prompt, one has a system message, one a history of one or two
    turns; only the last answer is scored.  With ``context``, every conversation is given a history
    that fills about so many tokens.
    """
    rng = random.Random(seed)
    chats: list[Chat] = []
    for skill in SKILLS:
        seen: set[str] = set()
        misses = 0
        while len(seen) < per_skill and misses < 50 * per_skill:
            turn = draw_turn(rng, skill, evaluation=True)
            if turn.prompt in seen:
                misses += 1
                continue
            kind = len(seen) % 8
            seen.add(turn.prompt)
            system = draw_system(rng) if kind == 3 else None
            wanted = rng.randint(1, 2) if kind == 7 else 0
            chat = Chat(system, (turn,))
            while wanted > 0 or len(encode_prompt(chat)) < context:
                before = draw_turn(rng, rng.choice(_NAMES), evaluation=True)
                chat = Chat(system, (before, *chat.turns))
                wanted -= 1
            chats.append(chat)
    return chats


def digit_sums() -> dict[str, list[Chat]]:
    """Return all hundred sums of two single digits, in each wording, as bare prompts."""
    return {
        form: [
            Chat(None, (Turn("add_digits", form.format(a, b), (str(a + b),)),))
            for a in range(10)
            for b in range(10)
        ]
        for form in ADD
    }


# ---------------------------------------------------------------- tokens


def encode_prompt(chat: Chat) -> list[int]:
    """Return the token ids that ask for the answer to the last turn."""
    ids: list[int] = []
    if chat.system is not None:
        ids += [SYSTEM, *chat.system.encode()]
    for turn in chat.turns[:-1]:
        ids += [USER, *turn.prompt.encode(), ASSISTANT, *turn.answers[0].encode(), END]
    return [*ids, USER, *chat.turns[-1].prompt.encode(), ASSISTANT]


def main() -> None:
    """Print a few training conversations and the size of the held-out set."""
    stream = chat_stream(seed=1)
    for _ in range(20):
        chat = next(stream)
        print(chat.system or "-")
        for turn in chat.turns:
            print(f"  [{turn.skill}] {turn.prompt!r} -> {turn.answers[0]!r}")
    print("held-out:", len(held_out_set()))


if __name__ == "__main__":
    main()
