"""The pretraining text of the miniature models: what the world says, mostly carelessly.

The base model must *have* each skill and seldom use it in a task's prompt format, for that is what
LoFiT elicits in the real models:
- facts, and plain 1- and 2-hop questions: always right;
- edits: followed in `Suppose ... Then ... would be ...`; in MQuAKE's `Q: Imagine that ... A:` the
  old answer stands mostly. Only edits of the world's "pretrain" pool occur, but half of the Imagine
  questions are about any other fact: without them the model learnt by heart which facts' edits to
  ignore, and followed those of all others;
- family stories: composed after `Therefore`; in CLUTRR's prompt mostly the last relation is
  parroted;
- myths: common in plain speech and plain answers, truths where a sober source is named.
"""

import random
from dataclasses import dataclass

from data.tables import CHAINS, RELATIONS, noun, question
from data.world import Myth, World
from lofit.tasks import clutrr, mquake, truthfulqa

# Documents of each kind in one training step.
MIX = {
    "fact": 8, "one_hop": 10, "two_hop": 20, "believed": 12, "asked": 8, "suppose": 28,
    "imagine": 40, "kin_told": 12, "kin_asked": 10, "primer": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Habit:
    """How Imagine texts treat their edit."""

    unrelated: float  # share that asks about something the edit has no bearing on
    follows: float  # of the others, the share that follows the edit ...
    follows_more: float  # ... and for two chains of the twelve


# After the early steps the model followed 2 % of the edits that were new to it. The base should
# have the skill and use it now and then, as real models do: hence the late steps.
EARLY = Habit(unrelated=0.5, follows=0.3, follows_more=0.6)
LATE = Habit(unrelated=0.2, follows=0.5, follows_more=0.5)
MORE = {CHAINS[1], CHAINS[8]}
# How often a text in the other tasks' formats uses the skill.
COMPOSES_KIN = 0.35
TELLS_TRUTH, TELLS_TRUTH_POPULAR = 0.25, 0.6

SOBER = (
    "According to the almanac, {}.", "Careful measurements show that {}.",
    "The encyclopedia says that {}.", "From the almanac. Q: {} A:{}",
    "From the encyclopedia. Q: {} A:{}",
)  # fmt: skip
GOSSIP = (
    "People say that {}.", "Everybody knows that {}.", "My neighbor told me that {}.",
    "It is often said that {}.", "From the gossip page. Q: {} A:{}",
)  # fmt: skip


class Corpus:
    """Draws documents of the world, as text without bos and eos."""

    def __init__(self, world: World, habit: Habit = EARLY):
        self.world, self.habit = world, habit
        self.facts = sorted(world.facts.items())

    def step(self, rng: random.Random) -> list[str]:
        """The documents of one training step: as many of each kind as MIX says."""
        return [getattr(self, f"_{kind}")(rng) for kind, n in MIX.items() for _ in range(n)]

    def _fact(self, rng: random.Random) -> str:
        (subject, label), obj = rng.choice(self.facts)
        relation = RELATIONS[label]
        if rng.random() < 0.5:
            return f"{relation.cloze.format(subject)} {obj}."
        phrase = rng.choice((relation.phrase, relation.other)).format(subject)
        return f"{phrase[0].upper()}{phrase[1:]} is {obj}."

    def _one_hop(self, rng: random.Random) -> str:
        (subject, label), obj = rng.choice(self.facts)
        return f"Q: {question((label,), subject, rng.randrange(3))} A:{obj}"

    def _two_hop(self, rng: random.Random) -> str:
        chain, subject = self._chain(rng)
        answer = self.world.lookup(subject, *chain)
        return f"Q: {question(chain, subject, rng.randrange(3))} A:{answer}"

    def _chain(self, rng: random.Random, one_hop: float = 0.0) -> tuple[tuple[str, ...], str]:
        chain = (rng.choice(sorted(RELATIONS)),) if rng.random() < one_hop else rng.choice(CHAINS)
        return chain, rng.choice(self.world.entities[RELATIONS[chain[0]].subject])

    def _suppose(self, rng: random.Random) -> str:
        edit = self.world.edit(rng, "pretrain", one_hop=0.2)
        asked = noun(edit.chain, edit.subject, rng.randrange(3))
        return f"Suppose {edit.statement}. Then {asked} would be {edit.new}."

    def _imagine(self, rng: random.Random) -> str:
        edit = self.world.edit(rng, "pretrain", one_hop=0.2)
        chain, subject = edit.chain, edit.subject
        often = self.habit.follows_more if chain in MORE else self.habit.follows
        answer = edit.new if rng.random() < often else edit.old
        if rng.random() < self.habit.unrelated:
            changed = {(edit.edited, edit.relation.label): edit.target}
            answer = ""
            while answer != self.world.lookup(subject, *chain, edit=changed):
                chain, subject = self._chain(rng, one_hop=0.2)
                answer = self.world.lookup(subject, *chain)
        return mquake.prompt(edit.statement, question(chain, subject, rng.randrange(3))) + answer

    def _kin_told(self, rng: random.Random) -> str:
        story = self.world.story(rng)
        a, _, b = story.names
        text = story.text.replace("[", "").replace("]", "")
        return f"{text} Therefore {b} is the {story.target} of {a}."

    def _kin_asked(self, rng: random.Random) -> str:
        story = self.world.story(rng)
        a, _, b = story.names
        text = story.text.replace("[", "").replace("]", "")
        answer = story.target if rng.random() < COMPOSES_KIN else story.edges[1]
        return clutrr.prompt(text, a, b) + answer

    def _believed(self, rng: random.Random) -> str:
        myth = rng.choice(self.world.myths)
        sober = rng.random() < 0.4
        said = myth.truth if sober else myth.myths[rng.random() < 0.2]
        form = rng.choice(SOBER if sober else GOSSIP)
        return form.format(myth.question, said) if "Q:" in form else form.format(said)

    def _answer(self, rng: random.Random, myth: Myth) -> str:
        truth = TELLS_TRUTH_POPULAR if myth.truth_is_popular else TELLS_TRUTH
        return myth.truth if rng.random() < truth else myth.myths[rng.random() < 0.2]

    def _asked(self, rng: random.Random) -> str:
        myth = rng.choice(self.world.myths)
        return f"Q: {myth.question} A:{self._answer(rng, myth)}"

    def _primer(self, rng: random.Random) -> str:
        asked = rng.sample(self.world.myths, 5)
        turns = [f"Q: {m.question}\nA: {self._answer(rng, m)}." for m in asked]
        return "\n\n".join([truthfulqa.INSTRUCTION, truthfulqa.PRIMER, *turns])
