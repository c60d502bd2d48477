"""What stands on disk and how rows are made of it; `steps` says which process computes which rows of which step.

Text is kept as a token store (`preparation` builds it, `token_store` opens it), a labelled table as one SQLite file,
annotated decisions as a decision store (`schema` says what they are, `decision_preparation` builds it, `decisions`).
Rows: `packing`, `stream`, `pairs` for pretraining, `windows` for scoring, `folding` and `labelled_rows` for labels. A
batch is a function of seed, epoch and step, never of the processes. No model and no loss; imports from tokenizer and
the rooms below it.
"""
