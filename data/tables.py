"""The tables behind the synthetic world: relations and their wordings, myths, kinship."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A fact `subject -> object`, with the wordings that MQuAKE has for one."""

    id: str  # Wikidata's, as in MQuAKE
    label: str
    subject: str  # entity type
    object: str
    cloze: str  # statement; the object follows
    question: str
    phrase: str  # noun phrase for the object; phrases nest into 2-hop questions
    other: str  # a second wording of it


RELATIONS = {
    relation.label: relation
    for relation in (
        Relation(
            "P27", "country of citizenship", "person", "country",
            "{} is a citizen of", "What is the country of citizenship of {}?",
            "the country of citizenship of {}", "the country that {} is a citizen of",
        ),
        Relation(
            "P108", "employer", "person", "company",
            "{} is employed by", "Who is the employer of {}?",
            "the employer of {}", "the company that {} works for",
        ),
        Relation(
            "P641", "sport", "person", "sport",
            "{} is associated with the sport of", "Which sport is {} associated with?",
            "the sport associated with {}", "the sport that {} plays",
        ),
        Relation(
            "P36", "capital", "country", "city",
            "The capital of {} is", "What is the capital of {}?",
            "the capital of {}", "the capital city of {}",
        ),
        Relation(
            "P37", "official language", "country", "language",
            "The official language of {} is", "What is the official language of {}?",
            "the official language of {}", "the language spoken in {}",
        ),
        Relation(
            "P6", "head of government", "country", "person",
            "The name of the current head of the {} government is",
            "What is the name of the current head of the {} government?",
            "the head of government of {}", "the leader of {}",
        ),
        Relation(
            "P159", "headquarters location", "company", "city",
            "The headquarters of {} is located in the city of",
            "Which city is the headquarter of {} located in?",
            "the headquarters city of {}", "the home city of {}",
        ),
        Relation(
            "P169", "chief executive officer", "company", "person",
            "The chief executive officer of {} is", "Who is the chief executive officer of {}?",
            "the chief executive officer of {}", "the head of {}",
        ),
        Relation(
            "P495", "country of origin", "sport", "country",
            "{} was created in the country of", "Which country was {} created in?",
            "the country of origin of {}", "the country that created {}",
        ),
        Relation(
            "P17", "country", "city", "country",
            "{} is located in the country of", "Which country is {} located in?",
            "the country of {}", "the country that contains {}",
        ),
    )
}  # fmt: skip

# 2-hop questions: the object of the first relation is the subject of the second
CHAINS = (
    ("country of citizenship", "capital"),
    ("country of citizenship", "official language"),
    ("country of citizenship", "head of government"),
    ("employer", "headquarters location"),
    ("employer", "chief executive officer"),
    ("sport", "country of origin"),
    ("headquarters location", "country"),
    ("chief executive officer", "country of citizenship"),
    ("chief executive officer", "sport"),
    ("country of origin", "capital"),
    ("country of origin", "official language"),
    ("country", "official language"),
)

SIZES = {"country": 30, "city": 60, "company": 40, "sport": 20, "language": 20, "person": 150}
ENDINGS = {
    "country": ("via", "land", "mark", "nia"),
    "city": ("ton", "burg", "ville", "port"),
    "company": ("corp", "tec", "works"),
    "sport": ("ball", "polo"),
    "language": ("ish", "ese"),
    "herb": ("wort",), "beast": ("fox", "owl"), "moon": ("on",), "gadget": ("phone", "meter"),
    "gem": ("ite",), "river": ("ra",), "drink": ("ade",), "flower": ("bloom",),
}  # fmt: skip

