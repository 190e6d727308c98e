"""Model sources: each `*_source.py` turns one form of the spec's `model:` section into a Program."""
