"""Adapters from plait's hooks to the backdoor attacks, defences and metrics of this package."""
