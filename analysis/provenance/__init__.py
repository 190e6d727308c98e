"""What an artifact is made of (`bill`), and whose it is (`signature`)."""
