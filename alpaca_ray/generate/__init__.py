"""The first stage: seed tasks and a teacher in, a dataset of new demonstrations out."""
