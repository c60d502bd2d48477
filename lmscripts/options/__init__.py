"""A dataclass becomes flags and YAML; the presets; the names of older systems, one file for each system.

Nothing heavy is imported, as `--help` must be quick: no torch, numpy or transformers, and of this package only
`errors` and `files`. What one script checks about its own options stands in that script.
"""
