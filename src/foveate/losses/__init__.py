"""Extension point: every file here is read on the first look-up in the registry."""
