"""Models: a file a family in `families/`, what they share, attention, the policy, saved models found and loaded.

All that is true of one architecture only stands here, and nobody outside compares a family's name.
No training, no loss, no data but the layout of rows; imports from data and the rooms below it.
"""
