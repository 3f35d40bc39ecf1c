"""Many requests at once over one engine: slots, chunked prefill, reuse of prefixes, decode steps for all of them."""
