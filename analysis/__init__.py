"""What judges a model or an artifact from outside: verification, plans, profiles, reports."""
