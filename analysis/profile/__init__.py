"""What an artifact really costs on real prompts: time, memory by what it holds, and which experts a text reaches."""
