"""From an artifact to an answer: prompts, chat templates, sampling, structured output, and a server."""
