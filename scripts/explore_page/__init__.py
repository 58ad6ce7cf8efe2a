"""The page of ``scripts/explore.py``: its images, what the model says of them, the server, and what the browser gets."""
