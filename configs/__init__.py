"""Configurations: one file each, `get_config()` returns a statejax Config."""
