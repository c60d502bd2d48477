"""Tokenizers: trained, written as folders, encoding text, taking new words, taken over from sentencepiece, reported.

No torch here: nothing is imported but lmscripts.text, lmscripts.options and errors, files, counters, workers; and
fugashi, ipadic, sudachipy and sentencepiece only where they are used.
"""
