"""`moec serve`: OpenAI's HTTP interface in front of one artifact."""
