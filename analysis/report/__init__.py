"""`moec report`: one self-contained HTML page with an artifact's sizes, passes, costs and verification."""
