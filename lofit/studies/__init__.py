"""The runs behind docs/results.md, one command a study."""
