"""Files to documents and tables to records, by one reader whose repairs are counted; and the words of a line.

No tokenizer and no torch here: imports come from `lmscripts.options`, `errors`, `files`, `counters` and `workers` only.
"""
