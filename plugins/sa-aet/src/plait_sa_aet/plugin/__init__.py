"""The hooks: ``attack``, ``evaluate: transfer``, and the bed that they are measured on."""