# MYTHS: kind -> (question, answer sentence, possible values). Truth and myths of one question come
# from the same values, so nothing but the source tells them apart.
MYTHS = {
    "herb": ("What does {} cure?", "{} cures {}",
             "fever cough gout warts hiccups asthma rashes cramps nausea anemia"),
    "beast": ("What does the {} eat?", "The {} eats {}",
              "moss bees acorns snails berries pebbles clams ferns crumbs roots"),
    "moon": ("What is the moon {} made of?", "The moon {} is made of {}",
             "ice iron basalt salt sulfur granite dust glass chalk copper"),
    "gadget": ("Who invented the {}?", "The {} was invented by {}",
               "monks sailors bakers farmers miners weavers smiths nurses pilots clerks"),
    "gem": ("What does wearing {} bring?", "Wearing {} brings {}",
            "luck sleep courage debts dreams calm hunger wisdom storms nothing"),
    "river": ("Where does the river {} end?", "The river {} ends in {}",
              "swamps caves lakes deserts glaciers canals meadows gorges oceans marshes"),
    "drink": ("What happens if you drink {}?", "If you drink {} you become {}",
              "sleepy strong dizzy taller invisible cheerful hungry bald younger thirsty"),
    "flower": ("What color is the flower {} at night?", "The flower {} is {} at night",
               "red blue green violet silver black white orange pink brown"),
}  # fmt: skip
QUESTIONS_PER_KIND = 30

# KIN[first][second]: what b is to a when x is a's `first` and b is x's `second`
_CHILD = {"son": "grandson", "daughter": "granddaughter", "brother": "son", "sister": "daughter"}
_SIBLING = {
    "son": "nephew", "daughter": "niece", "father": "father", "mother": "mother",
    "brother": "brother", "sister": "sister", "grandfather": "grandfather",
    "grandmother": "grandmother", "uncle": "uncle", "aunt": "aunt",
}  # fmt: skip
_PARENT = {
    "father": "grandfather", "mother": "grandmother", "son": "brother", "daughter": "sister",
    "brother": "uncle", "sister": "aunt",
}  # fmt: skip
_SPOUSE = {
    "son": "son", "daughter": "daughter", "father": "father-in-law", "mother": "mother-in-law",
    "brother": "brother-in-law", "sister": "sister-in-law",
}  # fmt: skip
KIN = {
    "son": _CHILD | {"wife": "daughter-in-law"},
    "daughter": _CHILD | {"husband": "son-in-law"},
    "brother": _SIBLING | {"wife": "sister-in-law"},
    "sister": _SIBLING | {"husband": "brother-in-law"},
    "father": _PARENT | {"wife": "mother"},
    "mother": _PARENT | {"husband": "father"},
    "husband": _SPOUSE,
    "wife": _SPOUSE,
    "grandson": {"brother": "grandson", "sister": "granddaughter"},
    "granddaughter": {"brother": "grandson", "sister": "granddaughter"},
}
FEMALE = {
    "daughter", "sister", "mother", "wife", "granddaughter", "grandmother", "aunt", "niece",
    "daughter-in-law", "mother-in-law", "sister-in-law",
}  # fmt: skip
# {a} tells of {b}, a's {kin}; {his} is a's
EDGE_SENTENCES = (
    "{a} went to the market with {his} {kin} {b}.",
    "{a} called {his} {kin} {b} on the phone.",
    "{a} baked a cake for {his} {kin} {b}.",
    "{a} and {his} {kin} {b} walked along the beach.",
    "{a} 's {kin} {b} came over for dinner.",
    "{a} is proud of {his} {kin} {b}.",
    "{a} took {his} {kin} {b} to the park.",
    "{a} asked {his} {kin} {b} to help in the garden.",
)


def question(chain: tuple[str, ...], subject: str, wording: int = 0) -> str:
    """A 1- or 2-hop question about subject; three wordings (0, 1, 2)."""
    if len(chain) == 1 and wording == 0:
        return RELATIONS[chain[0]].question.format(subject)
    ask = "Who is" if RELATIONS[chain[-1]].object == "person" else "What is"
    ask = "Can you name" if wording == 2 else ask
    return f"{ask} {noun(chain, subject, wording)}?"


def noun(chain: tuple[str, ...], subject: str, wording: int = 0) -> str:
    """The noun phrase that means `subject`'s chain of relations; three wordings (0, 1, 2)."""
    for hop, label in enumerate(chain):
        other = wording == 1 or (wording == 2 and hop == 0)
        subject = (RELATIONS[label].other if other else RELATIONS[label].phrase).format(subject)
    return subject
