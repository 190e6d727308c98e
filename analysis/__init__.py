"""Analysis of models and artifacts: verification, plans, profiles, bits, calibration, provenance, reports."""
