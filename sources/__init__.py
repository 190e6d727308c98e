"""Models that are not ours: each module here turns one form of the spec's `model:` section into a Program."""
