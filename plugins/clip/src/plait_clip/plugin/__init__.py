"""Adapters from plait's hooks to the plain functions of this package."""

__plait_api__ = "0.1"
