"""Checkpoints: read, check and synthesize folders in the released layout."""

from moec.checkpoints.spec_from_config import spec_from_config
from moec.checkpoints.store import WeightStore, open_store
from moec.checkpoints.synthesize import synthesize

__all__ = ["WeightStore", "open_store", "spec_from_config", "synthesize"]
