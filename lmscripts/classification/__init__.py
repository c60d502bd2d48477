"""Classifying texts: labelled tables, splits, the SQLite file of a task, and what its runs gave."""
