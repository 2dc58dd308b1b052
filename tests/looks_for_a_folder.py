"""A module for tests/test_warm.py: finds the folder for temporary files when it is imported, as libraries do."""

import tempfile

FOUND = tempfile.gettempdir()
