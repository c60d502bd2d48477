"""Judging: a model on a text (`scoring`, `result`), labels with probabilities (`metrics` to `report`), `decisions`.

Sums go over processes before anything is divided, so figures do not depend on how many there were. Nothing here trains;
imports from every other room, and no other room imports from here.
"""
