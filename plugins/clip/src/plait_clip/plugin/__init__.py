"""Adapters from plait's hooks to the plain functions of this package."""
