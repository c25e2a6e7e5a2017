"""One run of a script: its arguments, what it opens, the files it reads and writes, resuming."""
