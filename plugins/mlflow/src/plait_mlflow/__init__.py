"""Logs every plait run to MLflow."""

__plait_api__ = "0.1"
