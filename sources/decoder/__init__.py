"""The decoder that specs of `architecture: mobilemoe` and `mobilellm` describe."""
