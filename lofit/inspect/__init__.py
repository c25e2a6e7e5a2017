"""Looking at a run (ask, explain, report), and at the memory that one will need."""
