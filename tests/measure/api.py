"""docs/api.md from the docstrings of what `import lofit` exports.

python tests/measure/api.py
"""

import argparse
import ast
import inspect
from pathlib import Path

import lofit

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
START = """# What `import lofit` exports

After the README's first commands:

```python
import torch
from lofit import attach_offsets, edits_off, load_model, load_offsets, load_tokenizer

model, tokenizer = load_model("weights/mini-llama"), load_tokenizer("weights/mini-llama")
ids = torch.tensor([tokenizer.encode("Q: What is the capital of Braviland? A:")])
logits = model(ids)  # [batch, position, vocab]
load_offsets("runs/mini-llama/mquake", model)
tuned = model(ids)
with edits_off(model):  # the base model again, bit for bit
    assert torch.equal(model(ids), logits)
# instead of these one offset of your own, on head 3 of layer 5, to train as you like
parameters = attach_offsets(model, [(5, 3)], torch.zeros(1, model.config.head_dim))
```

Made from the docstrings by `python tests/measure/api.py`. Shapes are in square brackets.
"""


def page() -> str:
    parts = [START]
    for name in sorted(lofit.__all__):
        thing = getattr(lofit, name)
        source = inspect.getsource(inspect.unwrap(thing))
        node = ast.parse(source).body[0]
        signature = f"{name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        file = thing.__module__.replace(".", "/") + ".py"
        text = inspect.getdoc(thing)
        parts.append(f"## {name}\n\n```\n{signature}\n```\n\n[{file}](../{file})\n\n{text}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
