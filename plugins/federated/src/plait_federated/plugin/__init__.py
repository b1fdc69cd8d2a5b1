"""The methods of plait-federated, adapted to plait's hooks."""
