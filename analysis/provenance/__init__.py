"""What an artifact is made of (`bill`), and who signed it (`signature`)."""
