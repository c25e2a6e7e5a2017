"""CLUTRR (kinship reasoning): the prompt. The task itself is not built yet."""


def prompt(story: str, a: str, b: str) -> str:
    """The paper's prompt: a story without brackets, then how b is related to a.

    The public code cuts `query` at the comma and leaves the space before b, so every prompt has
    two spaces there; they are part of the protocol.
    """
    return (
        f'Read the following story about a family. "{story}" Assume the relations described in the'
        " story are all true. Based on relations between the fictional characters in the story"
        " (assume the relations are all true) and your commonsense knowledge about family"
        f" relationship, how is  {b} related to {a}? Answer:  {b} is {a} 's"
    )
