"""The hooks: ``attack``, ``evaluate: transfer``, and the toy data that they are tried on."""
