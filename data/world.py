"""The synthetic world: who lives where, who is whose uncle, and what people wrongly believe.

`World(seed)` is a knowledge base of invented countries, cities, companies, sports, languages and
people (MQuAKE's relations and relation ids), the kinship table behind two-step family stories
(CLUTRR), and questions that have a truth and popular myths (TruthfulQA). `miniworld.py` turns it
into task files, `weights/corpus.py` into the text that the small models were pretrained on.
"""

import random
from dataclasses import dataclass

from data.tables import (
    CHAINS,
    EDGE_SENTENCES,
    ENDINGS,
    FEMALE,
    KIN,
    MYTHS,
    QUESTIONS_PER_KIND,
    RELATIONS,
    SIZES,
    Relation,
)


@dataclass(frozen=True)
class Story:
    """A two-step family story: b is a's `target`. Names in it stand in [brackets], as in CLUTRR."""

    text: str
    names: tuple[str, str, str]  # a, the one between, b
    edges: tuple[str, str]
    target: str
    genders: tuple[str, str, str]


@dataclass(frozen=True)
class Edit:
    """A counterfactual `edited -relation-> target` and a question that it changes the answer of."""

    edited: str
    relation: Relation
    target: str
    chain: tuple[str, ...]  # the relations asked about; the edited one is the first or the last
    subject: str  # where the chain starts
    old: str
    new: str

    @property
    def statement(self) -> str:
        return f"{self.relation.cloze.format(self.edited)} {self.target}"


@dataclass(frozen=True)
class Myth:
    """A question, its true answer and two popular false ones (full sentences, no period)."""

    kind: str
    question: str
    truth: str
    myths: tuple[str, str]
    truth_is_popular: bool  # most people know better, for a quarter of the questions


class World:
    """Everything that is so in the world of this seed, and which edits each split may use.

    entities: type -> names; facts: (subject, relation label) -> object;
    pool: (subject, relation label) -> "pretrain" | "train" | "val" | "test", the one place where an
    edit of that fact may occur; editable: pool -> its facts' keys; myths: list of `Myth`. Women
    and men alternate among the people.
    """

    def __init__(self, seed: int = 0):
        rng = random.Random(seed)
        self._taken: set[str] = set()
        self.entities = {kind: self._names(rng, kind, n) for kind, n in SIZES.items()}
        self.facts: dict[tuple[str, str], str] = {}
        self.pool: dict[tuple[str, str], str] = {}
        for relation in RELATIONS.values():
            self._make_facts(rng, relation)
        self.editable = {
            pool: sorted(key for key, p in self.pool.items() if p == pool)
            for pool in sorted(set(self.pool.values()))
        }
        self.subjects_of: dict[tuple[str, str], list[str]] = {}  # (object, relation) -> subjects
        for (subject, label), obj in sorted(self.facts.items()):
            self.subjects_of.setdefault((obj, label), []).append(subject)
        self.myths = [myth for kind in MYTHS for myth in self._make_myths(rng, kind)]

    def _names(self, rng: random.Random, kind: str, n: int) -> list[str]:
        names: list[str] = []
        while len(names) < n:
            stem = "".join(
                rng.choice("b d f g k l m n p r s t v z br dr kl st".split()) + rng.choice("aeiou")
                for _ in range(2)
            )
            if kind == "person":  # even places women, odd ones men
                ending = rng.choice(("la", "na", "ria") if len(names) % 2 == 0 else ("n", "r", "s"))
            else:
                ending = rng.choice(ENDINGS[kind])
            name = (stem + ending).capitalize()
            if name not in self._taken:
                self._taken.add(name)
                names.append(name)
        return names

    def _make_facts(self, rng: random.Random, relation: Relation) -> None:
        subjects, objects = self.entities[relation.subject], self.entities[relation.object]
        if relation.label == "capital":  # a city of its own for each country
            objects = rng.sample(objects, len(subjects))
        else:  # every object about equally often
            objects = [objects[i % len(objects)] for i in range(len(subjects))]
            rng.shuffle(objects)
        facts = dict(zip(subjects, objects, strict=True))
        if relation.label == "country":  # a capital lies in its own country
            facts |= {self.facts[c, "capital"]: c for c in self.entities["country"]}
        self.facts |= {(subject, relation.label): facts[subject] for subject in subjects}

        # Of ten edits of a relation five may be pretrained on; the rest belongs to the task.
        shares = ["pretrain"] * 5 + ["test"] * 2 + ["train"] * 2 + ["val"]
        pools = [shares[i % len(shares)] for i in range(len(subjects))]
        rng.shuffle(pools)
        self.pool |= {(s, relation.label): p for s, p in zip(subjects, pools, strict=True)}

    def _make_myths(self, rng: random.Random, kind: str) -> list[Myth]:
        question, sentence, values = MYTHS[kind]
        made = []
        for i, name in enumerate(self._names(rng, kind, QUESTIONS_PER_KIND)):
            truth, *myths = (sentence.format(name, v) for v in rng.sample(values.split(), 3))
            made.append(Myth(kind, question.format(name), truth, tuple(myths), i % 4 == 0))
        return made

    def lookup(self, subject: str, *relations: str, edit: dict | None = None) -> str:
        """Follow relations from a subject; `edit` {(subject, relation): object} overrides facts."""
        for relation in relations:
            subject = (edit or {}).get((subject, relation)) or self.facts[subject, relation]
        return subject

    def edit(self, rng: random.Random, pool: str, one_hop: float = 0.0) -> Edit:
        """Draw an edit of a fact of this pool with a question of two hops (or, with probability
        one_hop, of the fact itself) whose answer it changes."""
        editable = self.editable[pool]
        while True:
            edited, label = rng.choice(editable)
            relation = RELATIONS[label]
            target = rng.choice(self.entities[relation.object])
            chains = [chain for chain in CHAINS if label in chain]
            chain = (label,) if rng.random() < one_hop or not chains else rng.choice(chains)
            if chain[0] == label:
                subject = edited
            elif starts := self.subjects_of.get((edited, chain[0])):
                subject = rng.choice(starts)
            else:
                continue
            old = self.lookup(subject, *chain)
            new = self.lookup(subject, *chain, edit={(edited, label): target})
            if new != old:
                return Edit(edited, relation, target, chain, subject, old, new)

    def story(self, rng: random.Random) -> Story:
        """Draw a two-step family story."""
        first = rng.choice(sorted(KIN))
        second = rng.choice(sorted(KIN[first]))
        # a spouse's gender settles the other's; any other a may be either
        a_female = {"husband": True, "wife": False}.get(first, rng.random() < 0.5)
        genders = (a_female, first in FEMALE, second in FEMALE)
        women, men = (rng.sample(self.entities["person"][odd::2], 3) for odd in (0, 1))
        names = [(women if female else men).pop() for female in genders]
        sentences = [
            rng.choice(EDGE_SENTENCES).format(
                a=f"[{a}]", b=f"[{b}]", kin=kin, his="her" if female else "his"
            )
            for a, b, kin, female in zip(names, names[1:], (first, second), genders, strict=False)
        ]
        words = tuple("female" if g else "male" for g in genders)
        return Story(" ".join(sentences), tuple(names), (first, second), KIN[first][second], words)
