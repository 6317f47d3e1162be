"""Real servers for the tests: an S3-compatible object store, and a proxy that breaks its answers on purpose."""
