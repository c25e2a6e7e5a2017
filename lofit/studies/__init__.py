"""The runs behind docs/results.md and docs/tables.md, one command a study."""
