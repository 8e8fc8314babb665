"""Whole diffusers pipelines: their stages, rehearsed, planned and replaced."""
