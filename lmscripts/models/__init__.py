"""Models: one file a family in `families/`, what families share, attention, saved models found and loaded;
and the policy over decisions, whose fields a schema says.

All that is true of one architecture only stands here, and nobody outside compares a family's name.
No training, no loss, no data but the layout of rows; imports from data and the rooms below it.
"""
