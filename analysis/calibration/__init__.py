"""Running a model on text to learn what its weights see, and the codes that follow from it."""
