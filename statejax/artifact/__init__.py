"""Durable state: digests, crash-safe publishing, stored trees."""
