"""What a rewritten graph needs to run. Imports torch alone."""
